"""A killed and resumed run ends like the same run left alone: every bit of what it learned and counted."""

import dataclasses
import math
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from minirl import dqn, ppo, q_learning, rlhf
from minirl.checks import ConfigError
from minirl.envs.vector import VectorEnv
from minirl.fast.compiled import compiled
from minirl.runs.checkpoints import (
    BEST_FILE,
    TAKEN,
    DivergedError,
    load_checkpoint,
    load_parts,
    load_weights,
    require_finite,
    save_checkpoint,
    save_parts,
)
from minirl.runs.losses import RecentLosses, mean_losses
from minirl.runs.run import Run
from minirl.scripts.train import run_training
from tests.scalars import read_scalars

ROOT = Path(__file__).parent.parent
NOT_COMPARED = {"seconds", "memory", "path"}  # the clock, and which files these are

PPO_CARTPOLE = ppo.PPOConfig(
    env_id="CartPole-v1",
    num_steps=16,
    total_timesteps=1024,
    minibatch_size=64,
    anneal_lr=True,
    checkpoint_frequency=256,
)
PPO_PONG = ppo.PPOConfig(
    num_envs=3, num_steps=16, minibatch_size=48, update_epochs=1, total_timesteps=480, checkpoint_frequency=48
)
DQN_CARTPOLE = dqn.DQNConfig(
    total_timesteps=600,
    buffer_size=240,
    batch_size=16,
    learning_starts=60,
    train_frequency=2,
    eval_frequency=200,
    eval_episodes=2,
    confirm_episodes=4,
    checkpoint_frequency=100,
)
DQN_PONG = dataclasses.replace(
    DQN_CARTPOLE,
    env_id="PongNoFrameskip-v4",
    num_envs=2,
    num_workers=1,
    buffer_size=60,
    batch_size=4,
    learning_starts=40,
    train_frequency=20,
    total_timesteps=160,
    eval_frequency=None,
    checkpoint_frequency=50,
)
Q_GRID = q_learning.QLearningConfig(num_episodes=150, checkpoint_frequency=30)
SMALL: dict[str, Any] = {"width": 8, "num_layers": 1, "num_heads": 2, "minibatch_size": 4, "kl_target": 5.0}
BATCHES: dict[str, Any] = {"lm_batch_size": 8, "reward_batch_size": 8, "batch_size": 8, "reward_epochs": 2}
RLHF = rlhf.RLHFConfig(lm_steps=12, num_pairs=48, num_episodes=96, checkpoint_frequency=16, **SMALL, **BATCHES)

# In 256 steps: cut after 200, in the middle of the first, ended after some 20 each, in the middle of the first.
NORMALISED = dataclasses.replace(
    PPO_CARTPOLE, num_envs=2, norm_obs=True, norm_reward=True, num_steps=32, total_timesteps=512
)
CONTINUOUS = ("Pendulum-v1", "MountainCarContinuous-v0", "Hopper-v5", "HalfCheetah-v5")

RUNS: list[Any] = [
    ("ppo", ppo.train, PPO_CARTPOLE),
    pytest.param("ppo", ppo.train, PPO_PONG, marks=pytest.mark.slow),  # tests/test_recomputed.py has the quick one
    ("dqn", dqn.train, DQN_CARTPOLE),
    ("dqn", dqn.train, dataclasses.replace(DQN_CARTPOLE, num_envs=3, target_network_episodes=2, tau=1.0)),
    ("dqn", dqn.train, DQN_PONG),
    pytest.param("dqn", dqn.train, dataclasses.replace(DQN_CARTPOLE, compile=True), marks=pytest.mark.slow),
    pytest.param(
        "ppo", ppo.train, dataclasses.replace(PPO_CARTPOLE, compile=True, anneal_clip=True), marks=pytest.mark.slow
    ),
    # It acts compiled, too; halves of the same size, since each size is compiled.
    pytest.param(
        "ppo",
        ppo.train,
        dataclasses.replace(PPO_PONG, compile=True, num_envs=2, minibatch_size=32, total_timesteps=320),
        marks=pytest.mark.slow,
    ),
    ("q_learning", q_learning.train, Q_GRID),
    *(("ppo", ppo.train, dataclasses.replace(NORMALISED, env_id=env_id, num_workers=1)) for env_id in CONTINUOUS),
    pytest.param(
        "ppo",
        ppo.train,
        dataclasses.replace(NORMALISED, env_id="HalfCheetah-v5", num_workers=2),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "ppo", ppo.train, dataclasses.replace(NORMALISED, env_id="Hopper-v5", compile=True), marks=pytest.mark.slow
    ),
    ("rlhf", rlhf.train, RLHF),
]


