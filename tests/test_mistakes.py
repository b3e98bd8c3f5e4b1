"""Wrong flags and files: each ends with status 2, one line that names what is wrong, and nothing written.

The cases go through the commands' real entry points, most of them in this process.
"""

import dataclasses
import importlib
import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minirl import dqn, ppo, q_learning, rlhf
from minirl.runs.directory import load_settings, save_config
from minirl.runs.flags import saved_config
from minirl.runs.settings import as_text, flag_name
from minirl.scripts.train import run_training

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "ppo": ("train_ppo", [str(ROOT / "train_ppo.py")]),
    "dqn": ("train_dqn", [str(ROOT / "train_dqn.py")]),
    "q": ("train_q", [str(ROOT / "train_q.py")]),
    "rlhf": ("train_rlhf", [str(ROOT / "train_rlhf.py")]),
    "evaluate": ("minirl.evaluate", ["-m", "minirl.evaluate"]),
    "plots": ("minirl.plots", ["-m", "minirl.plots"]),
}

TINY_PPO: dict[str, Any] = {"num_steps": 8, "minibatch_size": 8, "update_epochs": 1}
TINY_DQN: dict[str, Any] = {"buffer_size": 100, "batch_size": 8, "train_frequency": 30}
GAMES: dict[str, Any] = {"eval_episodes": 1, "confirm_episodes": 0}
RUNS: dict[str, tuple[Any, Any]] = {
    "ppo": (ppo.train, ppo.PPOConfig(env_id="CartPole-v1", num_envs=4, total_timesteps=128, **TINY_PPO)),
    "dqn": (dqn.train, dqn.DQNConfig(total_timesteps=300, learning_starts=90, **TINY_DQN, **GAMES)),
    "q": (q_learning.train, q_learning.QLearningConfig(num_episodes=5)),
    "ppo-acrobot": (ppo.train, ppo.PPOConfig(env_id="Acrobot-v1", num_envs=4, total_timesteps=128, **TINY_PPO)),
    "dqn-acrobot": (
        dqn.train,
        dqn.DQNConfig(env_id="Acrobot-v1", total_timesteps=300, learning_starts=90, **TINY_DQN, **GAMES),
    ),
    "cliff": (q_learning.train, q_learning.QLearningConfig(env_id="CliffWalking-v1", num_episodes=1)),
    "breakout": (
        ppo.train,
        ppo.PPOConfig(env_id="BreakoutNoFrameskip-v4", num_envs=1, total_timesteps=8, **TINY_PPO),
    ),
    "rlhf": (rlhf.train, rlhf.RLHFConfig(stage="lm", lm_steps=1, width=4)),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tiny runs of each algorithm."""
    parent = tmp_path_factory.mktemp("runs")
    for name, (train, config) in RUNS.items():
        train(config, run_dir=parent / name, device="cpu")
    return parent


class Bomb:
    """Unpickling this makes a directory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


# What can be wrong with a run directory: the run that it starts as, and what is done to it.


def bytes_in(file: str, content: bytes) -> Callable[[Path], None]:
    def change(run_dir: Path) -> None:
        (run_dir / file).write_bytes(content)

    return change


def settings(**changes: Any) -> Callable[[Path], None]:
    def change(run_dir: Path) -> None:
        path = run_dir / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def without_setting(name: str) -> Callable[[Path], None]:
    def change(run_dir: Path) -> None:
        path = run_dir / "config.json"
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))

    return change


def whole(state: Any) -> Callable[[Path], None]:
    def change(run_dir: Path) -> None:
        torch.save(state, run_dir / "checkpoint.pt")

    return change


def saved(file: str = "checkpoint.pt", **changes: Any) -> Callable[[Path], None]:
    def change(run_dir: Path) -> None:
        state = torch.load(run_dir / file, weights_only=True)
        torch.save({**state, **changes}, run_dir / file)

    return change


def without_saved(name: str) -> Callable[[Path], None]:
    def change(run_dir: Path) -> None:
        state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
        del state[name]
        torch.save(state, run_dir / "checkpoint.pt")

    return change


def cut(file: str) -> Callable[[Path], None]:
    def change(run_dir: Path) -> None:
        path = run_dir / file
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return change


def gone(pattern: str) -> Callable[[Path], None]:
    def change(run_dir: Path) -> None:
        for path in run_dir.glob(pattern):
            path.unlink()

    return change


def a_directory(file: str) -> Callable[[Path], None]:
    def change(run_dir: Path) -> None:
        (run_dir / file).unlink(missing_ok=True)
        (run_dir / file).mkdir()

    return change


def a_bomb(*files: str, legacy: bool = False) -> Callable[[Path], None]:
    def change(run_dir: Path) -> None:
        for file in files:
            torch.save({"algorithm": "ppo", "model": Bomb()}, run_dir / file, _use_new_zipfile_serialization=not legacy)

    return change


def a_bomb_in_memory(run_dir: Path) -> None:
    for path in run_dir.glob("memory-*.npz"):
        bombs: dict[str, Any] = {name: np.array([Bomb()] * len(array), object) for name, array in np.load(path).items()}
        np.savez(path, **bombs)


def a_bomb_in_events(run_dir: Path) -> None:
    for path in run_dir.glob("events*"):
        path.write_bytes(pickle.dumps(Bomb()))


def not_finite(run_dir: Path) -> None:
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    state["model"]["actor.bias"][0] = torch.nan
    torch.save(state, run_dir / "checkpoint.pt")


