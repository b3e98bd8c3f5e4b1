"""Many environments at once, in this process or in workers that share memory with it.

An environment whose episode ends is reset in the same step (Gymnasium's `AutoresetMode.SAME_STEP`): `observations`
then holds the first observation of the new episode and `final_observations` the true last one of the old, which a
truncated episode must bootstrap from. No step is spent on the reset, so there is no row to mask out.

This process plays some of the environments itself; worker processes play the others at the same time. A worker holds
several environments and answers one message per step; observations, actions, rewards and ends travel through shared
memory. One process per environment would lose on pipes what it gains on cores, and sleeping while others play costs
more than playing along: waking up takes a tenth of a millisecond. Workers do not import torch. Their number changes
only the speed: each environment has its own seed.

The environments can also play in two halves (`start`, `finish`): one half plays in the workers while this process,
which then plays none itself, computes actions for the other.
"""

import atexit
import itertools
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minirl.envs.guard import EnvError
from minirl.envs.state import CantCapture, CantRestore, State
from minirl.envs.workers import (
    EnvGroup,
    Episode,
    MakeEnv,
    SharedArrays,
    VectorStep,
    Worker,
    WorkerError,
)

__all__ = ["EnvError", "Episode", "VectorEnv", "VectorStep", "WorkerError", "available_cores"]