@pytest.fixture(autouse=True)
def _few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minirl.texts.REVIEWS", 100)
    monkeypatch.setattr("minirl.rlhf.HELD_OUT", 16)


class Killed(BaseException):
    """What a killed run sees: nothing is saved on the way out."""


def assert_same(one: Any, other: Any, path: str = "") -> None:
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one.keys() - NOT_COMPARED:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, (item, other_item) in enumerate(zip(one, other, strict=True)):
            assert_same(item, other_item, f"{path}/{i}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


def train_with_kills(
    train: Callable[..., Any],
    config: Any,
    run_dir: Path,
    calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
    device: str = "cpu",
) -> None:
    """Train, killed after so many calls of `Run.checkpoint` each time, which mostly save nothing."""
    checkpoint = Run.checkpoint
    for number, left in enumerate([*calls, None]):
        countdown = [left]

        def counted(run: Run, *arguments: Any, countdown: Any = countdown, **options: Any) -> None:
            checkpoint(run, *arguments, **options)
            if countdown[0] is not None:
                countdown[0] -= 1
                if countdown[0] < 0:
                    raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Run, "checkpoint", counted)
            try:
                train(config, run_dir=run_dir, resume=number > 0, device=device)
            except Killed:
                continue
            assert number or left is None, "the first kill must fall into the run"
    assert left is None


@pytest.mark.parametrize(("algorithm", "train", "config"), RUNS)
def test_a_killed_run_ends_as_one_left_alone(
    algorithm: str, train: Any, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    train(config, run_dir=tmp_path / "alone", device=device)
    rng = np.random.default_rng(0)
    if algorithm == "ppo":
        calls = config.num_updates // 2
    else:
        calls = (config.total_timesteps // config.num_envs if algorithm == "dqn" else config.num_episodes) // 3
    # Each of its sessions compiles anew, or loads games.
    times = 1 if getattr(config, "compile", None) or config is DQN_PONG else 2
    kills = [int(rng.integers(1, calls)) for _ in range(times)] + [0]  # the last one at once
    kills = [5, 13, 13, 0] if algorithm == "rlhf" else kills  # into each of its three stages
    train_with_kills(train, config, tmp_path / "killed", kills, monkeypatch, device)
    alone, killed = (load_checkpoint(tmp_path / name, algorithm) for name in ("alone", "killed"))
    assert_same(alone, killed)
    logged = [read_scalars(tmp_path / name) for name in ("alone", "killed")]
    for tag in logged[0].keys() - {"charts/SPS", "charts/minutes"}:
        assert logged[0][tag] == logged[1][tag], f"{tag}: means over updates go on, too"
    if algorithm == "dqn" and config.env_id == "CartPole-v1":
        one, other = (load_checkpoint(tmp_path / name, algorithm, file=BEST_FILE) for name in ("alone", "killed"))
        assert_same(one, other)


@pytest.mark.parametrize(
    ("algorithm", "train", "config"),
    [
        RUNS[0],
        RUNS[1],
        RUNS[2],
        RUNS[3],
        pytest.param(*RUNS[4], marks=pytest.mark.slow),
        RUNS[5],
        pytest.param(*RUNS[-1], marks=pytest.mark.slow),
    ],
)
def test_checkpoints_change_nothing(algorithm: str, train: Any, config: Any, tmp_path: Path) -> None:
    train(config, run_dir=tmp_path / "often", device="cpu")
    train(dataclasses.replace(config, checkpoint_frequency=10**9), run_dir=tmp_path / "never", device="cpu")
    often, never = (load_checkpoint(tmp_path / name, algorithm) for name in ("often", "never"))
    assert_same(often, never)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (
            "ppo",
            "--env-id Hopper-v5 --num-envs 2 --num-steps 64 --minibatch-size 64 --total-timesteps 8192 --norm-obs "
            "--norm-reward",
        ),
        ("ppo", "--env-id CartPole-v1 --num-steps 16 --minibatch-size 64 --total-timesteps 8192"),
        (
            "dqn",
            "--total-timesteps 6000 --buffer-size 2000 --eval-frequency 2000 --eval-episodes 2 --confirm-episodes 4",
        ),
    ],
)
def test_sigkill_at_any_moment(script: str, flags: str, tmp_path: Path) -> None:
    """A real process and SIGKILL: after any kill there is a checkpoint, and the end is the same."""
    always = ["--device", "cpu", "--final-games", "0"]
    command = [sys.executable, f"train_{script}.py", *always]
    settings = [*flags.split(), "--checkpoint-frequency", "200"]
    module: Any = {"ppo": ppo, "dqn": dqn}[script]
    config_class = {"ppo": ppo.PPOConfig, "dqn": dqn.DQNConfig}[script]
    run_training(script, config_class, module.train, "", [*always, *settings, "--run-dir", str(tmp_path / "alone")])
    run_dir = tmp_path / "killed"
    arguments = [*settings, "--run-dir", str(run_dir)]
    rng = random.Random(0)
    for sessions in (1, 2):
        process = subprocess.Popen([*command, *arguments], cwd=ROOT)
        # Each session has a file of events, and the first one soon has a checkpoint.
        while process.poll() is None and (
            len([*run_dir.glob("events*[0-9]")]) < sessions or not (run_dir / "checkpoint.pt").exists()
        ):
            time.sleep(0.01)
        time.sleep(rng.random())
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0)
        load_checkpoint(run_dir, script)
        arguments = ["--resume", str(run_dir)]
    subprocess.run([*command, *arguments], cwd=ROOT, check=True)
    assert_same(load_checkpoint(tmp_path / "alone", script), load_checkpoint(run_dir, script))


