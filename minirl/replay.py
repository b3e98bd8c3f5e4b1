"""Replay memory: the last transitions of N environments, sampled uniformly (Lin 1992; Mnih et al. 2015).

A stack of four frames shares three with the one before it, and a transition holds two stacks: stored as they are, a
million transitions of Atari take 56 GB. Here each frame is stored once, which takes 7 GB, and the stacks are rebuilt
when they are sampled, byte for byte as they were.
"""

from typing import Any, Generic, NamedTuple, TypeVar

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minirl.checks import ConfigError
from minirl.fast.gpu import to_device
from minirl.networks import channels_last, is_image

COLUMNS = {"actions": np.int64, "rewards": np.float32, "terminated": np.bool_}  # of a transition, without observations
SPARE = 20  # one spare row for this many transitions, for the final frames of episodes


Array = TypeVar("Array")


class Batch(NamedTuple, Generic[Array]):
    """Sampled transitions, B of them: NumPy arrays, or tensors after `to`.

    Attributes:
        observations: (B, ...).
        actions: (B,) int64.
        rewards: (B,) float32.
        next_observations: (B, ...) the true successors: the final observation if an episode ended.
        terminated: (B,) bool, real ends; a truncated episode bootstraps from its final observation.
    """

    observations: Array
    actions: Array
    rewards: Array
    next_observations: Array
    terminated: Array

    def to(self, device: torch.device) -> "Batch[Tensor]":
        """Return it as tensors on a device."""
        return Batch(*(to_device(torch.as_tensor(column), device) for column in self))


class ReplayBuffer:
    """A ring of transitions.

    Args:
        capacity: transitions, over all environments; a multiple of their number.
        observation_space: of one environment. Byte images stay bytes, everything else is stored as float32.
        num_envs: N, environments that are stepped together.
        stacked: observations are the last C frames of an episode, which starts with C copies of its first frame, as
            `FrameStack` makes them; then each frame is stored once. False for other images, such as colour images.
        seed: of the sampling, or the generator to draw from.

    Raises:
        ValueError: if the capacity is not a positive multiple of the number of environments, or `stacked` is set for
            observations that are not byte images (C, H, W).
        ConfigError: if it is larger than the machine's memory.
    """

    def __init__(
        self,
        capacity: int,
        observation_space: gym.Space[Any],
        num_envs: int = 1,
        *,
        stacked: bool = False,
        seed: int | np.random.Generator = 0,
    ) -> None:
        if num_envs < 1 or capacity < 1 or capacity % num_envs != 0:
            raise ValueError(f"capacity must be a positive multiple of num_envs = {num_envs}, not {capacity}")
        self.num_envs = num_envs
        self.length = capacity // num_envs  # of each environment's ring
        self.rng = np.random.default_rng(seed)
        self.added = 0  # transitions ever added, per environment
        shape, kind = (num_envs, self.length), _Frames if stacked else _Pairs
        try:
            self.columns: dict[str, NDArray[Any]] = {name: np.zeros(shape, dtype) for name, dtype in COLUMNS.items()}
            self.observations: _Pairs | _Frames = kind(num_envs, self.length, observation_space)
        except MemoryError as error:
            wanted = f"fit into this machine's memory, and {capacity} does not: {error}"
            raise ConfigError(f"--buffer-size must {wanted}") from error

    def __len__(self) -> int:
        """Return how many transitions can be sampled."""
        return sum(self._sizes())

    def add(
        self,
        observations: NDArray[Any],
        actions: NDArray[np.int64],
        rewards: NDArray[np.float32],
        next_observations: NDArray[Any],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
    ) -> None:
        """Add one step of each environment; the oldest transitions make room.

        Args:
            observations: (N, ...) what the actions were chosen from.
            actions: (N,).
            rewards: (N,).
            next_observations: (N, ...) the true successors, never the first observation of the next episode.
            terminated: (N,) real ends.
            truncated: (N,) ends caused by a time limit.
        """
        slot = self.added % self.length
        for name, values in {"actions": actions, "rewards": rewards, "terminated": terminated}.items():
            self.columns[name][:, slot] = values
        self.observations.write(slot, observations, next_observations, terminated | truncated)
        self.added += 1

    def cut(self) -> None:
        """Cut the episodes: the next observations belong to new ones, for example in a resumed run."""
        self.observations.cut()

    def sample(self, batch_size: int) -> Batch[NDArray[Any]]:
        """Draw transitions uniformly, with replacement.

        Raises:
            ValueError: if there are fewer than `batch_size`, or `batch_size` is below 1.
        """
        sizes = self._sizes()
        total = sum(sizes)
        if not 1 <= batch_size <= total:
            raise ValueError(f"batch_size must be from 1 to the {total} transitions stored, not {batch_size}")
        index = self.rng.integers(total, size=batch_size)
        env, newest = np.zeros_like(index), np.array(total)
        if self.num_envs > 1:
            ends = np.cumsum(sizes)
            env = ends.searchsorted(index, side="right")
            newest = ends[env]
        slot = (self.added + index - newest) % self.length  # counted back from each environment's newest transition
        where = env * self.length + slot  # position in all rings laid end to end
        observations, next_observations = self.observations.read(env, slot, where)
        columns = {name: column.take(where) for name, column in self.columns.items()}
        return Batch(observations=observations, next_observations=next_observations, **columns)

    def since(self, first: int) -> dict[str, NDArray[Any]]:
        """Return, to save them, each environment's transitions from number `first` on, counted from the first ever.

        Raises:
            ValueError: if some are no longer in the memory.
        """
        if not max(0, self.added - self.length) <= first <= self.added:
            raise ValueError(f"the transitions from {first} on are not all in the memory")
        slots = np.arange(first, self.added) % self.length
        columns = {name: column[:, slots] for name, column in self.columns.items()}
        return {**columns, **self.observations.since(slots, first)}

    def put(self, first: int, arrays: dict[str, NDArray[Any]]) -> None:
        """Put back what `since` returned; `set_counters` must follow."""
        slots = np.arange(first, first + arrays["actions"].shape[1]) % self.length
        for name, column in self.columns.items():
            column[:, slots] = arrays[name]
        self.observations.put(slots, arrays)

    def counters(self) -> dict[str, list[int]]:
        """Return how far the rings have got."""
        return {"added": [self.added], **self.observations.counters()}

    def set_counters(self, counters: dict[str, list[int]]) -> None:
        """Put back what `counters` returned."""
        (self.added,) = counters["added"]
        self.observations.set_counters(counters)

    def _sizes(self) -> list[int]:
        """Return how many transitions of each environment can be sampled."""
        most = min(self.added, self.length)
        return [min(size, most) for size in self.observations.available(self.added)]


