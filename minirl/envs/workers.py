"""Groups of a `VectorEnv`'s environments, here or in worker processes, and the memory that they share.

A worker holds several environments and answers one message per step; observations, actions, rewards and ends travel
through shared memory. Workers do not import torch.
"""

import contextlib
import ctypes
import math
import multiprocessing
import os
import pickle
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import cv2
import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from minirl.checks import ConfigError, described
from minirl.envs.again import PlayedAgain
from minirl.envs.atari import shows_stacks
from minirl.envs.episode import statistics_of
from minirl.envs.guard import EnvError, Guard
from minirl.envs.spaces import require_actions, require_array
from minirl.envs.state import (
    CantCapture,
    CantRestore,
    capture,
    capture_generators,
    layers_of,
    restore,
    restore_generators,
    seed_generators,
)

PATIENCE = 5.0  # seconds for a worker to exit by itself before it is killed
LARGEST = float(np.finfo(np.float32).max)  # networks compute in float32
AWAKE = 300e-6  # seconds to poll for a message before going to sleep: waking up takes a third of that

MakeEnv = Callable[[], gym.Env[Any, Any]]


class Episode(NamedTuple):
    """A finished episode: which environment played it, its undiscounted return and its length in agent steps."""

    env_index: int
    episodic_return: float
    length: int


class VectorStep(NamedTuple):
    """The results of one step of N environments. The next step overwrites the arrays: copy what you keep.

    Attributes:
        observations: (N, ...) what the next action is chosen from; if an episode ended, the start of the next one.
        rewards: (N,) float32.
        terminated: (N,) bool, the episode came to a real end: nothing follows.
        truncated: (N,) bool, the episode was cut, for example by a time limit: bootstrap from the final observation.
        final_observations: (N, ...) the true successor of this step; set only where terminated or truncated.
        episodes: those that ended in this step.
    """

    observations: NDArray[Any]
    rewards: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    final_observations: NDArray[Any]
    episodes: list[Episode]

    def next_observations(self) -> NDArray[Any]:
        """Return the true successors (N, ...): the final observation if an episode ended."""
        ended = self.terminated | self.truncated
        if not ended.any():
            return self.observations
        return np.where(
            ended.reshape(-1, *[1] * (self.observations.ndim - 1)), self.final_observations, self.observations
        )