@pytest.mark.slow
def test_sigkill_in_each_stage_of_rlhf(tmp_path: Path) -> None:
    flags = "--width 8 --num-heads 2 --lm-steps 150 --num-pairs 512 --num-episodes 1024 --checkpoint-frequency 128"
    command = [sys.executable, "train_rlhf.py", "--device", "cpu", "--final-games", "0"]
    alone, run_dir = tmp_path / "alone", tmp_path / "killed"
    subprocess.run([*command, *flags.split(), "--run-dir", str(alone)], cwd=ROOT, check=True)
    arguments = [*flags.split(), "--run-dir", str(run_dir)]
    # Of 150 x 32 texts of the language model, 2 x 512 of pairs, and 1024 that are written.
    for step in (2_000, 5_200, 6_200):
        with subprocess.Popen([*command, *arguments], cwd=ROOT) as process:
            try:
                while (
                    not (run_dir / "checkpoint.pt").exists() or load_checkpoint(run_dir, "rlhf")["global_step"] < step
                ):
                    assert process.poll() is None
                    time.sleep(0.1)
            finally:
                process.kill()
        arguments = ["--resume", str(run_dir)]
    subprocess.run([*command, *arguments], cwd=ROOT, check=True)
    assert_same(load_checkpoint(alone, "rlhf"), load_checkpoint(run_dir, "rlhf"))


def test_games_that_cannot_be_saved_are_said_so_once_and_start_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []
    reset = VectorEnv.reset

    def spy(envs: VectorEnv, seed: int | None = None) -> Any:
        seeds.append(seed)
        return reset(envs, seed)

    monkeypatch.setattr(VectorEnv, "reset", spy)
    config = dataclasses.replace(PPO_PONG, env_id="ALE/Pong-v5", total_timesteps=96, num_workers=1)
    for total in (96, 144):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default", UserWarning)  # as outside of tests: once for each text
            more = dataclasses.replace(config, total_timesteps=total)
            ppo.train(more, run_dir=tmp_path / "run", resume=total > 96, device="cpu")
        texts = [str(warning.message) for warning in caught if "new episodes" in str(warning.message)]
        assert len(texts) == 1, "three checkpoints, one warning"
        assert "a resumed run will start new episodes, for these can't be saved: with sticky actions" in texts[0]
    saved = load_checkpoint(tmp_path / "run", "ppo")
    assert (saved["envs"], saved["global_step"]) == (None, 144)
    assert seeds[0] == config.seed
    assert len(set(seeds)) == 2, "the new episodes are others"


