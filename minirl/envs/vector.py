"""Many environments at once, in this process or in workers that share memory with it.

An environment that ends is reset in the same step (Gymnasium's `AutoresetMode.SAME_STEP`): `observations` then holds
the first observation of the new episode and `final_observations` the true last one of the old, which a cut episode
must bootstrap from. No step is spent on the reset, so there is no row to mask out.

This process plays some of the environments itself; worker processes play the others at the same time. A worker holds
several environments and answers one message a step; observations, actions, rewards and ends travel through shared
memory. One process per environment would lose on pipes what it wins on cores, and to sleep while others play costs
more than to play along: waking up takes a tenth of a millisecond. Workers import no torch. Their number changes the
speed only: each environment has its own seed.

The environments can also play in two halves (`start`, `finish`): one plays in the workers while this process, which
plays none then, thinks about the other.
"""

import atexit
import contextlib
import ctypes
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple

import cv2
import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from minirl.config import ConfigError
from minirl.envs.state import CantCapture, capture, restore

PATIENCE = 5.0  # seconds for a worker to leave by itself before it is killed

MakeEnv = Callable[[], gym.Env[Any, Any]]


class Episode(NamedTuple):
    """A finished episode: which environment played it, its undiscounted return and its length in agent steps."""

    env_index: int
    episodic_return: float
    length: int


class VectorStep(NamedTuple):
    """What one step of N environments gave. The arrays are overwritten by the next step: copy what you keep.

    Attributes:
        observations: (N, ...) what the next action is chosen from; where an episode ended, the start of the next one.
        rewards: (N,) float32.
        terminated: (N,) bool, the episode came to a real end: nothing follows.
        truncated: (N,) bool, the episode was cut, by a time limit say: bootstrap from the final observation.
        final_observations: (N, ...) the true successor of this step; set only where terminated or truncated.
        episodes: those that finished in this step.
    """

    observations: NDArray[Any]
    rewards: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    final_observations: NDArray[Any]
    episodes: list[Episode]

    def next_observations(self) -> NDArray[Any]:
        """Return the true successors (N, ...): the final observation where an episode ended."""
        ended = self.terminated | self.truncated
        if not ended.any():
            return self.observations
        return np.where(
            ended.reshape(-1, *[1] * (self.observations.ndim - 1)), self.final_observations, self.observations
        )


class WorkerError(RuntimeError):
    """An environment raised in a worker process, or the process died. The message holds the worker's traceback."""


class EnvError(RuntimeError):
    """An environment raised, or returned what can't be learned from. The message names it and the step."""


