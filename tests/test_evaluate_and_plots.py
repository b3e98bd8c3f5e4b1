"""Playing games with a saved network, and recording one."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from minirl import evaluate as evaluation
from minirl.dqn import DQNConfig
from minirl.dqn import train as train_dqn
from minirl.envs.episode import EpisodeStatistics
from minirl.envs.vector import VectorEnv
from minirl.evaluate import evaluate
from minirl.ppo import PPOConfig, train
from minirl.results.play import play_games
from minirl.runs.directory import save_config
from minirl.scripts.train import run_training
from tests.fake_envs import Counter


@pytest.fixture(scope="module")
def cartpole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("cartpole") / "run"
    train(PPOConfig(env_id="CartPole-v1", num_steps=32, total_timesteps=512), run_dir=run_dir, device="cpu")
    return run_dir


@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_an_environment_may_change_the_working_directory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: Any = {
        "ppo": PPOConfig(env_id="tests.fake_envs:Wanderer-v0", num_steps=8, minibatch_size=64, total_timesteps=64),
        "dqn": DQNConfig(
            env_id="tests.fake_envs:Wanderer-v0", total_timesteps=40, buffer_size=40, learning_starts=20, batch_size=8
        ),
    }[name]
    train_it: Any = {"ppo": train, "dqn": train_dqn}[name]
    more = [] if name == "ppo" else ["--run-dir", "b", "--learning-starts", "20"]
    flags = ["--env-id", config.env_id, "--total-timesteps", str(2 * config.total_timesteps), "--device", "cpu"]
    for use in (
        lambda: train_it(config, run_dir="run", device="cpu"),
        lambda: evaluate("run", episodes=1, video="game.gif"),
        lambda: evaluation.main(["run", "--episodes", "1", "--video", "game.mp4"]),
        lambda: run_training(name, type(config), train_it, "", ["--resume", "run", *flags]),
        lambda: run_training(name, type(config), train_it, "", [*flags, *more]),
    ):
        monkeypatch.chdir(tmp_path)
        use()
    monkeypatch.chdir(tmp_path)
    assert {"run", "game.gif", "game.mp4", "runs" if name == "ppo" else "b"} == {path.name for path in Path().iterdir()}


@pytest.fixture(scope="module")
def breakout_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("breakout") / "run"
    tiny: Any = {"num_envs": 1, "num_steps": 8, "minibatch_size": 8, "total_timesteps": 8, "update_epochs": 1}
    config = PPOConfig(env_id="BreakoutNoFrameskip-v4", frame_size=42, **tiny)
    train(config, run_dir=run_dir, device="cpu")
    return run_dir


class Numbered:
    """Makes environments whose episodes last 2, 3, 4, ... steps, one after the other, and pay 1, 2, 3, ..."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> EpisodeStatistics:
        self.made += 1
        return EpisodeStatistics(Counter(ends_at=self.made + 1))


def always_0(observations: NDArray[Any]) -> NDArray[np.int64]:
    return np.zeros(len(observations), np.int64)


def test_each_environment_plays_its_share_so_that_short_games_are_not_favoured() -> None:
    with VectorEnv(Numbered(), 3, num_workers=1) as envs:
        # 1 + 2, 1 + 2 + 3 and 1 + 2 + 3 + 4; the first environment could play four games in the time of the third's two
        assert play_games(always_0, envs, 5, seed=0) == [3.0, 3.0, 6.0, 6.0, 10.0]


def test_evaluate_reports_the_statistics_of_its_games(cartpole_run: Path, device: str) -> None:
    result = evaluate(cartpole_run, episodes=11, stochastic=True, device=device)
    returns = result["returns"]
    assert len(returns) == result["episodes"] == 11
    assert result["mean_return"] == pytest.approx(np.mean(returns))
    assert result["std_return"] == pytest.approx(np.std(returns))
    assert (result["min_return"], result["max_return"]) == (min(returns), max(returns))
    assert min(returns) >= 8.0
    assert len(set(returns)) > 1


def test_a_seed_gives_the_same_games_and_greedy_is_not_sampled(cartpole_run: Path, device: str) -> None:
    def returns(**options: Any) -> list[float]:
        result: list[float] = evaluate(cartpole_run, episodes=4, device=device, **options)["returns"]
        return result

    assert returns(seed=1) == returns(seed=1)
    assert returns(seed=1, stochastic=True) == returns(seed=1, stochastic=True)
    assert returns(seed=1) != returns(seed=1, stochastic=True)
    assert returns(seed=1) != returns(seed=2)
    assert returns() == returns(seed=42 + 10_000), "by default other games than those of the training"


def test_what_plays_does_not_learn(cartpole_run: Path, device: str) -> None:
    with contextlib.closing(gym.make("CartPole-v1")) as env:
        agent = evaluation.ppo_agent(cartpole_run, env.observation_space, env.action_space, torch.device(device))
    assert not agent.training, "or dropout would be on, and batch norm would learn"