def test_a_memory_of_another_run_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(DQN_CARTPOLE, total_timesteps=300)
    dqn.train(config, run_dir=tmp_path / "run", device="cpu")
    more = dataclasses.replace(config, total_timesteps=400)
    files = sorted((tmp_path / "run").glob("memory-*.npz"))
    files[-1].write_bytes(b"no zip file")
    with pytest.raises(ConfigError, match=r"memory-200-300\.npz must be part of this run's memory"):
        dqn.train(more, run_dir=tmp_path / "run", resume=True, device="cpu")
    files[-1].unlink()
    with pytest.raises(ConfigError, match=r"memory-200-300\.npz must be part of this run's memory"):
        dqn.train(more, run_dir=tmp_path / "run", resume=True, device="cpu")


def test_a_memory_is_not_written_twice_and_old_files_go(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".memory-0-100.npz.tmp").write_text("left by a kill in the middle of writing")
    dqn.train(DQN_CARTPOLE, run_dir=tmp_path / "run", device="cpu")
    assert not list((tmp_path / "run").glob(".*"))
    names = sorted(path.name for path in (tmp_path / "run").glob("memory-*.npz"))
    # Of 600 transitions, 240 are remembered; the file before them belonged to the checkpoint before.
    assert names == [f"memory-{start}-{start + 100}.npz" for start in (200, 300, 400, 500)]


def test_what_a_checkpoint_lacks_is_named() -> None:
    """For example, a second network, in a checkpoint from before the edit that added it."""
    parts = {"model": nn.Linear(1, 1), "predictor": nn.Linear(1, 1)}
    line = "^there/checkpoint.pt must be of a run as this one, and has no predictor$"
    with pytest.raises(ConfigError, match=line):
        load_parts(parts, {"model": parts["model"].state_dict(), "path": "there/checkpoint.pt"})


class WarmedUp(torch.optim.SGD):
    """SGD with steps that grow for a while. PyTorch itself saves nothing of `steps`."""

    def __init__(self, weights: Any, lr: float, warm_up: int) -> None:
        super().__init__(weights, lr)
        self.warm_up, self.largest = warm_up, torch.zeros(())
        self._slow = [torch.zeros(2), torch.zeros(1)]
        self.weights, self.owner = [*self.param_groups[0]["params"]], object()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps = getattr(self, "steps", 0) + 1
        self.largest.fill_(min(1, self.steps / self.warm_up))
        for group in self.param_groups:
            for weight in group["params"]:
                weight.sub_(group["lr"] * self.largest * weight.grad)