class VectorEnv:
    """N copies of one environment behind `reset` and `step`, each reset in the step in which it ends.

    Attributes:
        halves: the rows of those that play together: of two halves, or of all.

    Args:
        make_env: makes one environment; must be picklable where there are workers, `functools.partial(make_env, ...)`
            say. An environment reports a finished episode as `info["episode"] = {"r", "l"}` (`EpisodeStatistics`).
        num_envs: N.
        num_workers: processes, this one among them; None for one per core this process may use, never more than have
            something to play.
        in_halves: whether they play in two halves. With a single process it plays them itself.
        start_method: `"forkserver"` or `"spawn"`; None for the first of them that the platform has. (Never `"fork"`:
            it copies torch's locked threads.)

    Raises:
        ConfigError: if the observations are not arrays.
        EnvError: if an environment raises, or returns numbers that are not finite or observations of another shape.
        WorkerError: if that happens in a worker, or a worker dies.
    """

    def __init__(
        self,
        make_env: MakeEnv,
        num_envs: int,
        *,
        num_workers: int | None = None,
        in_halves: bool = False,
        start_method: str | None = None,
    ) -> None:
        self.num_envs = num_envs
        middle = num_envs // 2
        self.halves = [slice(0, middle), slice(middle, num_envs)] if in_halves and middle else [slice(0, num_envs)]
        self._playing: list[slice] = []  # the halves that were started, and not finished
        self._workers: list[_Worker] = []
        thinkers = len(self.halves) - 1
        self.num_workers = min(
            self.halves[0].stop + thinkers, available_cores() if num_workers is None else num_workers
        )
        shares = [1 - thinkers if self.num_workers > 1 else 1, *[1] * (self.num_workers - 1)]
        mine, *theirs = zip(*(_split(half, shares) for half in self.halves), strict=True)
        self._mine: _EnvGroup | None = _EnvGroup(make_env, mine)
        self.observation_space = self._mine.observation_space
        self.action_space = self._mine.action_space
        self._arrays = _SharedArrays(num_envs, self.observation_space, shared=self.num_workers > 1)

        if start_method is None:
            methods = multiprocessing.get_all_start_methods()
            start_method = "forkserver" if "forkserver" in methods else "spawn"
        atexit.register(self.close)
        try:
            for parts in theirs:
                self._workers.append(_Worker(start_method, make_env, parts, self._arrays))
            self._ask_workers("make")
            self._hear_workers()
        except BaseException:
            self.close()
            raise

    def reset(self, seed: int | None = None) -> NDArray[Any]:
        """Start new episodes everywhere and return the first observations (N, ...), overwritten by the next step.

        With a seed, environment i is seeded with `seed + i`: give one once, since the same seed means the same games.
        """
        mine = self._open_group()
        self._ask_workers("reset", seed)
        mine.reset(self._arrays, seed)
        self._hear_workers()
        return self._arrays.observations

    def step(self, actions: NDArray[np.int64]) -> VectorStep:
        """Take one action in each environment; `actions` (N,) count from 0 whatever the space's `start` is."""
        for half in self.halves:
            self.start(half, actions[half])
        episodes = [episode for half in self.halves for episode in self.finish(half).episodes]
        return self._arrays.rows(slice(0, self.num_envs), episodes)

    def start(self, half: slice, actions: NDArray[np.int64]) -> None:
        """Have one of `halves` take its actions, as far as other processes play it; `finish` must follow.

        Raises:
            RuntimeError: if it plays already.
        """
        self._open_group()
        if half in self._playing:
            raise RuntimeError("these environments were started already: finish them first")
        self._arrays.actions[half] = actions
        self._ask_workers("step", self.halves.index(half))
        self._playing.append(half)

    def finish(self, half: slice) -> VectorStep:
        """Wait for the half that was started first, and return what its step gave: its rows of all arrays.

        Raises:
            RuntimeError: if it was not started, or not first.
        """
        mine = self._open_group()
        if self._playing[:1] != [half]:
            raise RuntimeError("these environments were not started, or others before them")
        self._playing.pop(0)
        episodes = mine.step(self._arrays, self.halves.index(half)) + self._hear_workers()
        return self._arrays.rows(half, episodes)

    def capture(self) -> list[Any]:
        """Return the state of each environment, as plain data (`minirl.envs.state`). Changes nothing of it.

        Raises:
            CantCapture: if one holds something that is no plain data.
        """
        mine = self._open_group()
        self._ask_workers("capture")
        try:
            states = mine.capture()
        finally:
            answers = [worker.receive() for worker in self._workers]
        for answer in answers:
            if isinstance(answer, CantCapture):
                raise answer
            states |= answer
        return [states[row] for row in range(self.num_envs)]

    def restore(self, states: list[Any]) -> None:
        """Put back what `capture` returned.

        Raises:
            ValueError: if it comes from other environments.
        """
        if len(states) != self.num_envs:
            raise ValueError(f"there are {len(states)} saved states for {self.num_envs} environments")
        mine = self._open_group()
        self._ask_workers("restore", states)
        mine.restore(states)
        self._hear_workers()

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_group(self) -> "_EnvGroup":
        if self._mine is None:
            raise RuntimeError("these environments are closed")
        return self._mine

    def _ask_workers(self, command: str, argument: Any = None) -> None:
        for worker in self._workers:
            worker.send((command, argument))

    def _hear_workers(self) -> list[Episode]:
        return [episode for worker in self._workers for episode in worker.receive()]