class WorkerError(RuntimeError):
    """A worker process died, or failed with something other than an `EnvError`; then `trace` is its traceback."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace
        if trace:
            self.add_note(trace)


class SharedArrays:
    """Arrays of everything that a step exchanges, one row per environment, in memory that processes can share.

    The memory is anonymous: nothing is left behind, however the processes end.
    """

    def __init__(
        self, num_envs: int, observation_space: gym.Space[Any], action_space: gym.Space[Any], *, shared: bool
    ) -> None:
        require_array(observation_space)
        require_actions(action_space)
        assert observation_space.shape is not None
        shape = (num_envs, *observation_space.shape)
        dtype = np.dtype(observation_space.dtype)
        choice = isinstance(action_space, gym.spaces.Discrete)
        action_dtype = np.dtype(np.int64 if choice else action_space.dtype)
        context = multiprocessing.get_context("spawn")
        layout: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            "observations": (shape, dtype),
            "final_observations": (shape, dtype),
            "actions": ((num_envs, *(action_space.shape or ())), action_dtype),
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
        self.actions: NDArray[Any] = views["actions"]
        self.rewards: NDArray[np.float32] = views["rewards"]
        self.terminated: NDArray[np.bool_] = views["terminated"]
        self.truncated: NDArray[np.bool_] = views["truncated"]

    def rows(self, rows: slice, episodes: list[Episode]) -> VectorStep:
        """The results of a step, for some rows."""
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


class EnvGroup:
    """Some of the environments, stepped one after the other; `parts` are their rows in each half.

    `first` is the number of the environment in row 0: another process may have the earlier ones.
    """

    def __init__(self, make_env: MakeEnv, parts: Sequence[range], first: int = 0) -> None:
        self.parts, self.first = parts, first
        self.envs = {row: Guard(make_env(), first + row) for part in parts for row in part}
        env = next(iter(self.envs.values()), None) or Guard(make_env())
        self.observation_space, self.action_space = env.env.observation_space, env.env.action_space
        self.stacked = shows_stacks(env.env)
        self.discrete = isinstance(self.action_space, gym.spaces.Discrete)
        self.statistics = {row: statistics_of(env.env) for row, env in self.envs.items()}
        if not self.envs:
            env.env.close()

    def reset(self, arrays: SharedArrays, seed: int | None) -> None:
        """Start new episodes; environment i, counted over all processes, is seeded with `seed + i`."""
        for row, env in self.envs.items():
            arrays.observations[row], _ = env.reset(seed=None if seed is None else seed + self.first + row)
        for part in self.parts:
            self._require_finite(part, {"an observation": arrays.observations})

    def step(self, arrays: SharedArrays, part: int) -> list[Episode]:
        """Take the actions of one half, and return the episodes that ended."""
        if not (rows := self.parts[part]):
            return []
        episodes = []
        columns = {"an observation": arrays.observations, "a reward": arrays.rewards}
        actions: Any = arrays.actions.tolist() if self.discrete else arrays.actions  # Python integers are faster
        for row in rows:
            env = self.envs[row]
            obs, reward, terminated, truncated, _ = env.step(actions[row])
            if terminated or truncated:
                columns["a last observation"] = arrays.final_observations
                arrays.final_observations[row] = obs
                obs, _ = env.reset()
                # A game can also end during a reset (EpisodicLife, FireReset): both are counted.
                if (statistics := self.statistics[row]) is not None:
                    episodes += [Episode(self.first + row, *episode) for episode in statistics.finished]
                    statistics.finished.clear()
            arrays.observations[row] = obs
            arrays.rewards[row] = reward
            arrays.terminated[row] = terminated
            arrays.truncated[row] = truncated
        self._require_finite(rows, columns)
        return episodes

    def _require_finite(self, part: range, columns: dict[str, NDArray[Any]]) -> None:
        rows = slice(part.start, part.stop)
        for what, array in columns.items():
            # A sum of squares tells in less than half the time, unless numbers are huge.
            if array.dtype.kind != "f" or float(np.vdot(array[rows], array[rows])) < LARGEST**2:
                continue
            for row in part:
                if not np.isfinite(array[row]).all():
                    raise EnvError(f"{self.envs[row]} gave {what} that is not finite")
                if (np.abs(array[row]) > LARGEST).any():
                    raise EnvError(f"{self.envs[row]} gave {what} beyond float32's {LARGEST:.1e}")

    def set_attr(self, name: str, value: Any) -> None:
        """Set an attribute of every environment, of its outermost layer that has it.

        Raises:
            AttributeError: if none has it, or it would be lost when the run is resumed.
        """
        for env in self.envs.values():
            layers = list(layers_of(env.env))
            owner = next((layer for layer in layers if hasattr(layer, name)), None)
            if owner is None:
                raise AttributeError(f"{env.name} has no attribute {name!r}")
            if owner is layers[-1] and any(isinstance(layer, PlayedAgain) for layer in layers):
                raise AttributeError(f"{env.name} is resumed by playing its episode again, and would lose {name!r}")
            setattr(owner, name, value)

    def capture(self) -> dict[int, Any]:
        """Return the state of each environment, by row."""
        return {row: capture(env.env) for row, env in self.envs.items()}

    def restore(self, states: list[Any]) -> None:
        """Put back the states of this group's rows, given those of all rows."""
        for row, env in self.envs.items():
            restore(env.env, states[row])

    def close(self) -> None:
        """Close the environments; what one raises is a warning."""
        for env in self.envs.values():
            try:
                env.env.close()
            except Exception as error:
                warnings.warn(f"{env.name} can't be closed: {described(error)}", stacklevel=2)


