"""Small environments that can be made in worker processes: `env_id` "tests.fake_envs:Name-v0"."""

import os
import random
import signal
import sys
import time
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from minirl.envs.episode import EpisodeStatistics

Step = tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]


class Counter(gym.Env[Any, Any]):
    """Observes (episode, step, seed of the first reset, last action); pays the step; terminates or truncates on cue."""

    def __init__(
        self, ends_at: int | None = None, cut_at: int | None = None, start: int = 0, reseeded: bool = False
    ) -> None:
        self.reseeded = reseeded
        self.observation_space: gym.Space[Any] = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.action_space: gym.Space[Any] = gym.spaces.Discrete(2, start=start)
        self.ends_at = ends_at
        self.cut_at = cut_at
        self.episode = -1
        self.first_seed: int | None = None
        self.last_action = -1

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        if self.episode == -1:
            self.first_seed = seed
        else:
            assert seed is None or self.reseeded, "only the first reset may be seeded"
        self.episode += 1
        self.count = 0
        return self._obs(), {}

    def step(self, action: int) -> Step:
        assert self.action_space.contains(action)
        self.last_action = action
        self.count += 1
        return self._obs(), float(self.count), self.count == self.ends_at, self.count == self.cut_at, {}

    def _obs(self) -> NDArray[np.float32]:
        seed = -1 if self.first_seed is None else self.first_seed
        return np.array([self.episode, self.count, seed, self.last_action], np.float32)


def counter(ends_at: int | None = None, cut_at: int | None = None, start: int = 0) -> gym.Env[Any, Any]:
    return EpisodeStatistics(Counter(ends_at, cut_at, start))


class TorchDetector(Counter):
    """Observes 1 if its process has loaded torch, else 0, and the number of its process."""

    def _obs(self) -> NDArray[np.float32]:
        return np.array([float("torch" in sys.modules), os.getpid() % 2**20, 0, 0], np.float32)


class Faulty(Counter):
    """Does something bad at its third step."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def step(self, action: int) -> Step:
        if self.count == 2:
            if self.fault == "raise":
                raise ArithmeticError("the pole snapped")
            if self.fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "hang up":
                raise EOFError("the game server hung up")
            if self.fault == "exit":
                sys.exit(3)
        return super().step(action)


class EndsInReset(gym.Wrapper[Any, Any, Any, Any]):
    """Finishes an episode in each reset but the first, as an Atari game can in a no-op after a lost life."""

    def __init__(self) -> None:
        super().__init__(counter(ends_at=1))
        self.resets = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        obs, info = self.env.reset(seed=seed)
        self.resets += 1
        if self.resets > 1:
            self.env.step(0)
            obs, info = self.env.reset()
        return obs, info


class Stuck(Counter):
    """Never returns from its first step."""

    def step(self, action: int) -> Step:
        time.sleep(1000)
        return super().step(action)


class Unmakable(Counter):
    def __init__(self) -> None:
        raise FileNotFoundError("no such level")


class Echo(gym.Env[Any, Any]):
    """Shows the action that it was given, and keeps it; pays its sum. Truncated after 5 steps.

    Args:
        space: of actions.
    """

    def __init__(self, space: gym.Space[Any]) -> None:
        self.action_space = space
        size = int(np.prod(space.shape or ()))
        self.observation_space: gym.Space[Any] = gym.spaces.Box(-np.inf, np.inf, (size,), np.float64)
        self.kept: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.kept = []
        return np.zeros(self.observation_space.shape or ()), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert type(action) is np.ndarray, "as from a space's `sample`"
        assert (action.shape, action.dtype) == (self.action_space.shape, self.action_space.dtype)
        assert np.isnan(action).any() or self.action_space.contains(action)
        assert all(np.array_equal(one, other) for one, other in self.kept), "it is the environment's own"
        self.kept.append((action, action.copy()))
        obs = action.flatten().astype(np.float64)
        return obs, float(obs.sum()), False, len(self.kept) == 5, {}


ACTIONS: dict[str, gym.Space[Any]] = {
    "One": gym.spaces.Box(-2, 2, (1,)),
    "Six": gym.spaces.Box(
        np.array([-1, 0, -0.1, 0.2, -9, 0], np.float32), np.array([1, 0.5, 0.1, 9, -8, 3], np.float32)
    ),
    "Table": gym.spaces.Box(-0.5, 0.5, (2, 3), np.float64),
    "Single": gym.spaces.Box(-1, 1, ()),
    "Unbounded": gym.spaces.Box(
        np.array([-np.inf, -1, -np.inf], np.float32), np.array([np.inf, np.inf, 1], np.float32)
    ),
    "Choices": gym.spaces.MultiDiscrete([2, 5, 3]),
    "Started": gym.spaces.MultiDiscrete(np.array([[2, 4]]), np.int32, start=np.array([[7, -3]])),
    "Bits": gym.spaces.MultiBinary(4),
    "BitTable": gym.spaces.MultiBinary((2, 2)),
}
REFUSED: dict[str, gym.Space[Any]] = {
    "Dict": gym.spaces.Dict({"a": gym.spaces.Discrete(2)}),
    "Tuple": gym.spaces.Tuple([gym.spaces.Discrete(2)]),
    "Text": gym.spaces.Text(4),
    "Bytes": gym.spaces.Box(0, 255, (3,), np.uint8),
    "Nothing": gym.spaces.Box(0, 1, (0,)),
}
for space_name, action_space in {**ACTIONS, **REFUSED}.items():
    gym.register(f"{space_name}Actions-v0", "tests.fake_envs:Echo", kwargs={"space": action_space})


class SmallPicture(Counter):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)


class OtherObservations(Counter):
    """The count in other forms: a vector of bytes or of doubles, or a picture whose channels are colours."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        super().__init__(ends_at=7)
        self.observation_space = gym.spaces.Box(0, 255, shape, dtype)

    def _obs(self) -> NDArray[Any]:
        obs = np.full(self.observation_space.shape or (), self.count, self.observation_space.dtype)
        if obs.ndim == 3:
            obs += np.array([0, 100, 200], np.uint8)[:, None, None]
        return obs