class _Pairs:
    """Observations and their successors, both stored whole: for all but stacked frames."""

    def __init__(self, num_envs: int, length: int, space: gym.Space[Any]) -> None:
        assert space.shape is not None
        dtype = np.uint8 if is_image(space) and space.dtype == np.uint8 else np.float32
        self.current = np.zeros((num_envs, length, *space.shape), dtype)
        self.following = np.zeros_like(self.current)

    def write(
        self, slot: int, observations: NDArray[Any], next_observations: NDArray[Any], ended: NDArray[np.bool_]
    ) -> None:
        self.current[:, slot] = observations
        self.following[:, slot] = next_observations

    def read(
        self, env: NDArray[np.int64], slot: NDArray[np.int64], where: NDArray[np.int64]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        shape = (-1, *self.current.shape[2:])
        return self.current.reshape(shape).take(where, axis=0), self.following.reshape(shape).take(where, axis=0)

    def cut(self) -> None:
        pass

    def available(self, added: int) -> list[int]:
        return [added] * len(self.current)

    def since(self, slots: NDArray[np.int64], first: int) -> dict[str, NDArray[Any]]:
        return {"current": self.current[:, slots], "following": self.following[:, slots]}

    def put(self, slots: NDArray[np.int64], arrays: dict[str, NDArray[Any]]) -> None:
        self.current[:, slots] = arrays["current"]
        self.following[:, slots] = arrays["following"]

    def counters(self) -> dict[str, list[int]]:
        return {}

    def set_counters(self, counters: dict[str, list[int]]) -> None:
        pass


class _Frames:
    """Stacks of images, each frame stored once, in one ring of rows for each environment.

    A row holds the newest frame of an observation. An episode of T steps takes T + 1 rows; the last is for its final
    observation, from which no transition starts. `age` is how many frames of the same episode come before a row, up to
    a stack's worth; if there are too few, copies of the first one filled the stack, as in `FrameStack`.

    Rows are counted from the first one ever; row r is stored at r modulo the length of the ring.
    """

    def __init__(self, num_envs: int, length: int, space: gym.Space[Any]) -> None:
        if not is_image(space) or space.dtype != np.uint8:
            raise ValueError(f"stacked observations must be byte images (C, H, W), not {space}")
        assert space.shape is not None
        self.stack = space.shape[0]
        self.num_rows = length + length // SPARE + self.stack + 1
        self.frames = np.zeros((num_envs, self.num_rows, *space.shape[1:]), np.uint8)
        self.age = np.zeros((num_envs, self.num_rows), np.int64)
        self.row_of = np.zeros((num_envs, length), np.int64)  # the row of each transition
        self.row = np.zeros(num_envs, np.int64)  # the row of each environment's current observation
        self.oldest = np.zeros(num_envs, np.int64)  # oldest transition with all its frames, counted from the first
        self.added = 0
        self.envs = np.arange(num_envs)

    def write(
        self, slot: int, observations: NDArray[Any], next_observations: NDArray[Any], ended: NDArray[np.bool_]
    ) -> None:
        here, there = self.row % self.num_rows, (self.row + 1) % self.num_rows
        self.frames[self.envs, here] = observations[:, -1]
        self.frames[self.envs, there] = next_observations[:, -1]
        self.age[self.envs, there] = np.minimum(self.age[self.envs, here] + 1, self.stack - 1)
        self.row_of[:, slot] = self.row
        # The next observation's row is the successor's, or the one after it if a new episode starts.
        self.row += 1 + ended
        self.age[ended, self.row[ended] % self.num_rows] = 0
        self.added += 1
        self._forget()

    def _forget(self) -> None:
        """Drop the transitions whose oldest frame the next step will overwrite."""
        length = self.row_of.shape[1]
        self.oldest = np.maximum(self.oldest, self.added - length)
        while True:
            first = self.row_of[self.envs, self.oldest % length]
            first = first - self.age[self.envs, first % self.num_rows]
            lost = (first <= self.row + 1 - self.num_rows) & (self.oldest < self.added)
            if not lost.any():
                return
            self.oldest += lost

    def read(
        self, env: NDArray[np.int64], slot: NDArray[np.int64], where: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Rebuild stacks, (B, C, H, W) each: of observations, and of their successors, which end one frame later.

        In memory a pixel's C values are adjacent (channels-last), as convolutions need them.
        """
        row = self.row_of[env, slot]
        back = np.minimum(np.arange(self.stack)[::-1, None], self.age[env, row % self.num_rows])
        rows = np.concatenate([row - back, row[None] + 1]) % self.num_rows
        frames = self.frames[env, rows]  # (C + 1, B, H, W)
        current, following = (channels_last(stack.swapaxes(0, 1)) for stack in (frames[:-1], frames[1:]))
        return current.transpose(0, 3, 1, 2), following.transpose(0, 3, 1, 2)

    def cut(self) -> None:
        if self.added:  # the current row is the last transition's successor
            self.row += 1
            self.age[self.envs, self.row % self.num_rows] = 0
            self._forget()

    def available(self, added: int) -> list[int]:
        sizes: list[int] = (added - self.oldest).tolist()
        return sizes

    def since(self, slots: NDArray[np.int64], first: int) -> dict[str, NDArray[Any]]:
        arrays = {"row_of": self.row_of[:, slots]}
        for env in range(len(self.envs)) if len(slots) else ():
            rows = self._rows_since(env, first)
            arrays[f"frames-{env}"], arrays[f"age-{env}"] = self.frames[env, rows], self.age[env, rows]
            arrays[f"rows-{env}"] = rows
        return arrays

    def put(self, slots: NDArray[np.int64], arrays: dict[str, NDArray[Any]]) -> None:
        self.row_of[:, slots] = arrays["row_of"]
        for env in range(len(self.envs)):
            rows = arrays[f"rows-{env}"]
            self.frames[env, rows], self.age[env, rows] = arrays[f"frames-{env}"], arrays[f"age-{env}"]

    def _rows_since(self, env: int, first: int) -> NDArray[np.int64]:
        """Return the places of the rows from transition number `first` to the current observation.

        They include the earlier frames of the first stack, so that what is saved is complete.
        """
        oldest = max(first, int(self.oldest[env]))
        kept = oldest < self.added  # otherwise all are dropped, and only the current observation's stack is left
        row = int(self.row_of[env, oldest % self.row_of.shape[1]] if kept else self.row[env])
        row -= int(self.age[env, row % self.num_rows])
        return np.arange(row, self.row[env] + 1) % self.num_rows

    def counters(self) -> dict[str, list[int]]:
        return {"row": self.row.tolist(), "oldest": self.oldest.tolist(), "frames_added": [self.added]}

    def set_counters(self, counters: dict[str, list[int]]) -> None:
        self.row[:], self.oldest[:] = counters["row"], counters["oldest"]
        (self.added,) = counters["frames_added"]
