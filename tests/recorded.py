"""Environments that record each of their steps, and custom networks for them.

`env_id` "tests.recorded:Vectors-v0" and so on; stacks of frames are made by `frames`. If the environment variable
`STEPS_DIR` names a directory, each environment appends its steps to a file there, named after its seed, also in worker
processes. Observations are random enough to be unique, so that each can be traced to its step.
"""

import os
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minirl.envs.atari import FrameStack
from minirl.envs.episode import EpisodeStatistics
from minirl.networks import Categorical
from minirl.ppo import PPOConfig

SIDE = 44  # of an image: the CNN's last maps are 2 x 2
FRAMES = 4  # in a stack
EPISODE = 9  # steps until it is truncated


class Step(NamedTuple):
    """One step as an environment saw it; `number` in its episode, from 0."""

    number: int
    obs: Any
    action: Any
    reward: float
    next_obs: Any
    terminated: bool
    truncated: bool


class Recorded(gym.Env[Any, Any]):
    """A point on a line, pushed by the actions and at random; the episode terminates beyond 2, and is truncated after
    `EPISODE` steps. Rewards are random.

    Args:
        kind: what it shows, `vectors`, `frames` or `states`; `tiny`, vectors of 1e-5; `constant`, the same vector
            and the same reward in episodes of one step; or `pushed`, vectors, and takes two forces.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.action_space: gym.Space[Any] = gym.spaces.Discrete(3)
        if kind == "pushed":
            self.action_space = gym.spaces.Box(np.array([-1, -0.5]), np.array([1, 2]), dtype=np.float32)
        self.observation_space: gym.Space[Any] = {
            "frames": gym.spaces.Box(0, 255, (SIDE, SIDE), np.uint8),
            "states": gym.spaces.Discrete(8),
        }.get(kind, gym.spaces.Box(-np.inf, np.inf, (4,), np.float32))
        self.seed = -1
        self.position, self.number = 0.0, 0
        self.obs: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.seed = seed
            self._write("seeds", seed)
        self.position, self.number = 0.0, 0
        self.obs = self._show()
        return self.obs, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        force = float(action.sum()) if self.kind == "pushed" else action - 1
        self.position += 0.5 * force + self.np_random.normal(0, 0.3)
        reward = 0.1 if self.kind == "constant" else float(self.np_random.normal(0.3 * (force + 1), 1))
        before, self.obs = self.obs, self._show()
        terminated = self.kind == "constant" or abs(self.position) > 2
        truncated = self.number + 1 == EPISODE
        self._write(str(self.seed), Step(self.number, before, action, reward, self.obs, terminated, truncated))
        self.number += 1
        return self.obs, reward, terminated, truncated, {}

    def _show(self) -> Any:
        if self.kind == "states":
            return int(np.clip(round(2 * self.position), -4, 3)) + 4
        if self.kind == "constant":
            return np.full(4, 0.1, np.float32)
        if self.kind == "frames":
            return self.np_random.integers(0, 128 + int(30 * min(abs(self.position), 4)), (SIDE, SIDE), np.uint8)
        obs = np.array([self.position, self.number / 10, *self.np_random.normal(size=2)], np.float32)
        return obs * np.float32(1e-5) if self.kind == "tiny" else obs

    def _write(self, name: str, what: Any) -> None:
        if directory := os.environ.get("STEPS_DIR"):
            with (Path(directory) / name).open("ab") as file:
                pickle.dump(what, file)


def frames() -> gym.Env[Any, Any]:
    """As in Atari games, the frame stack is the outermost wrapper, so that the memory stores frames once."""
    return FrameStack(EpisodeStatistics(Recorded("frames")), FRAMES)


for name in ("vectors", "states", "tiny", "constant", "pushed"):
    gym.register(f"{name.capitalize()}-v0", "tests.recorded:Recorded", kwargs={"kind": name})


def read(path: Path) -> list[Any]:
    """All that was written to a file."""
    items = []
    if path.exists():
        with path.open("rb") as file:
            while file.peek(1):
                items.append(pickle.load(file))
    return items


def keep(path: Path, count: int) -> None:
    """Drop all but the first steps of a file: the rest was played after the checkpoint that a run resumes from."""
    steps = read(path)[:count]
    path.write_bytes(b"".join(pickle.dumps(step) for step in steps))


def shown(steps: list[Step]) -> tuple[NDArray[Any], NDArray[Any]]:
    """What a policy sees at each step, and after it: observations as they are, or stacks of frames."""
    if np.ndim(steps[0].obs) != 2:
        return np.stack([step.obs for step in steps]), np.stack([step.next_obs for step in steps])
    before, after = [], []
    stack = [steps[0].obs] * FRAMES
    for step in steps:
        if step.number == 0:
            stack = [step.obs] * FRAMES
        before.append(np.stack(stack))
        stack = [*stack[1:], step.next_obs]
        after.append(np.stack(stack))
    return np.stack(before), np.stack(after)


class OwnBody(nn.Module):
    """Images -> 16 features: plain convolutions, statistics in buffers, a layer that does not learn."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(FRAMES, 6, 8, stride=4)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, stride=2)
        self.frozen = nn.Linear(8 * 4 * 4, 16).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.relu(self.norm(self.first(images / 255)))
        features: Tensor = torch.tanh(self.frozen(torch.relu(self.second(maps)).flatten(1)))
        return features


class OwnActorCritic(nn.Module):
    def __init__(self, observation_space: gym.Space[Any], action_space: Any, config: PPOConfig) -> None:
        super().__init__()
        self.body, self.actor, self.critic = OwnBody(), nn.Linear(16, int(action_space.n)), nn.Linear(16, 1)

    def forward(self, obs: Tensor) -> tuple[Categorical, Tensor]:
        features = self.body(obs)
        return Categorical(logits=self.actor(features)), self.critic(features).squeeze(-1)


class OwnQNetwork(nn.Module):
    def __init__(self, observation_space: gym.Space[Any], num_actions: int, hidden_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.body, self.head = OwnBody(), nn.Linear(16, num_actions)

    def forward(self, obs: Tensor) -> Tensor:
        values: Tensor = self.head(self.body(obs))
        return values