@pytest.mark.usefixtures("without_inductor")
def test_what_an_own_optimiser_counts_is_saved_and_a_line_says_that_it_is_not_compiled() -> None:
    def step(network: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        network.weight.sum().backward()
        optimizer.step()

    def begun() -> tuple[nn.Linear, WarmedUp]:
        network = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(network.weight)
        return network, WarmedUp(network.parameters(), 1.0, 4)

    network, optimizer = begun()
    call = compiled(step, network, optimizer)
    with pytest.warns(UserWarning, match="not compiled: the optimiser's `step` sets `steps`, which is lost"):
        call()
    call()
    optimizer._slow[0] += 3
    with pytest.warns(UserWarning, match=r"the optimiser's `owner` can't be saved, and a resumed run makes it anew"):
        saved = save_parts({"optimizer": optimizer, "model": network})
    kept = saved["optimizer"]["attributes"]
    assert kept.keys() == {"warm_up", "largest", "_slow", "steps"}, "the weights are the network's"
    assert (kept["warm_up"], kept["steps"], kept["largest"].item()) == (4, 2, 0.5)
    network, optimizer = begun()
    load_parts({"optimizer": optimizer, "model": network}, {**saved, "path": "checkpoint.pt"})
    assert optimizer._slow[0].tolist() == [3, 3]
    step(network, optimizer)
    assert network.weight.item() == -(1 / 4 + 2 / 4 + 3 / 4)
    assert "attributes" not in save_parts({"optimizer": torch.optim.Adam(network.parameters())})["optimizer"]


def test_numbers_that_a_training_changes_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def begun() -> Any:
        network: Any = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
        network.ent_coef = 0.01
        return network

    network = begun()
    network.ent_coef = 0.02
    network[0].calls = 7
    saved = {**save_parts({"model": network}), "path": "checkpoint.pt"}
    for evaluated in (False, True):
        there = begun()
        if evaluated:
            load_weights(there, saved)
        else:
            load_parts({"model": there}, saved)
        assert (there.ent_coef, there[0].calls, there[1].p) == (0.02, 7, 0.5)
        assert capsys.readouterr().err == "ent_coef is 0.02, as it was saved, and not 0.01\n"


def test_an_optimiser_of_weights_in_another_order_is_refused() -> None:
    """It goes by their order, the network by their names: fused kernels would read beyond the moments' end."""
    ends = [nn.Linear(64, 2, bias=False), nn.Linear(2, 64, bias=False)]
    optimizers = [torch.optim.Adam([layer.weight for layer in order], fused=True) for order in (ends, ends[::-1])]
    torch.stack([layer.weight.sum() for layer in ends]).sum().backward()
    optimizers[0].step()
    saved = {**save_parts({"optimizer": optimizers[0]}), "path": "checkpoint.pt"}
    with pytest.raises(ConfigError, match="the optimiser is of a network of other shapes"):
        load_parts({"optimizer": optimizers[1]}, saved)


def test_a_part_has_a_name_of_its_own() -> None:
    with pytest.raises(ValueError, match="can't be called obs or returns: something else is"):
        load_parts({"model": nn.Linear(1, 1), "returns": nn.Linear(1, 1), "obs": nn.Linear(1, 1)}, None)


@pytest.mark.parametrize(
    ("module", "config"),
    [
        (ppo, ppo.PPOConfig("CartPole-v1", total_timesteps=64, num_envs=2, num_steps=32, minibatch_size=64)),
        (dqn, dqn.DQNConfig(total_timesteps=40, learning_starts=10, batch_size=8, eval_frequency=None)),
        (rlhf, rlhf.RLHFConfig(stage="lm", lm_steps=1, width=4, num_layers=1, num_heads=1)),
    ],
)
def test_no_part_can_have_the_name_of_what_a_checkpoint_holds_besides(
    module: Any, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: set[str] = set()
    load = module.load_parts

    def spy(learned: Any, saved: Any) -> None:
        parts.update(learned)
        load(learned, saved)

    monkeypatch.setattr(module, "load_parts", spy)
    module.train(config, run_dir=tmp_path / "run", device="cpu")
    besides = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True).keys() - parts
    assert besides <= TAKEN
    assert {"returns", "random_state"} <= besides


def test_numpys_numbers_are_saved_and_what_cannot_be_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"extra": {"mean": np.float64(0.5), "count": np.int32(3), "full": np.bool_(True)}})
    assert torch.load(path, weights_only=True) == {"extra": {"mean": 0.5, "count": 3, "full": True}}
    wrong = {"extra": {"queue": deque([1]), "list": [1, {"path": tmp_path}]}, "good": 1}
    named = r"extra\['queue'\] is a deque and extra\['list'\]\[1\]\['path'\] is a \w+; the file before is kept"
    with pytest.raises(ConfigError, match=named):
        save_checkpoint(path, wrong)
    assert torch.load(path, weights_only=True)["extra"]["count"] == 3


def test_what_is_not_finite_is_named_with_its_part() -> None:
    learned = {"model": {"weight": torch.tensor([math.nan])}, "extra": {"largest": torch.tensor(-math.inf)}}
    with pytest.raises(DivergedError, match=r"weight, extra\.largest not finite at agent step 0"):
        require_finite(learned, 0)