def test_atari_scores_are_of_whole_games_and_unclipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PPOConfig(
        env_id="SpaceInvadersNoFrameskip-v4",
        frame_size=42,
        num_envs=1,
        num_steps=8,
        minibatch_size=8,
        total_timesteps=8,
        update_epochs=1,
    )
    train(config, run_dir=tmp_path / "run", device="cpu")
    seen: list[tuple[bool, float]] = []
    step = VectorEnv.step

    def spy(envs: VectorEnv, actions: NDArray[np.int64]) -> Any:
        result = step(envs, actions)
        seen.append((bool(result.terminated[0]), float(result.rewards[0])))
        return result

    monkeypatch.setattr(VectorEnv, "step", spy)
    (score,) = evaluate(tmp_path / "run", episodes=1, stochastic=True, seed=3)["returns"]
    assert sum(lost for lost, _ in seen) == 3, "a game of Space Invaders has three lives"
    hits = sum(reward for _, reward in seen)
    assert score >= 5 * hits > 0, "an invader pays 5 points or more, and the learner is told 1"


def test_the_command_prints_json_or_a_line(cartpole_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation.main([str(cartpole_run), "--episodes", "3", "--json", "--seed", "1"])
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == ["mean_return", "std_return", "min_return", "max_return", "episodes", "returns"]
    assert printed == evaluate(cartpole_run, episodes=3, seed=1)
    evaluation.main([str(cartpole_run), "--episodes", "3", "--seed", "1"])
    line = capsys.readouterr().out
    assert line.startswith(f"return over 3 games, greedy actions: mean {printed['mean_return']:.2f}, ")
    assert line.count("\n") == 1


def test_a_video_plays_in_colour(breakout_run: Path, tmp_path: Path) -> None:
    evaluate(breakout_run, episodes=1, stochastic=True, video=tmp_path / "game.mp4", seed=3)
    video = cv2.VideoCapture(str(tmp_path / "game.mp4"))
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(15.0)
    frames = []
    readable, frame = video.read()
    while readable:
        frames.append(frame)
        readable, frame = video.read()
    assert frames[0].shape == (210, 160, 3)
    assert len(frames) > 100, "a whole game, not one life"
    blue, green, red = np.asarray(frames[5], int)[57:63, 20:140].mean(axis=(0, 1))  # the topmost row of bricks is red
    assert red > green + 50 > blue


@pytest.fixture(scope="module")
def mistaken(cartpole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with runs that can't be played, or not be drawn."""
    parent = tmp_path_factory.mktemp("mistaken")
    for name, algorithm, config in [
        ("empty", "ppo", PPOConfig(env_id="CartPole-v1")),
        ("other", "sarsa", PPOConfig(env_id="CartPole-v1")),
        ("changed", "ppo", PPOConfig(env_id="Acrobot-v1")),
    ]:
        (parent / name).mkdir()
        save_config(parent / name, algorithm, config)
    shutil.copy(cartpole_run / "checkpoint.pt", parent / "changed")
    shutil.copytree(cartpole_run, parent / "derived")
    saved = torch.load(cartpole_run / "checkpoint.pt")
    assert saved["network_class"] == "ActorCritic"
    torch.save({**saved, "network_class": "Residual"}, parent / "derived" / "checkpoint.pt")
    config = PPOConfig(env_id="tests.fake_envs:Counter-v0", num_steps=8, minibatch_size=8, total_timesteps=64)
    train(config, run_dir=parent / "drawless", device="cpu")
    return parent


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nowhere", "nowhere must be a run directory, and has no config.json"),
        ("{run} --episodes 0", "--episodes must be a whole number from 1 to 1000000000000, not 0"),
        ("{run} --episodes x", "--episodes: must be a whole number, not 'x'"),
        ("{run} --seed -1", "--seed must be a whole number from 0 to"),
        ("{run} --video game.avi", "--video must be a file that ends in .mp4"),
        ("{run} --video no/such/game.mp4", "in a directory that exists"),
        ("drawless --video game.mp4", "--video needs an environment that can be drawn"),
        ("{run} --device tpu", "--device must be auto, cpu or cuda"),
        ("empty", "there is no checkpoint here"),
        ("other", "must hold a run of ppo, dqn, q_learning or rlhf, not of sarsa"),
        (
            "changed",
            "changed/checkpoint.pt must be of a run as this one, and does not fit: RuntimeError: size mismatch",
        ),
        (
            "derived",
            "derived/checkpoint.pt must be of a run as this one, and has the network Residual, not ActorCritic: make",
        ),
        ("", "the following arguments are required: RUN_DIR"),
    ],
)
def test_mistakes(
    line: str,
    message: str,
    cartpole_run: Path,
    mistaken: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(mistaken)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluation.main(line.format(run=cartpole_run).split())
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert message in output.err
