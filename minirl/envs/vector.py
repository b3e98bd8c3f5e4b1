"""Many environments at once, in this process or in workers that share memory with it.

An environment that ends is reset in the same step (Gymnasium's `AutoresetMode.SAME_STEP`): `observations` then holds
the first observation of the new episode and `final_observations` the true last one of the old, which a cut episode
must bootstrap from. No step is spent on the reset, so there is no row to mask out.

This process plays some of the environments itself; worker processes play the others at the same time. A worker holds
several environments and answers one message a step; observations, actions, rewards and ends travel through shared
memory. One process per environment would lose on pipes what it wins on cores, and to sleep while others play costs
more than to play along: waking up takes a tenth of a millisecond. Workers import no torch. Their number changes the
speed only: each environment has its own seed.
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
from collections.abc import Callable
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

    Args:
        make_env: makes one environment; must be picklable where there are workers, `functools.partial(make_env, ...)`
            say. An environment reports a finished episode as `info["episode"] = {"r", "l"}` (`EpisodeStatistics`).
        num_envs: N.
        num_workers: processes that play, this one among them; None for one per core this process may use, never more
            than N.
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
        start_method: str | None = None,
    ) -> None:
        self.num_envs = num_envs
        self.num_workers = min(num_envs, available_cores() if num_workers is None else num_workers)
        self._workers: list[_Worker] = []
        bounds = np.linspace(0, num_envs, self.num_workers + 1).astype(int)
        mine, *theirs = [range(start, stop) for start, stop in itertools.pairwise(bounds)]
        self._mine: _EnvGroup | None = _EnvGroup(make_env, mine)
        env = self._mine.envs[0]
        self.observation_space = env.observation_space
        self.action_space = env.action_space
        self._arrays = _SharedArrays(num_envs, self.observation_space, shared=self.num_workers > 1)

        if start_method is None:
            methods = multiprocessing.get_all_start_methods()
            start_method = "forkserver" if "forkserver" in methods else "spawn"
        atexit.register(self.close)
        try:
            for rows in theirs:
                self._workers.append(_Worker(start_method, make_env, rows, self._arrays))
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
        arrays, mine = self._arrays, self._open_group()
        arrays.actions[:] = actions
        self._ask_workers("step")
        episodes = mine.step(arrays) + self._hear_workers()
        return VectorStep(
            arrays.observations,
            arrays.rewards,
            arrays.terminated,
            arrays.truncated,
            arrays.final_observations,
            episodes,
        )

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
            states += answer
        return states

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

    def __getstate__(self) -> dict[str, Any]:
        return {"memory": self.memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.memory = state["memory"]
        self._map()


class _EnvGroup:
    """Some of the environments, stepped one after the other; `rows` says which."""

    def __init__(self, make_env: MakeEnv, rows: range) -> None:
        self.rows = rows
        self.envs = [make_env() for _ in rows]
        self.first_action = int(getattr(self.envs[0].action_space, "start", 0))
        self.steps = 0  # since the environments were made

    def reset(self, arrays: _SharedArrays, seed: int | None) -> None:
        for row, env in zip(self.rows, self.envs, strict=True):
            arrays.observations[row] = self._checked(row, env.reset(seed=None if seed is None else seed + row)[0])

    def step(self, arrays: _SharedArrays) -> list[Episode]:
        self.steps += 1
        episodes = []
        for row, env in zip(self.rows, self.envs, strict=True):
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
        self._require_finite(arrays)
        return episodes

    def _name(self, row: int) -> str:
        spec = self.envs[0].spec
        return f"environment {row} ({'without an id' if spec is None else spec.id}), at its step {self.steps:,},"

    def _checked(self, row: int, obs: Any) -> Any:
        """Return the observation, if it has the shape that was announced; NumPy would stretch others to fit."""
        if np.shape(obs) != self.envs[0].observation_space.shape:
            space = self.envs[0].observation_space
            raise EnvError(f"{self._name(row)} showed an observation of shape {np.shape(obs)}, not {space.shape}")
        return obs

    def _require_finite(self, arrays: _SharedArrays) -> None:
        rows = slice(self.rows.start, self.rows.stop)
        columns = {"an observation": arrays.observations, "a last observation": arrays.final_observations}
        for what, array in {**columns, "a reward": arrays.rewards}.items():
            if array.dtype.kind == "f" and not np.isfinite(array[rows]).all():
                bad = next(row for row in self.rows if not np.isfinite(array[row]).all())
                raise EnvError(f"{self._name(bad)} gave {what} that is not finite")

    def capture(self) -> list[Any]:
        return [capture(env) for env in self.envs]

    def restore(self, states: list[Any]) -> None:
        for row, env in zip(self.rows, self.envs, strict=True):
            env.reset(seed=0)  # makes what only a first reset makes
            restore(env, states[row])

    def close(self) -> None:
        for env in self.envs:
            env.close()


class _Worker:
    """A process that holds a group of environments, seen from the training process."""

    def __init__(self, start_method: str, make_env: MakeEnv, rows: range, arrays: _SharedArrays) -> None:
        context: Any = multiprocessing.get_context(start_method)
        self.name = f"environment worker (environments {rows[0]} to {rows[-1]})"
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, make_env, rows, arrays), name=self.name, daemon=True)
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


def _work(connection: Connection, make_env: MakeEnv, rows: range, arrays: _SharedArrays) -> None:
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
                    group = _EnvGroup(make_env, rows)
                elif command == "reset":
                    group.reset(arrays, argument)
                elif command == "step":
                    result = group.step(arrays)
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
