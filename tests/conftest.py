"""Hooks and fixtures for all tests."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

DEVICES = ("cpu", "cuda")
PATIENCE = 600  # seconds, on a machine that also does other work; the slowest test takes a sixth of that


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=DEVICES, default="cpu", help="where tests that take a device run")


def pytest_configure() -> None:
    """Let the tests and the processes that they start receive SIGHUP: under `nohup` they would not."""
    if sys.platform != "win32":
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a device other than the CPU, run only the tests that take a device."""
    if config.getoption("--device") != "cpu":
        items[:] = [item for item in items if "device" in getattr(item, "fixturenames", ())]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device to train, evaluate and draw on: `--device`."""
    name: str = request.config.getoption("--device")
    return name


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the last part of compiling, the C++; tracing and guards stay the same."""
    import torch  # only when needed: it takes seconds

    torch_compile = torch.compile

    def traced(function: Any, *, fullgraph: bool, options: dict[str, Any]) -> Any:
        conditions = {"guard_filter_fn": options["guard_filter_fn"]}
        return torch_compile(function, backend="eager", fullgraph=fullgraph, options=conditions)

    monkeypatch.setattr(torch, "compile", traced)


@pytest.fixture(autouse=True)
def _no_test_hangs() -> Iterator[None]:
    if sys.platform == "win32":  # it has no such clock
        yield
        return

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the test hung for {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def small_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of small runs: `grid`, `dqn`, `ppo` (both on CartPole) and `breakout`."""
    from minirl.dqn import DQNConfig
    from minirl.dqn import train as train_dqn
    from minirl.ppo import PPOConfig
    from minirl.ppo import train as train_ppo
    from minirl.q_learning import QLearningConfig
    from minirl.q_learning import train as train_q

    path = tmp_path_factory.mktemp("runs")
    train_q(QLearningConfig(num_episodes=300), run_dir=path / "grid")
    steps: dict[str, Any] = {"total_timesteps": 600, "learning_starts": 200, "eval_frequency": 200}
    games: dict[str, Any] = {"eval_episodes": 2, "confirm_episodes": 2}
    train_dqn(DQNConfig(**steps, **games, compile=False), run_dir=path / "dqn", device="cpu")
    train_ppo(
        PPOConfig(env_id="CartPole-v1", num_steps=32, total_timesteps=2048, learning_rate=3e-3),
        run_dir=path / "ppo",
        device="cpu",
    )
    tiny: dict[str, Any] = {"num_envs": 1, "num_steps": 8, "minibatch_size": 8, "update_epochs": 4}
    config = PPOConfig(env_id="BreakoutNoFrameskip-v4", frame_size=42, total_timesteps=8, learning_rate=0.003, **tiny)
    train_ppo(config, run_dir=path / "breakout", device="cpu")
    return path