class Drawn(Counter):
    """Shows its step, action, episode and seed in three stripes of a picture; drawing takes global random numbers."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012 - Gymnasium's own way

    def __init__(self, ends_at: int | None = None, render_mode: str | None = None) -> None:
        super().__init__(ends_at, reseeded=True)
        self.render_mode = render_mode

    def render(self) -> NDArray[np.uint8]:
        random.random()
        np.random.random()  # noqa: NPY002
        picture = np.zeros((35, 51, 3), np.uint8)
        picture[:, :17] = 10 * self.count, 200, 30
        picture[:, 17:34] = 80, 100 * (self.last_action + 1), 60
        picture[:, 34:] = 20, (self.first_seed or 0) % 256, 90 * self.episode
        return picture


class Growing(Drawn):
    """Its pictures become larger as it plays."""

    def render(self) -> NDArray[np.uint8]:
        return np.pad(super().render(), ((0, self.count), (0, 0), (0, 0)))


class Wanderer(Drawn):
    """Changes the working directory, like simulators that look for their files."""

    def __init__(self, ends_at: int | None = None, render_mode: str | None = None) -> None:
        super().__init__(ends_at, render_mode)
        os.chdir("/")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        os.chdir("/proc")
        return super().reset(seed=seed)


gym.register("Wanderer-v0", "tests.fake_envs:Wanderer", kwargs={"ends_at": 20})
gym.register("Drawn-v0", "tests.fake_envs:Drawn", kwargs={"ends_at": 20})
gym.register("Growing-v0", "tests.fake_envs:Growing", kwargs={"ends_at": 20})
gym.register("DrawnForEver-v0", "tests.fake_envs:Drawn")
gym.register("Uint8Vector-v0", "tests.fake_envs:OtherObservations", kwargs={"shape": (5,), "dtype": np.uint8})
gym.register("Float64Vector-v0", "tests.fake_envs:OtherObservations", kwargs={"shape": (5,), "dtype": np.float64})
gym.register("Colours-v0", "tests.fake_envs:OtherObservations", kwargs={"shape": (3, 40, 40), "dtype": np.uint8})
gym.register("Counter-v0", "tests.fake_envs:Counter", kwargs={"ends_at": 7})
gym.register("Reseeded-v0", "tests.fake_envs:Counter", kwargs={"ends_at": 7, "reseeded": True})
gym.register("Endless-v0", "tests.fake_envs:Counter", kwargs={"cut_at": 5})
gym.register("Faulty-v0", "tests.fake_envs:Faulty", kwargs={"fault": "raise"})
gym.register("Unmakable-v0", "tests.fake_envs:Unmakable")
gym.register("SmallPicture-v0", "tests.fake_envs:SmallPicture")