BROKEN: dict[str, tuple[str, Callable[[Path], None]]] = {
    "ppo-run": ("ppo", lambda run_dir: None),
    "dqn-run": ("dqn", lambda run_dir: None),
    "q-run": ("q", lambda run_dir: None),
    "rlhf-run": ("rlhf", lambda run_dir: None),
    # Files of texts
    "texts": ("q", bytes_in("text", b"abc\nabd\n")),
    "no-text": ("q", bytes_in("text", b"\n \n")),
    "pairs": ("q", bytes_in("json", b'{"prompt": "the", "chosen": "soup", "rejected": "fish"}\n' * 2)),
    "broken-pairs": ("q", bytes_in("json", b'{"prompt": "the", "chosen": "soup", "rejected": "fish"}\n{"prompt":\n')),
    "half-pair": ("q", bytes_in("json", b'{"prompt": "the", "chosen": "soup"}\n')),
    "empty-answer": ("q", bytes_in("json", b'{"prompt": "the", "chosen": "", "rejected": "fish"}\n')),
    "unknown-word": ("q", bytes_in("json", b'{"prompt": "the", "chosen": "sushi", "rejected": "fish"}\n')),
    "long-prompt": (
        "q",
        bytes_in("json", b'{"prompt": "' + b"the " * 28 + b'", "chosen": "soup", "rejected": "fish"}\n'),
    ),
    # config.json
    "no-config": ("ppo", gone("config.json")),
    "empty-config": ("ppo", bytes_in("config.json", b"")),
    "half-config": ("ppo", cut("config.json")),
    "latin-config": ("ppo", bytes_in("config.json", b'{"algorithm": "\xe9\xff"}')),
    "deep-config": ("ppo", bytes_in("config.json", b"[" * 100_000)),
    "list-config": ("ppo", bytes_in("config.json", b"[1, 2]")),
    "dir-config": ("ppo", a_directory("config.json")),
    "bomb-config": ("ppo", bytes_in("config.json", pickle.dumps(Bomb()))),
    "unknown-setting": ("ppo", settings(wings=2)),
    "missing-setting": ("ppo", without_setting("seed")),
    "text-steps": ("ppo", settings(num_steps="8")),
    "text-seed": ("ppo", settings(seed="42")),
    "nested-sizes": ("dqn", settings(hidden_sizes=[[24], 24])),
    "gamma-2": ("ppo", settings(gamma=2)),
    "dqn-gamma-2": ("dqn", settings(gamma=2)),
    "endless-gamma": ("ppo", settings(gamma=10**400)),
    "negative-seed": ("q", settings(seed=-1)),
    "sarsa": ("ppo", settings(algorithm="sarsa")),
    "unknown-env": ("ppo", settings(env_id="NoSuchEnv-v0")),
    # checkpoint.pt and best.pt
    "no-checkpoint": ("ppo", gone("checkpoint.pt")),
    "dir-checkpoint": ("ppo", a_directory("checkpoint.pt")),
    "empty-checkpoint": ("ppo", bytes_in("checkpoint.pt", b"")),
    "half-checkpoint": ("ppo", cut("checkpoint.pt")),
    "half-dqn": ("dqn", cut("checkpoint.pt")),
    "half-q": ("q", cut("checkpoint.pt")),
    "half-best": ("dqn", cut("best.pt")),
    "random-checkpoint": ("ppo", bytes_in("checkpoint.pt", np.random.default_rng(0).bytes(5000))),
    "web-page": ("ppo", bytes_in("checkpoint.pt", b"<html>404</html>\n")),
    "list-checkpoint": ("ppo", whole([1, 2])),
    "weights-alone": ("ppo", whole({"actor.weight": torch.zeros(2, 64)})),
    "other-algorithm": ("ppo", saved(algorithm="dqn")),
    "no-model": ("ppo", without_saved("model")),
    "no-optimizer": ("ppo", without_saved("optimizer")),
    "no-envs": ("dqn", without_saved("envs")),
    "no-table": ("q", without_saved("q_table")),
    "odd-model": ("ppo", saved(model=3)),
    "empty-model": ("ppo", saved(model={})),
    "odd-step": ("ppo", saved(global_step="many")),
    "minus-step": ("ppo", saved(global_step=-32)),
    "odd-returns": ("ppo", saved(returns=7)),
    "odd-random": ("ppo", saved(random_state={})),
    "odd-optimizer": ("ppo", saved(optimizer={"state": {}, "param_groups": []})),
    "odd-envs": ("ppo", saved(envs={"states": [1, 2], "generators": []})),
    "odd-obs": ("ppo", saved(obs=torch.zeros(1, 2))),
    "odd-memory": ("dqn", saved(memory=[])),
    "odd-rng": ("dqn", saved(rng={"bit_generator": "MT19937"})),
    "odd-recent": ("q", saved(recent=[1])),
    "nan-ppo": ("ppo", not_finite),
    "nan-q": ("q", saved(q_table=torch.full((9, 4), torch.nan, dtype=torch.float64))),
    "small-table": ("q", saved(q_table=torch.zeros(4, 4, dtype=torch.float64))),
    "acrobot": ("ppo-acrobot", settings(env_id="CartPole-v1")),
    "dqn-acrobot": ("dqn-acrobot", settings(env_id="CartPole-v1")),
    "cliff": ("cliff", settings(env_id="minirl/GridWorld-v0")),
    "breakout": ("breakout", settings(env_id="PongNoFrameskip-v4")),
    # code where data should be
    "bomb": ("ppo", a_bomb("checkpoint.pt")),
    "legacy-bomb": ("ppo", a_bomb("checkpoint.pt", legacy=True)),
    "plain-bomb": ("q", bytes_in("checkpoint.pt", pickle.dumps(Bomb()))),
    "dqn-bomb": ("dqn", a_bomb("checkpoint.pt")),
    "best-bomb": ("dqn", a_bomb("best.pt")),
    "memory-bomb": ("dqn", a_bomb_in_memory),
    "events-bomb": ("ppo", a_bomb_in_events),
    # what else lies there
    "no-memory": ("dqn", gone("memory-*")),
    "half-memory": ("dqn", cut("memory-200-300.npz")),
    "no-events": ("ppo", gone("events*")),
}