class Worker:
    """A process that holds a group of environments, seen from the training process.

    It is spawned: a fork would copy torch's locks, held by threads, and a fork server is one more process, of 7 MB.

    Raises:
        ConfigError: if the script comes from standard input, or trains whenever it is imported: a spawned process also
            loads it, from its file.
    """

    def __init__(self, make_env: MakeEnv, parts: Sequence[range], first: int, arrays: SharedArrays) -> None:
        if getattr(sys.modules["__main__"], "__file__", None) == "<stdin>":
            raise ConfigError("--num-workers must be 1 for a script from standard input: workers load it from a file")
        context = multiprocessing.get_context("spawn")
        rows = " and ".join(f"{first + part[0]} to {first + part[-1]}" for part in parts)
        self.name = f"environment worker (environments {rows})"
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, make_env, parts, first, arrays), name=self.name, daemon=True
        )
        try:
            self.process.start()
        except RuntimeError:  # Python's, in a worker whose script trains, too
            guard = 'if __name__ == "__main__":'
            message = f"--num-workers must be 1, or a script train below `{guard}`: workers load it, too"
            raise ConfigError(message) from None
        theirs.close()  # so that a worker's death is an end of file here

    def send(self, message: tuple[str, Any]) -> None:
        """Ask for something; `receive` must follow."""
        try:
            self.connection.send_bytes(pickle.dumps(message))  # `connection.send` takes several times as long
        except OSError:
            self.receive()  # its last message says more than a broken pipe

    def receive(self) -> Any:
        """Wait for the answer to the oldest message."""
        try:
            failure, result = _hear(self.connection)
        except (EOFError, OSError) as error:
            self.process.join(timeout=PATIENCE)
            code = self.process.exitcode
            said = "; its own error is above" if code == 1 else ""  # Python's status after an exception
            raise WorkerError(f"the {self.name} died without an answer, exit code {code}{said}") from error
        if isinstance(failure, EnvError):
            raise failure from (WorkerError(f"in the {self.name}:\n\n{failure.trace}") if failure.trace else None)
        if failure is not None:
            raise WorkerError(f"the {self.name} raised {failure.splitlines()[-1]}", failure)
        return result

    def join(self) -> None:
        """Wait until the process has exited, but not for ever."""
        self.process.join(timeout=PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _hear(connection: Connection) -> Any:
    """Wait for a message: first polling for a while, yielding the core to others, then asleep."""
    if sys.platform != "win32":
        inbox = select.poll()
        inbox.register(connection.fileno(), select.POLLIN)
        bedtime = time.perf_counter() + AWAKE
        while not inbox.poll(0) and time.perf_counter() < bedtime:
            os.sched_yield()
    return pickle.loads(connection.recv_bytes())


def _work(connection: Connection, make_env: MakeEnv, parts: Sequence[range], first: int, arrays: SharedArrays) -> None:
    """Run a worker: answer each message with (failure or None, result) until the other end is closed.

    The first message makes the environments; later ones reset or step them, or carry their states.
    """
    # Ctrl-C, and often the other signals, reach the whole process group: the training process decides, and hangs up.
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    cv2.setNumThreads(1)
    gym.logger.min_level = gym.logger.ERROR  # the training process plays such environments, too, and has warned
    group: EnvGroup | None = None
    with contextlib.suppress(EOFError, OSError):  # the training process is done or gone
        while True:
            command, argument = _hear(connection)
            result: Any = []
            failure: EnvError | str | None = None
            try:
                if command in ("make", "reset") and argument is not None:
                    seed_generators(argument, *(first + part.stop for part in parts))
                if group is None:
                    group = EnvGroup(make_env, parts, first)
                elif command == "reset":
                    group.reset(arrays, argument)
                elif command == "step":
                    result = group.step(arrays, argument)
                elif command == "set":
                    try:
                        group.set_attr(*argument)
                    except AttributeError as error:
                        result = error
                elif command == "capture":
                    result = group.capture(), capture_generators()
                else:
                    states, generators = argument
                    group.restore(states)
                    if generators is not None:
                        restore_generators(generators)
            except (CantCapture, CantRestore) as error:
                result = error
            except EnvError as error:
                failure = error
            except BaseException:
                failure = traceback.format_exc()
            connection.send_bytes(pickle.dumps((failure, result)))
    if group is not None:
        group.close()