def available_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _split(rows: slice, shares: list[int]) -> list[range]:
    """Split rows, in order, into one range for each share."""
    bounds = rows.start + (rows.stop - rows.start) * np.cumsum([0, *shares]) / sum(shares)
    return [range(start, stop) for start, stop in itertools.pairwise(bounds.round().astype(int).tolist())]


class _SharedArrays:
    """One row per environment of everything that a step exchanges, in memory that worker processes can share.

    The memory is anonymous: nothing stays behind, however the processes end.
    """

    def __init__(self, num_envs: int, observation_space: gym.Space[Any], *, shared: bool) -> None:
        if observation_space.shape is None:
            raise ConfigError(f"--env-id must have observations that are one array, not {observation_space}")
        shape = (num_envs, *observation_space.shape)
        dtype = np.dtype(observation_space.dtype)
        context = multiprocessing.get_context("spawn")
        layout: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            "observations": (shape, dtype),
            "final_observations": (shape, dtype),
            "actions": ((num_envs,), np.dtype(np.int64)),
            "rewards": ((num_envs,), np.dtype(np.float32)),
            "terminated": ((num_envs,), np.dtype(np.bool_)),
            "truncated": ((num_envs,), np.dtype(np.bool_)),
        }
        self.memory: dict[str, tuple[Any, tuple[int, ...], np.dtype[Any]]] = {}
        for name, (array_shape, array_dtype) in layout.items():
            size = math.prod(array_shape) * array_dtype.itemsize
            raw = context.RawArray(ctypes.c_ubyte, size) if shared else bytearray(size)
            self.memory[name] = (raw, array_shape, array_dtype)
        self._map()

    def _map(self) -> None:
        views = {name: np.frombuffer(raw, dtype).reshape(shape) for name, (raw, shape, dtype) in self.memory.items()}
        self.observations: NDArray[Any] = views["observations"]
        self.final_observations: NDArray[Any] = views["final_observations"]
        self.actions: NDArray[np.int64] = views["actions"]
        self.rewards: NDArray[np.float32] = views["rewards"]
        self.terminated: NDArray[np.bool_] = views["terminated"]
        self.truncated: NDArray[np.bool_] = views["truncated"]

    def rows(self, rows: slice, episodes: list[Episode]) -> VectorStep:
        return VectorStep(
            self.observations[rows],
            self.rewards[rows],
            self.terminated[rows],
            self.truncated[rows],
            self.final_observations[rows],
            episodes,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"memory": self.memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.memory = state["memory"]
        self._map()


class _EnvGroup:
    """Some of the environments, stepped one after the other; `parts` says which of each half."""

    def __init__(self, make_env: MakeEnv, parts: Sequence[range]) -> None:
        self.parts = parts
        self.envs = {row: make_env() for part in parts for row in part}
        env = next(iter(self.envs.values())) if self.envs else make_env()
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.first_action = int(getattr(self.action_space, "start", 0))
        self.env_id = "without an id" if env.spec is None else env.spec.id
        if not self.envs:
            env.close()
        self.steps = [0 for _ in parts]  # since the environments were made

    def reset(self, arrays: _SharedArrays, seed: int | None) -> None:
        for row, env in self.envs.items():
            arrays.observations[row] = self._checked(row, env.reset(seed=None if seed is None else seed + row)[0])

    def step(self, arrays: _SharedArrays, part: int) -> list[Episode]:
        if not self.parts[part]:
            return []
        self.steps[part] += 1
        episodes = []
        for row in self.parts[part]:
            env = self.envs[row]
            try:
                obs, reward, terminated, truncated, info = env.step(int(arrays.actions[row]) + self.first_action)
                if terminated or truncated:
                    arrays.final_observations[row] = self._checked(row, obs)
                    obs, reset_info = env.reset()
                    # A game can also end while it is being reset (EpisodicLife, FireReset): both are counted.
                    for finished in (info.get("episode"), reset_info.get("episode")):
                        if finished is not None:
                            episodes.append(Episode(row, float(finished["r"]), int(finished["l"])))
            except EnvError:
                raise
            except Exception as error:
                raise EnvError(f"{self._name(row)} raised {error!r}") from error
            arrays.observations[row] = self._checked(row, obs)
            arrays.rewards[row] = reward
            arrays.terminated[row] = terminated
            arrays.truncated[row] = truncated
        self._require_finite(arrays, self.parts[part])
        return episodes

    def _name(self, row: int) -> str:
        steps = next(steps for steps, part in zip(self.steps, self.parts, strict=True) if row in part)
        return f"environment {row} ({self.env_id}), at its step {steps:,},"

    def _checked(self, row: int, obs: Any) -> Any:
        """Return the observation, if it has the shape that was announced; NumPy would stretch others to fit."""
        if np.shape(obs) != self.observation_space.shape:
            raise EnvError(
                f"{self._name(row)} showed an observation of shape {np.shape(obs)}, not {self.observation_space.shape}"
            )
        return obs

    def _require_finite(self, arrays: _SharedArrays, part: range) -> None:
        rows = slice(part.start, part.stop)
        columns = {"an observation": arrays.observations, "a last observation": arrays.final_observations}
        for what, array in {**columns, "a reward": arrays.rewards}.items():
            if array.dtype.kind == "f" and not np.isfinite(array[rows]).all():
                bad = next(row for row in part if not np.isfinite(array[row]).all())
                raise EnvError(f"{self._name(bad)} gave {what} that is not finite")

    def capture(self) -> dict[int, Any]:
        return {row: capture(env) for row, env in self.envs.items()}

    def restore(self, states: list[Any]) -> None:
        for row, env in self.envs.items():
            env.reset(seed=0)  # makes what only a first reset makes
            restore(env, states[row])

    def close(self) -> None:
        for env in self.envs.values():
            env.close()


class _Worker:
    """A process that holds a group of environments, seen from the training process."""

    def __init__(self, start_method: str, make_env: MakeEnv, parts: Sequence[range], arrays: _SharedArrays) -> None:
        context: Any = multiprocessing.get_context(start_method)
        rows = " and ".join(f"{part[0]} to {part[-1]}" for part in parts)
        self.name = f"environment worker (environments {rows})"
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, make_env, parts, arrays), name=self.name, daemon=True
        )
        self.process.start()
        theirs.close()  # so that the death of the worker is an end of file here

    def send(self, message: tuple[str, Any]) -> None:
        try:
            self.connection.send_bytes(pickle.dumps(message))  # `connection.send` takes several times as long
        except OSError:
            self.receive()  # its last words say more than a broken pipe

    def receive(self) -> Any:
        try:
            failure, result = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as error:
            self.process.join(timeout=PATIENCE)
            code = self.process.exitcode
            raise WorkerError(f"the {self.name} died without a word, exit code {code}") from error
        if failure is not None:
            raise WorkerError(f"the {self.name} raised:\n\n{failure}")
        return result

    def join(self) -> None:
        self.process.join(timeout=PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _work(connection: Connection, make_env: MakeEnv, parts: Sequence[range], arrays: _SharedArrays) -> None:
    """Run a worker: answer each message with (traceback or None, result) until the other end is closed.

    The first message makes the environments; the others reset or step them, or carry their states.
    """
    # Ctrl-C, and often SIGTERM, reaches every process of the group: the training process decides, and hangs up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cv2.setNumThreads(1)
    group: _EnvGroup | None = None
    with contextlib.suppress(EOFError, OSError):  # the training process is done, or gone
        while True:
            command, argument = pickle.loads(connection.recv_bytes())
            result: Any = []
            failure = None
            try:
                if group is None:
                    group = _EnvGroup(make_env, parts)
                elif command == "reset":
                    group.reset(arrays, argument)
                elif command == "step":
                    result = group.step(arrays, argument)
                elif command == "capture":
                    result = group.capture()
                else:
                    group.restore(argument)
            except CantCapture as error:
                result = error
            except BaseException:
                failure = traceback.format_exc()
            connection.send_bytes(pickle.dumps((failure, result)))
    if group is not None:
        group.close()