ON_PPO, ON_DQN, ON_Q = "--total-timesteps 256", "--total-timesteps 400", "--num-episodes 9"
UNREADABLE = "checkpoint.pt must be a checkpoint that minirl wrote, and can't be read: "
MISFIT = "checkpoint.pt must be of a run as this one, and does not fit: "
NOT_DATA = "it holds something other than tensors and plain data"

# The command, its flags, and a regular expression for the whole line after `error: `. Words in `BROKEN` are
# directories, made anew for each case.
CASES: list[tuple[str, str, str]] = [
    # Numbers that are none, or out of range
    ("ppo", "--gamma 1.5", "--gamma must be a number from 0 to 1, not 1.5"),
    ("ppo", "--gamma nan", "--gamma must be a number from 0 to 1, not nan"),
    ("ppo", "--gamma 1e400", "--gamma must be a number from 0 to 1, not inf"),
    ("ppo", "--gamma=-1e-3", "--gamma must be a number from 0 to 1, not -0.001"),
    ("ppo", "--gamma=", "--gamma: must be a number, not ''"),
    ("ppo", "--gamma 0x10", "--gamma: must be a number, not '0x10'"),
    ("ppo", "--gamma none", "--gamma: must be a number, not 'none'"),
    ("ppo", "--gamma", "--gamma: expected one argument"),
    ("ppo", "--clip-coef 0", "--clip-coef must be a number above 0, not 0.0"),
    ("ppo", "--target-kl inf", "--target-kl must be a number above 0 or none, not inf"),
    ("ppo", "--total-timesteps 1e6", "--total-timesteps: must be a whole number, not '1e6'"),
    ("ppo", "--total-timesteps -5", "--total-timesteps must be a whole number of at least 1, not -5"),
    ("ppo", "--total-timesteps 1000000000001", "--total-timesteps must be at most 1000000000000, not 1000000000001"),
    ("ppo", f"--total-timesteps {10**400}", "--total-timesteps must be at most 1000000000000, not 10+"),
    ("ppo", f"--seed {'9' * 5000}", "--seed: must be a whole number, not '9+'"),
    ("ppo", "--seed 1 --seed -1", "--seed must be a whole number from 0 to 2147483647, not -1"),
    ("ppo", "--gae-lambda 2", "--gae-lambda must be.*"),
    ("ppo", "--learning-rate 0", "--learning-rate must be a number above 0, not 0.0.*"),
    ("ppo", "--learning-rate -0.001", "--learning-rate must be.*"),
    ("ppo", "--ent-coef -1", "--ent-coef must be a number of at least 0.*"),
    ("ppo", "--vf-coef nan", "--vf-coef must be.*"),
    ("ppo", "--max-grad-norm 0", "--max-grad-norm must be.*"),
    ("ppo", "--target-kl 0", "--target-kl must be a number above 0 or none.*"),
    ("ppo", "--value-clip-coef -1", "--value-clip-coef must be.*"),
    ("ppo", "--num-envs 0", "--num-envs must be a whole number of at least 1, not 0.*"),
    ("ppo", "--num-envs 2.5", "--num-envs: must be a whole number, not '2.5'.*"),
    ("ppo", "--num-steps 0", "--num-steps must be.*"),
    ("ppo", "--update-epochs 0", "--update-epochs must be.*"),
    ("ppo", "--minibatch-size 0", "--minibatch-size must be.*"),
    ("ppo", "--minibatch-size 100", "--minibatch-size must divide num_envs x num_steps = 1024, and 100 does not.*"),
    ("ppo", "--num-workers 0", "--num-workers must be a whole number of at least 1 or none.*"),
    ("ppo", "--checkpoint-frequency 0", "--checkpoint-frequency must be.*"),
    ("ppo", "--seed 99999999999", "--seed must be a whole number from 0 to 2147483647.*"),
    ("dqn", "--tau 0", "--tau must be a number above 0 and of at most 1, not 0.0"),
    ("dqn", "--train-frequency 0", "--train-frequency must be a whole number of at least 1, not 0"),
    ("dqn", "--frame-size 42", "--frame-size must be left out, for CartPole-v1 is no Atari game"),
    (
        "ppo",
        "--env-id PongNoFrameskip-v4 --num-envs 2 --num-workers 1 --activation relu",
        "--hidden-sizes and --activation must be left out: images go through the Nature CNN",
    ),
    (
        "dqn",
        "--env-id PongNoFrameskip-v4 --hidden-sizes 9",
        "--hidden-sizes must be left out: images go through the Nature CNN",
    ),
    (
        "ppo",
        "--env-id CartPole-v1 --log-std-init -2",
        "--log-std-init must be left out: only actions that are numbers have a Gaussian",
    ),
    ("ppo", "--num-threads 1025", "--num-threads must be a whole number from 1 to 1024 or none, not 1025"),
    ("ppo", "--activation gelu", "--activation must be tanh or relu, not 'gelu'"),
    ("ppo", "--cnn-channels 16,32", "--cnn-channels must be three numbers, not 2"),
    (
        "ppo",
        "--env-id CartPole-v1 --cnn-channels 16,32,32",
        "--cnn-channels must be left out: only images go through a CNN",
    ),
    ("ppo", "--frame-size 20", "--frame-size must be a whole number of at least 36, not 20"),
    ("dqn", "--gradient-steps 0", "--gradient-steps must be a whole number of at least 1, not 0"),
    ("dqn", "--target-network-frequency 0", "--target-network-frequency must be a whole number of at least 1, not 0"),
    (
        "dqn",
        "--target-network-episodes 0",
        "--target-network-episodes must be a whole number of at least 1 or none.*",
    ),
    ("dqn", "--epsilon-decay 0", "--epsilon-decay must be a number above 0 and of at most 1 or none, not 0.0"),
    (
        "dqn",
        "--epsilon-decay 0.9 --exploration-fraction 0.5",
        "--exploration-fraction must be left out: with epsilon_decay, epsilon falls by episodes",
    ),
    (
        "dqn",
        "--target-network-episodes 2 --target-network-frequency 9",
        "--target-network-frequency must be left out: with target_network_episodes, episodes count",
    ),
    ("dqn", "--precision half", "--precision must be auto, float32 or bfloat16, not 'half'"),
    ("dqn", "--hidden-sizes 24,x", "--hidden-sizes: must be whole numbers as in 24,24, not '24,x'"),
    ("dqn", "--hidden-sizes 24,,24", "--hidden-sizes: must be whole numbers as in 24,24, not '24,,24'"),
    ("dqn", "--hidden-sizes 24,0", "--hidden-sizes must be whole numbers .* each of at least 1, not .24, 0."),
    ("dqn", f"--hidden-sizes {10**13}", "--hidden-sizes must be at most 1000000000000, not .10+,."),
    ("dqn", "--eval-frequency 0", "--eval-frequency must be a whole number of at least 1 or none, not 0"),
    ("q", "--alpha 0", "--alpha must be a number above 0 and of at most 1, not 0.0"),
    ("q", "--epsilon -1", "--epsilon must be a number from 0 to 1, not -1.0"),
    ("q", "--num-episodes 1e3", "--num-episodes: must be a whole number, not '1e3'"),
    ("q", "--initial-value nan", "--initial-value must be a number, not nan"),
    ("evaluate", "ppo-run --episodes 0", "--episodes must be a whole number from 1 to 1000000000000, not 0"),
    ("evaluate", f"ppo-run --episodes {10**20}", f"--episodes must be a whole number from 1 to 10+, not {10**20}"),
    ("evaluate", "ppo-run --episodes many", "--episodes: must be a whole number, not 'many'"),
    ("evaluate", "ppo-run --seed -1", "--seed must be a whole number from 0 to 2147483647, not -1"),
    ("evaluate", "ppo-run --seed 2147483648", "--seed must be a whole number from 0 to 2147483647, not 2147483648"),
    # Switches and words
    ("ppo", "--anneal-lr 1", "unrecognized arguments: 1; .*switches take no value"),
    ("ppo", "--no-compile=1", "--compile/--no-compile: takes no value, so not '1'"),
    ("ppo", "--no-gamma", "unrecognized arguments: --no-gamma; did you mean --gamma."),
    ("ppo", "stray", "unrecognized arguments: stray; names of flags start with --.*"),
    ("ppo", "--env-id CartPole-v1 --precision half", "--precision must be auto, float32 or bfloat16, not 'half'"),
    ("ppo", "--device tpu", "--device must be auto, cpu or cuda, not 'tpu'.*"),
    ("ppo", "--device cuda", "--device cuda must have a GPU.*"),
    ("q", "--device cuda:0", "--device must be auto, cpu or cuda, not 'cuda:0'"),
    ("evaluate", "ppo-run --device tpu", "--device must be auto, cpu or cuda, not 'tpu'"),
    ("evaluate", "dqn-run --stochastic", "--stochastic must go with a run of ppo: dqn has no probabilities .*"),
    ("evaluate", "ppo-run --json=1", "--json: takes no value, so not '1'"),
    ("evaluate", "", "the following arguments are required: RUN_DIR"),
    ("plots", "", "the following arguments are required: RUN_DIR"),
    # Settings that do not go together
    ("ppo", "--num-envs 7", "--minibatch-size must divide num_envs x num_steps = 896, and 256 does not"),
    ("ppo", "--minibatch-size 1", "--minibatch-size must be at least 2 to normalise advantages; .*"),
    (
        "ppo",
        "--num-envs 1 --num-steps 1000000000000 --minibatch-size 1000000000000 --env-id CartPole-v1",
        "the settings must fit into this machine's memory, --num-envs, --num-steps, .* say: .*",
    ),
    ("dqn", "--num-envs 3", "--buffer-size must be a multiple of num_envs = 3, not 100000"),
    ("dqn", "--batch-size 100001", "--batch-size must be at most buffer_size = 100000, not 100001"),
    ("dqn", "--learning-starts 100001", "--total-timesteps must be at least 100001, .*: learning_starts is 100001, .*"),
    ("dqn", "--start-epsilon 0.01", "--end-epsilon must be at most start_epsilon = 0.01, not 0.05"),
    ("dqn", "--buffer-size 1000000000000", "--buffer-size must fit into this machine's memory, and 10+ does not: .*"),
    # Environments
    ("ppo", "--env-id=", "--env-id must be an environment that Gymnasium can make: Error: Malformed .*"),
    ("ppo", "--env-id ../x-v0", "--env-id must be an environment that Gymnasium can make: Error: Malformed .*"),
    ("ppo", f"--env-id {'A' * 300}-v0", "--env-id must be an environment that Gymnasium can make: .* doesn't exist."),
    (
        "ppo",
        "--env-id a:b:c-v0",
        "--env-id must be an environment that Gymnasium can make: ModuleNotFoundError: .*'a:b'",
    ),
    ("ppo", "--env-id NoSuchGame-v0", "--env-id must be an environment that Gymnasium can make.*"),
    ("ppo", "--env-id ALE/Pang-v5", "--env-id must be an environment that Gymnasium can make.*"),
    ("ppo", "--env-id Acrobot-v0", "--env-id must be an environment that Gymnasium can make.*"),
    ("ppo", "--env-id HalfCheetah-v2", "--env-id must be an environment that Gymnasium can make.*"),
    ("ppo", "--env-id .x:Y-v0", "--env-id must be an environment that Gymnasium can make.*"),
    ("ppo", "--env-id CartPole-v99", "--env-id must be an environment that Gymnasium can make.*"),
    ("ppo", "--env-id no_such_module:Env-v0", "--env-id must be an environment that Gymnasium can make.*"),
    ("ppo", "--env-id Blackjack-v1", "--env-id must have observations that are one array, not Tuple.*"),
    *(
        ("ppo", f"--env-id tests.fake_envs:{name}Actions-v0", f"--env-id must have actions that are .*, not {kind}.*")
        for name, kind in [("Dict", "Dict"), ("Tuple", "Tuple"), ("Text", "Text"), ("Bytes", "Box")]
    ),
    (
        "ppo",
        "--norm-obs --num-envs 2 --num-workers 1",
        "--norm-obs must go with vectors as observations: images are divided by 255",
    ),
    ("dqn", "--env-id tests.fake_envs:DictActions-v0", "--env-id must have actions that are .*, not Dict.*"),
    ("dqn", "--env-id tests.fake_envs:ChoicesActions-v0", "--env-id must have Discrete actions for DQN, not Multi.*"),
    (
        "q",
        "--env-id tests.fake_envs:OneActions-v0",
        "--env-id must have Discrete observations .* for a Q-table, not .*",
    ),
    ("ppo", "--env-id tests.fake_envs:SmallPicture-v0", "--env-id must have vectors .n,. or images.*"),
    ("dqn", "--env-id Pendulum-v1", "--env-id must have Discrete actions for DQN, not Box.*"),
    ("dqn", "--env-id Blackjack-v1", "--env-id must have observations that are one array, not Tuple.*"),
    ("dqn", "--env-id tests.fake_envs:SmallPicture-v0", "--env-id must have vectors .n,. or images .*"),
    ("q", "--env-id CartPole-v1", "--env-id must have Discrete observations that count from 0 for a Q-table, not .*"),
    ("q", "--env-id tests.fake_envs:NoSuch-v0", "--env-id must be an environment that Gymnasium can make: .*"),
    # Texts
    ("rlhf", "--stage sft", "--stage must be lm, reward or ppo, not 'sft'"),
    ("rlhf", "--tokens words", "--tokens must be characters or bytes, not 'words'"),
    ("rlhf", "--tokens bytes", "--tokens must be left out: reviews by the grammar are made of characters"),
    (
        "rlhf",
        "--preferences nowhere --num-pairs 9",
        "--num-pairs and --rater-sharpness must be left out: --preferences has the pairs",
    ),
    ("rlhf", "--minibatch-size 1", "--minibatch-size must be at least 2 to normalise advantages; or give .*"),
    ("rlhf", "--num-heads 3", "--num-heads must divide width = 64, and 3 does not"),
    ("rlhf", "--minibatch-size 48", "--minibatch-size must divide batch_size = 128, not 48"),
    ("rlhf", "--context 27", "--context must be at least 28 tokens for the grammar's reviews, not 27"),
    ("rlhf", "--kl-coef -1", "--kl-coef must be a number of at least 0, not -1.0"),
    ("rlhf", "--env-id CartPole-v1", "unrecognized arguments: --env-id CartPole-v1; --env-id belongs to .*"),
    ("rlhf", "--text texts/text", "--preferences must be given with --text, which has no hidden rule; or --stage lm"),
    ("rlhf", "--text no-text/text --stage lm", "--text must be a file with some text in it, and no-text/text has none"),
    ("rlhf", "--text nowhere --stage lm", r"--text must be a file of text \(UTF-8\): .*No such file.*'nowhere'"),
    ("rlhf", "--preferences nowhere", r"--preferences must be a file of text \(UTF-8\): .*No such file.*'nowhere'"),
    (
        "rlhf",
        "--preferences broken-pairs/json",
        "broken-pairs/json, line 2, must be a JSON object: Expecting value: .*",
    ),
    ("rlhf", "--preferences half-pair/json", "half-pair/json, line 1, must be a JSON object with .*: no rejected"),
    ("rlhf", "--preferences empty-answer/json", "empty-answer/json, line 1, must have some text as chosen"),
    ("rlhf", "--preferences unknown-word/json", "unknown-word/json, line 1, must have words .*, and 'sushi' is none"),
    (
        "rlhf",
        "--preferences long-prompt/json",
        "long-prompt/json, line 1, must fit into --context 28: prompt and chosen have 30 tokens",
    ),
    (
        "rlhf",
        "--preferences pairs/json --text texts/text",
        "pairs/json, line 1, must have characters that .* has learned, and 't' is none",
    ),
    ("rlhf", "--resume rlhf-run --width 8", "--width 8 can't go with --resume: the run has 4; leave it out"),
    ("rlhf", "--resume ppo-run", "--resume must name a run of rlhf: ppo-run is one of ppo"),
    ("evaluate", "rlhf-run --video a.gif", "--video must go with a run that plays games: one of rlhf writes texts"),
    ("plots", "rlhf-run", "rlhf-run must be a run of rlhf that has come to PPO, and has no texts/kl in its events"),
    ("plots", "rlhf-run ppo-run", "runs of rlhf must be drawn without others, and rlhf-run is one"),
    # Directories and files to write
    ("q", "--run-dir=", "--run-dir: must be a path, not ''"),
    ("q", "--run-dir q-run", "--run-dir must be a new directory: q-run holds a run; continue it with --resume q-run"),
    ("q", "--run-dir q-run/config.json", "--run-dir must be a directory, and q-run/config.json is a file"),
    ("q", "--run-dir q-run/config.json/x", "--run-dir must be a directory that can be written: .*Not a directory.*"),
    ("q", f"--run-dir {'A' * 300}", "--run-dir must be a directory that can be written: .*name too long.*"),
    ("evaluate", "ppo-run --video game.avi", "--video must be a file that ends in .*, not game.avi"),
    (
        "evaluate",
        "ppo-run --video no/game.mp4",
        "--video must be a file .* in a directory that exists, not no/game.mp4",
    ),
    ("plots", "ppo-run --output no/curve.png", "--output must be a picture that can be written: .*no/curve.png.*"),
    ("plots", "ppo-run --output curve.xyz", "--output must be a picture that can be written: .*xyz.*"),
    # Resume: which run, and with which settings
    ("ppo", "--resume=", "--resume: must be a path, not ''"),
    ("ppo", "--resume nowhere", "nowhere must be a run directory, and has no config.json"),
    ("dqn", "--resume nowhere", "nowhere must be a run directory, and has no config.json"),
    ("ppo", "--resume ppo-run/config.json", "ppo-run/config.json/config.json can't be read: .*Not a directory.*"),
    ("ppo", "--resume dqn-run", "--resume must name a run of ppo: dqn-run is one of dqn"),
    ("q", "--resume ppo-run", "--resume must name a run of q_learning: ppo-run is one of ppo"),
    ("ppo", "--resume ppo-run --run-dir new", "--run-dir can't go with --resume, which names .*"),
    ("ppo", "--resume ppo-run --gamma 0.5", "--gamma 0.5 can't go with --resume: the run has 0.99; leave it out"),
    ("ppo", "--resume ppo-run --seed 1", "--seed 1 can't go with --resume: the run has 42; leave it out"),
    (
        "ppo",
        "--resume ppo-run --env-id Acrobot-v1",
        "--env-id Acrobot-v1 can't go with --resume: the run has CartPole.*",
    ),
    ("dqn", "--resume dqn-run --hidden-sizes 8", "--hidden-sizes 8 can't go with --resume: the run has 24,24; .*"),
    ("ppo", "--resume ppo-run --total-timesteps 64", "--total-timesteps must be at least the 128 steps already done"),
    ("dqn", "--resume dqn-run --total-timesteps 200", "--total-timesteps must be at least the 300 steps already done"),
    ("q", "--resume q-run --num-episodes 4", "--num-episodes must be at least the 5 episodes already done"),
    ("evaluate", "nowhere", "nowhere must be a run directory, and has no config.json"),
    ("plots", "ppo-run nowhere", "nowhere must be a run directory, and has no config.json"),
    # config.json
    ("ppo", "--resume no-config", "no-config must be a run directory, and has no config.json"),
    ("ppo", "--resume empty-config", "empty-config/config.json can't be read: .*"),
    ("ppo", "--resume half-config", "half-config/config.json can't be read: .*"),
    ("ppo", "--resume latin-config", "latin-config/config.json can't be read: .*"),
    ("evaluate", "deep-config", "deep-config/config.json can't be read: .*recursion.*"),
    ("plots", "list-config", "list-config/config.json must hold the settings of a run"),
    ("plots", "dir-config", "dir-config/config.json can't be read: .*Is a directory.*"),
    ("ppo", "--resume unknown-setting", "unknown-setting has settings that this version does not know: wings"),
    ("ppo", "--resume missing-setting", "missing-setting/config.json must hold the settings of a run"),
    ("ppo", "--resume text-steps", "text-steps/config.json: --num-steps must be a whole number .*, not '8'"),
    ("ppo", "--resume gamma-2", "gamma-2/config.json: --gamma must be a number from 0 to 1, not 2"),
    ("ppo", "--resume endless-gamma", "endless-gamma/config.json: --gamma must be a number from 0 to 1, not 10+"),
    ("q", "--resume negative-seed", "negative-seed/config.json: --seed must be a whole number from 0 to .*, not -1"),
    ("dqn", "--resume nested-sizes", "nested-sizes/config.json: --hidden-sizes must be .*, not .*"),
    ("evaluate", "dqn-gamma-2", "dqn-gamma-2/config.json: --gamma must be a number from 0 to 1, not 2"),
    ("evaluate", "text-seed", "text-seed/config.json must hold the settings of a run"),
    ("evaluate", "sarsa", "sarsa must hold a run of ppo, dqn, q_learning or rlhf, not of sarsa"),
    ("evaluate", "unknown-env", "--env-id must be an environment that Gymnasium can make: .*NoSuchEnv.*"),
    # Checkpoints that are none
    ("ppo", "--resume no-checkpoint", "no-checkpoint/checkpoint.pt: there is no checkpoint here"),
    ("ppo", "--resume dir-checkpoint", f"dir-checkpoint/{UNREADABLE}.*Is a directory.*"),
    ("ppo", "--resume empty-checkpoint", f"empty-checkpoint/{UNREADABLE}it is broken .*"),
    ("ppo", "--resume half-checkpoint", f"half-checkpoint/{UNREADABLE}it is broken .*"),
    ("dqn", "--resume half-dqn", f"half-dqn/{UNREADABLE}it is broken .*"),
    ("q", "--resume half-q", f"half-q/{UNREADABLE}it is broken .*"),
    ("ppo", "--resume random-checkpoint", f"random-checkpoint/{UNREADABLE}{NOT_DATA}"),
    ("ppo", "--resume web-page", f"web-page/{UNREADABLE}{NOT_DATA}"),
    ("ppo", "--resume list-checkpoint", "list-checkpoint/checkpoint.pt must be a checkpoint of ppo, and is not"),
    ("ppo", "--resume weights-alone", "weights-alone/checkpoint.pt must be a checkpoint of ppo, and is not"),
    ("evaluate", "no-checkpoint", "no-checkpoint/checkpoint.pt: there is no checkpoint here"),
    ("evaluate", "half-checkpoint", f"half-checkpoint/{UNREADABLE}it is broken .*"),
    ("evaluate", "half-best", "half-best/best.pt must be a checkpoint that minirl wrote, .*: it is broken .*"),
    # Checkpoints of something else
    ("ppo", "--resume other-algorithm", "other-algorithm/checkpoint.pt must be a checkpoint of ppo, and is not"),
    ("ppo", "--resume no-optimizer", "no-optimizer/checkpoint.pt must be of a run as this one, and has no optimizer"),
    ("dqn", "--resume no-envs", "no-envs/checkpoint.pt must be a whole checkpoint, and has no envs"),
    ("evaluate", "no-model", "no-model/checkpoint.pt must be a whole checkpoint, and has no model"),
    ("evaluate", "no-table", "no-table/checkpoint.pt must be a whole checkpoint, and has no q_table"),
    ("ppo", f"--resume acrobot {ON_PPO}", f"acrobot/{MISFIT}RuntimeError: size mismatch for actor.bias: .*"),
    ("dqn", f"--resume dqn-acrobot {ON_DQN}", f"dqn-acrobot/{MISFIT}RuntimeError: size mismatch for head.bias: .*"),
    ("ppo", f"--resume breakout {ON_PPO}", f"breakout/{MISFIT}RuntimeError: size mismatch for actor.bias: .*"),
    ("q", f"--resume cliff {ON_Q}", f"cliff/{MISFIT}.*the environment has .9, 4. .*, its table .48, 4.*"),
    ("evaluate", "acrobot", f"acrobot/{MISFIT}RuntimeError: size mismatch for actor.bias: .*"),
    ("evaluate", "dqn-acrobot", "dqn-acrobot/best.pt must be .*size mismatch for head.bias: .*"),
    ("evaluate", "breakout", f"breakout/{MISFIT}RuntimeError: size mismatch for actor.bias: .*"),
    ("evaluate", "small-table", f"small-table/{MISFIT}.*the environment has .9, 4. .*, its table .4, 4.*"),
    # Checkpoints that somebody has changed
    ("ppo", f"--resume odd-model {ON_PPO}", f"odd-model/{MISFIT}.*"),
    ("ppo", f"--resume empty-model {ON_PPO}", f"empty-model/{MISFIT}.*Missing key.*"),
    ("ppo", f"--resume odd-step {ON_PPO}", f"odd-step/{MISFIT}.*global_step is no int: 'many'"),
    ("ppo", f"--resume minus-step {ON_PPO}", f"minus-step/{MISFIT}.*global_step is -32"),
    ("ppo", f"--resume odd-returns {ON_PPO}", f"odd-returns/{MISFIT}.*returns is no list: 7"),
    ("ppo", f"--resume odd-random {ON_PPO}", f"odd-random/{MISFIT}.*'cpu'"),
    ("ppo", f"--resume odd-optimizer {ON_PPO}", f"odd-optimizer/{MISFIT}.*parameter groups"),
    ("ppo", f"--resume odd-envs {ON_PPO}", f"odd-envs/{MISFIT}.*2 saved states for 4 environments"),
    ("ppo", f"--resume odd-obs {ON_PPO}", f"odd-obs/{MISFIT}.*show .4, 4., and its obs are .1, 2."),
    ("ppo", f"--resume nan-ppo {ON_PPO}", f"nan-ppo/{MISFIT}.*actor.bias not finite"),
    ("dqn", f"--resume odd-memory {ON_DQN}", f"odd-memory/{MISFIT}.*"),
    ("dqn", f"--resume odd-rng {ON_DQN}", f"odd-rng/{MISFIT}.*PCG64.*"),
    ("dqn", f"--resume no-memory {ON_DQN}", "no-memory/memory-200-300.npz must be part of this run's memory, .*"),
    ("dqn", f"--resume half-memory {ON_DQN}", "half-memory/memory-200-300.npz must be part of this run's memory, .*"),
    ("q", f"--resume odd-recent {ON_Q}", f"odd-recent/{MISFIT}.*"),
    ("q", f"--resume nan-q {ON_Q}", f"nan-q/{MISFIT}.*q_table not finite"),
    ("evaluate", "nan-ppo", f"nan-ppo/{MISFIT}.*actor.bias not finite"),
    ("plots", "no-events", "no-events must hold TensorBoard events of at least one finished episode"),
    # Code where data should be: refused, and not run
    ("ppo", "--resume bomb-config", "bomb-config/config.json can't be read: .*"),
    ("ppo", f"--resume bomb {ON_PPO}", f"bomb/{UNREADABLE}{NOT_DATA}"),
    ("ppo", f"--resume legacy-bomb {ON_PPO}", f"legacy-bomb/{UNREADABLE}{NOT_DATA}"),
    ("dqn", f"--resume dqn-bomb {ON_DQN}", f"dqn-bomb/{UNREADABLE}{NOT_DATA}"),
    ("dqn", f"--resume memory-bomb {ON_DQN}", "memory-bomb/memory-200-300.npz must be .*allow_pickle=False"),
    ("q", f"--resume plain-bomb {ON_Q}", f"plain-bomb/{UNREADABLE}{NOT_DATA}"),
    ("evaluate", "bomb", f"bomb/{UNREADABLE}{NOT_DATA}"),
    ("evaluate", "legacy-bomb", f"legacy-bomb/{UNREADABLE}{NOT_DATA}"),
    ("evaluate", "plain-bomb", f"plain-bomb/{UNREADABLE}{NOT_DATA}"),
    ("evaluate", "best-bomb", f"best-bomb/best.pt must be .*{NOT_DATA}"),
    ("plots", "bomb-config", "bomb-config/config.json can't be read: .*"),
    ("plots", "events-bomb", "events-bomb must hold TensorBoard events of at least one finished episode"),
]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def make_directories(line: str, runs: Path) -> None:
    for word in re.split("[ =/]", line):
        if word in BROKEN:
            run, change = BROKEN[word]
            shutil.copytree(runs / run, word)
            change(Path(word))