class VectorEnv:
    """N copies of one environment behind `reset` and `step`, each reset in the step in which its episode ends.

    Attributes:
        halves: the rows that play together: two halves, or all rows.
        stacked: whether observations are the last frames, as from `minirl.envs.atari.FrameStack`.
        local_envs: the environments that this process plays, by row.
        copy_difference: how a restored copy of an environment differed, "" for not at all; None until that is tried
            (`minirl.runs.restore_check`).

    Args:
        make_env: makes one environment; must be picklable if there are workers, as `functools.partial(make_env, ...)`
            is. Episodes are reported as `episodes` if the environment has an `EpisodeStatistics` among its layers.
        num_envs: N; or, if several processes share the environments, the slice of this one, N = stop - start.
        num_workers: processes, including this one; None for one per core this process may use, never more than have
            something to play.
        in_halves: whether they play in two halves. A single process plays them itself.

    Raises:
        ConfigError: if the observations are not arrays, or the actions are of an unknown kind.
        EnvError: if an environment raises, or returns what can't be learned from (docs/reliability.md), here or in a
            worker; its `trace` is the environment's.
        WorkerError: if a worker dies.
    """

    def __init__(
        self,
        make_env: MakeEnv,
        num_envs: int | slice,
        *,
        num_workers: int | None = None,
        in_halves: bool = False,
    ) -> None:
        first, num_envs = (
            (0, num_envs) if isinstance(num_envs, int) else (num_envs.start, num_envs.stop - num_envs.start)
        )
        self.num_envs = num_envs
        middle = num_envs // 2
        self.halves = [slice(0, middle), slice(middle, num_envs)] if in_halves and middle else [slice(0, num_envs)]
        self._playing: list[slice] = []  # halves that were started and not finished
        self._workers: list[Worker] = []
        thinkers = len(self.halves) - 1
        self.num_workers = min(
            self.halves[0].stop + thinkers, available_cores() if num_workers is None else num_workers
        )
        shares = [1 - thinkers if self.num_workers > 1 else 1, *[1] * (self.num_workers - 1)]
        mine, *theirs = zip(*(_split(half, shares) for half in self.halves), strict=True)
        self._mine: EnvGroup | None = EnvGroup(make_env, mine, first)
        self.observation_space = self._mine.observation_space
        self.action_space = self._mine.action_space
        self.stacked = self._mine.stacked
        self.make_env, self.local_envs = make_env, self._mine.envs
        self.copy_difference: str | None = None
        self._arrays = SharedArrays(num_envs, self.observation_space, self.action_space, shared=self.num_workers > 1)

        atexit.register(self.close)
        try:
            for parts in theirs:
                self._workers.append(Worker(make_env, parts, first, self._arrays))
            # Environments may draw while they are made: in workers from seeds that depend on this process's.
            state: Any = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
            self._ask_workers("make", zlib.crc32(np.append(state["key"], state["pos"]).tobytes()))
            self._hear_workers()
        except BaseException:
            self.close()
            raise

    def reset(self, seed: int | None = None) -> NDArray[Any]:
        """Start new episodes everywhere and return the first observations (N, ...), overwritten by the next step.

        With a seed, environment i, counted over all processes, is seeded with `seed + i`: give one only once, since the
        same seed means the same games.
        """
        mine = self._open_group()
        self._ask_workers("reset", seed)
        mine.reset(self._arrays, seed)
        self._hear_workers()
        return self._arrays.observations

    def step(self, actions: NDArray[Any]) -> VectorStep:
        """Take one action in each environment: `actions` (N, ...), choices from 0 on, for any `start` of the space.

        An environment with a Box gets the nearest action within its bounds.
        """
        if len(self.halves) == 1 and not self._workers and not self._playing:  # nobody to wait for
            self._arrays.actions[:] = actions
            return self._arrays.rows(slice(0, self.num_envs), self._open_group().step(self._arrays, 0))
        for half in self.halves:
            self.start(half, actions[half])
        episodes = [episode for half in self.halves for episode in self.finish(half).episodes]
        return self._arrays.rows(slice(0, self.num_envs), episodes)

    def start(self, half: slice, actions: NDArray[Any]) -> None:
        """Let the workers take the actions of one of `halves`, as far as they play it; `finish` must follow.

        Raises:
            RuntimeError: if it is playing already.
        """
        self._open_group()
        if half in self._playing:
            raise RuntimeError("these environments were started already: finish them first")
        self._arrays.actions[half] = actions
        self._ask_workers("step", self.halves.index(half))
        self._playing.append(half)

    def finish(self, half: slice) -> VectorStep:
        """Wait for the half that was started first, and return the results of its step: its rows of all arrays.

        Raises:
            RuntimeError: if it was not started, or not first.
        """
        mine = self._open_group()
        if self._playing[:1] != [half]:
            raise RuntimeError("these environments were not started, or others before them")
        self._playing.pop(0)
        episodes = mine.step(self._arrays, self.halves.index(half)) + self._hear_workers()
        return self._arrays.rows(half, episodes)

    def play(
        self, num_steps: int, choose: Callable[[int, slice], NDArray[Any]]
    ) -> Iterator[tuple[int, slice, VectorStep]]:
        """Play T steps: yield, for each step and each of `halves`, t, its rows and their results (rows, ...).

        `choose(t, rows)` returns the actions of step t in these rows, after the loop body has seen their results of
        step t - 1. While one half plays, the loop body and `choose` work on the other.
        """
        for t in range(num_steps + 1):
            for rows in self.halves:
                if t > 0:
                    yield t - 1, rows, self.finish(rows)
                if t < num_steps:
                    self.start(rows, choose(t, rows))

    def set_attr(self, name: str, value: Any) -> None:
        """Set an attribute of every environment, such as a level: of its outermost layer that has it.

        Raises:
            AttributeError: if none has it, or a resumed run would lose it (LunarLander's own attributes).
            RuntimeError: if one of `halves` is playing.
        """
        mine = self._open_group()
        if self._playing:
            raise RuntimeError("these environments are playing: finish them first")
        mine.set_attr(name, value)
        self._ask_workers("set", (name, value))
        for answer in [worker.receive() for worker in self._workers]:
            if isinstance(answer, AttributeError):
                raise answer

    def capture(self) -> State:
        """Return the state of each environment, unchanged, as plain data (`minirl.envs.state`).

        Includes each worker's global random number generators; those of this process are the caller's responsibility.

        Raises:
            CantCapture: if one holds something that is not plain data.
        """
        mine = self._open_group()
        self._ask_workers("capture")
        try:
            states = mine.capture()
        finally:
            answers = [worker.receive() for worker in self._workers]
        generators = []
        for answer in answers:
            if isinstance(answer, CantCapture):
                raise answer
            states |= answer[0]
            generators.append(answer[1])
        return {"states": [states[row] for row in range(self.num_envs)], "generators": generators}

    def restore(self, saved: State) -> None:
        """Put back what `capture` returned. If there are more workers than before, the others' generators are new.

        Raises:
            CantRestore: if it comes from other environments.
        """
        if not isinstance(saved, dict):
            raise CantRestore("its environments were saved by an earlier version")
        states, generators = saved["states"], saved["generators"]
        if len(states) != self.num_envs:
            raise CantRestore(f"there are {len(states)} saved states for {self.num_envs} environments")
        mine = self._open_group()
        for worker, theirs in zip(self._workers, [*generators, *[None] * len(self._workers)], strict=False):
            worker.send(("restore", (states, theirs)))
        try:
            mine.restore(states)
        finally:
            answers = [worker.receive() for worker in self._workers]
        for answer in answers:
            if isinstance(answer, CantRestore):
                raise answer

    def close(self) -> None:
        """Close the environments and end the workers. Safe to call twice."""
        if self._mine is not None:
            self._mine.close()
            self._mine = None
        for worker in self._workers:
            worker.connection.close()  # an end of file is the worker's signal to leave
        for worker in self._workers:
            worker.join()
        self._workers.clear()
        atexit.unregister(self.close)

    def __enter__(self) -> "VectorEnv":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_group(self) -> "EnvGroup":
        if self._mine is None:
            raise RuntimeError("these environments are closed")
        return self._mine

    def _ask_workers(self, command: str, argument: Any = None) -> None:
        for worker in self._workers:
            worker.send((command, argument))

    def _hear_workers(self) -> list[Episode]:
        return [episode for worker in self._workers for episode in worker.receive()]


def available_cores() -> int:
    """Return how many cores this process may run on: its share, if torchrun has started several here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _split(rows: slice, shares: list[int]) -> list[range]:
    """Split rows, in order, into one range for each share."""
    bounds = rows.start + (rows.stop - rows.start) * np.cumsum([0, *shares]) / sum(shares)
    return [range(start, stop) for start, stop in itertools.pairwise(bounds.round().astype(int).tolist())]