@pytest.mark.parametrize(
    ("algorithm", "train", "config", "message"),
    [
        ("ppo", ppo.train, PPO_CARTPOLE, r"losses/policy_loss is nan.*in update \d; the checkpoint before is kept"),
        ("dqn", dqn.train, DQN_CARTPOLE, r"losses/td_loss is (nan|inf).*in update \d+; the checkpoint before is kept"),
    ],
)
def test_a_run_that_diverges_stops_and_keeps_a_good_checkpoint(
    algorithm: str, train: Any, config: Any, message: str, tmp_path: Path
) -> None:
    wild = dataclasses.replace(config, learning_rate=1e37, checkpoint_frequency=1000)
    with pytest.raises(DivergedError, match=message):
        train(wild, run_dir=tmp_path / "run", device="cpu")
    saved = load_checkpoint(tmp_path / "run", algorithm)
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def logged(updates: list[list[float]]) -> list[dict[str, torch.Tensor]]:
    """What `gradient_step` of Double DQN returns in some updates."""
    names = ("td_loss", "q_values", "grad_norm")
    return [dict(zip(names, torch.tensor(numbers), strict=True)) for numbers in updates]


@pytest.mark.parametrize(
    ("number", "what"), [(torch.ones(3), r"of shape \(3,\)"), (0.5, "a float"), (np.float32(1), "a float32")]
)
def test_what_is_logged_of_a_step_is_a_tensor_of_one_number(number: Any, what: str) -> None:
    line = f"losses/mine must be a tensor of one number for each gradient step, not {what}"
    with pytest.raises(TypeError, match=line):
        recent([{"td_loss": torch.tensor(1.0), "mine": number}], before=0).means()
    with pytest.raises(TypeError, match=line):
        mean_losses([{"mine": number}] * 2)


def test_what_is_logged_is_the_number_of_each_step_not_the_last_one() -> None:
    temperature = torch.tensor(1.0)
    with pytest.raises(TypeError, match=r"losses/mine must be a new tensor at each gradient step: `clone\(\)` it"):
        mean_losses([{"mine": temperature}, {"mine": temperature.detach()}])


def test_what_is_logged_comes_from_each_step() -> None:
    steps = [{"td_loss": torch.tensor(1.0)}, {"td_loss": torch.tensor(2.0), "mine": torch.tensor(3.0)}]
    line = "losses/mine must be returned by each gradient step, not by some"
    for some in (steps, steps[::-1]):
        with pytest.raises(TypeError, match=line):
            mean_losses(some)
        with pytest.raises(TypeError, match=line):
            recent(some, before=0).means()


def test_a_count_that_is_logged_has_a_mean() -> None:
    counts = [{"mine": torch.tensor(1)}, {"mine": torch.tensor(4)}]
    assert mean_losses(counts) == recent(counts, before=0).means() == {"losses/mine": 2.5}


def recent(losses: list[dict[str, torch.Tensor]], before: int) -> RecentLosses:
    result = RecentLosses(torch.device("cpu"))
    result.steps = before
    for numbers in losses:
        result.append(numbers)
    return result


def test_the_update_is_named_at_which_the_loss_was_lost() -> None:
    good, bad, later = [1.0, 2.0, 3.0], [float("inf"), 2.0, 3.0], [1.0, float("nan"), 3.0]
    losses = logged([good] * 5 + [bad, later])
    with pytest.raises(DivergedError, match=r"diverged: losses/td_loss is inf in update 99;"):
        recent(losses, before=93).means()
    assert recent(losses[:5], before=93).means()["losses/td_loss"] == 1.0


def test_a_gradient_that_is_not_finite_is_named_though_the_loss_is() -> None:
    losses = logged([[1.0, 2.0, 3.0], [1.0, 2.0, float("inf")]])
    with pytest.raises(DivergedError, match=r"diverged: losses/grad_norm is inf in update 7;"):
        recent(losses, before=5).means()


def test_a_script_that_diverges_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--env-id CartPole-v1 --num-steps 16 --minibatch-size 64 --total-timesteps 2048 --learning-rate 1e37"
    with pytest.raises(SystemExit) as stop:
        run_training("ppo", ppo.PPOConfig, ppo.train, "", [*flags.split(), "--run-dir", str(tmp_path / "run")])
    assert stop.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: training has diverged: ")