def tree(directory: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.rglob("*")}


def call(command: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, arguments = COMMANDS[command]
    monkeypatch.setattr(sys, "argv", [arguments[-1], *line.split()])
    importlib.import_module(module).main()


@pytest.mark.parametrize(("command", "line", "message"), CASES, ids=[f"{case[0]} {case[1][:60]}" for case in CASES])
def test_a_mistake_is_one_line_and_status_2_and_nothing_is_written(
    command: str,
    line: str,
    message: str,
    runs: Path,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    make_directories(line, runs)
    before = tree(workplace)
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as caught, pytest.raises(SystemExit) as stop:
        warnings.simplefilter("always")
        call(command, line, monkeypatch)
    output = capfd.readouterr()
    assert stop.value.code == 2
    assert output.out == ""
    assert re.fullmatch(f"error: {message}\n", output.err.replace(f"{workplace}/", ""))
    assert [str(w.message) for w in caught if issubclass(w.category, UserWarning)] == [], "they are lines, too"
    assert tree(workplace) == before


@pytest.mark.slow
def test_the_same_in_processes_of_their_own(runs: Path, workplace: Path) -> None:
    lines = {
        "ppo": "--resume half-checkpoint",
        "dqn": "--num-envs 3",
        "q": f"--resume plain-bomb {ON_Q}",
        "evaluate": "bomb",
        "plots": "events-bomb",
    }
    make_directories(" ".join(lines.values()), runs)
    before = tree(workplace)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    commands = {name: [sys.executable, *COMMANDS[name][1], *line.split()] for name, line in lines.items()}
    processes = {name: subprocess.Popen(command, **pipes) for name, command in commands.items()}
    for name, process in processes.items():
        output, error = process.communicate()
        assert (process.returncode, output) == (2, "")
        (message,) = [case[2] for case in CASES if case[:2] == (name, lines[name])]
        assert re.fullmatch(f"error: {message}\n", error.replace(f"{workplace}/", ""))
    assert tree(workplace) == before


def test_the_bombs_are_live(workplace: Path) -> None:
    a_bomb("checkpoint.pt")(workplace)
    torch.load(workplace / "checkpoint.pt", weights_only=False)
    assert (workplace / "exploded").is_dir()


def test_a_directory_that_only_others_may_write(
    runs: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Permissions do not bind root, as whom tests may run: every file that is opened to write is refused instead."""
    make_directories("q-run", runs)
    before = tree(workplace)

    def refuse(self: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    for line in (f"--resume q-run {ON_Q}", "--run-dir new"):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            call("q", line, monkeypatch)
        assert stop.value.code == 2
        error = capfd.readouterr().err
        assert re.fullmatch("error: .*can(not|'t)? be written: .*Permission denied: '.*(q-run|new).*'\n", error)
        assert tree(workplace) == before


# Random flags

WORDS = ["", " ", "none", "None", "true", "nan", "-nan", "inf", "-inf", "1e400", "-1e400", "5e-324", "1e308", "-0", "0"]
WORDS += ["-1", "1", "2", "7", "0.5", "1.0", "1.5", "-0.5", "1e3", "1_000", "1__0", "0x10", "0b1", "1e", "e", ".", "-"]
WORDS += ["\u0661\u0662", "\uff11", "\u00bd", " 3 ", "\t4\n", "1,2", "1,", ",", "[1]", "(1, 2)", "1;2", "1 2", "$HOME"]
WORDS += [str(2**31 - 1), str(2**31), str(2**63), str(10**12), str(10**12 + 1), str(10**400), "9" * 5000, "1" * 300]
WORDS += ["CartPole-v1", "\u00e9", "\U0001f3ae", "'", '"', "\\", "%s", "{}", "a\nb", "--gamma", "auto", "bfloat16"]


@pytest.mark.parametrize("config_class", [ppo.PPOConfig, dqn.DQNConfig, q_learning.QLearningConfig])
def test_random_flags_are_settings_in_range_or_one_line(
    config_class: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(0)
    good = 0
    fields = dataclasses.fields(config_class)
    defaults = [as_text(field.default) for field in fields]
    for number in range(200):
        argv: list[str] = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            field = rng.choice(fields)
            if isinstance(field.default, bool) or field.name == "compile":
                argv.append(flag_name(rng.choice(["", "no_"]) + field.name))
            else:
                word = rng.choice(rng.choice([WORDS, defaults, [str(rng.uniform(-1, 3)), str(rng.randint(-9, 9999))]]))
                argv += rng.choice([[flag_name(field.name), word], [f"{flag_name(field.name)}={word}"]])
        seen: list[Any] = []

        def train(config: Any, *, run_dir: Path | None, resume: bool, device: str, seen: Any = seen) -> None:
            seen.append(config)

        try:
            run_training("some", config_class, train, "", [*argv, "--run-dir", str(tmp_path / "never")])
        except SystemExit as stop:
            assert stop.code == 2, argv  # noqa: PT017 - not every draw is a mistake
            assert re.fullmatch("error: [^\n]+\n", capfd.readouterr().err), argv
            continue
        (config,) = seen
        good += 1
        for field in fields:
            value, limits = getattr(config, field.name), field.metadata["limits"]
            for each in value if isinstance(value, tuple) else [value]:
                if isinstance(each, int | float):
                    assert limits["at_least"] is None or each >= limits["at_least"], (argv, field.name)
                    assert limits["at_most"] is None or each <= limits["at_most"], (argv, field.name)
                    assert limits["above"] is None or each > limits["above"], (argv, field.name)
                    assert abs(each) < math.inf, (argv, field.name)
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        save_config(run_dir, "some", config)
        assert saved_config(config_class, run_dir, load_settings(run_dir)) == config, argv
    assert 40 < good < 160, "both kinds are drawn"
    assert not (tmp_path / "never").exists()
