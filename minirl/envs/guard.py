"""The boundary to a user's environment: what it returns is converted to plain types, and its faults are reported.

Every environment is played through a `Guard`, in this process and in workers, in training, evaluation and videos: the
rest of the code sees Python's numbers, and arrays of the declared shape and dtype, whatever types the environment uses.
docs/reliability.md has the table of what may be returned. For correct values this costs a comparison of types;
everything else is handled in separate functions.
"""

import functools
import importlib
import operator
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

import minirl
from minirl.checks import described
from minirl.envs.state import seeded_reset

Info = dict[str, Any]
Step = tuple[Any, float, bool, bool, Info]

OLD_API = {
    "reset": "follows the old Gym API: `reset` must return (observation, info)",
    "step": "follows the old Gym API: `step` must return (observation, reward, terminated, truncated, info)",
    "seed": "follows the old Gym API: `reset` must take `seed` and `options`",
}
NUMBERS = "biuf"  # kinds of NumPy's types
MINIRL, GYMNASIUM, IMPORTLIB = (f"{Path(str(package.__file__)).parent}{os.sep}" for package in (minirl, gym, importlib))
OURS = (MINIRL, GYMNASIUM, IMPORTLIB, "<frozen importlib")  # paths of code that is not the environment's
# Files of ours that call an environment or make one: what they call may be a wrapper that a user edits.
CALLS = tuple(os.path.join(MINIRL, "envs", name) for name in ("guard.py", "ids.py", "state.py"))


class EnvError(RuntimeError):
    """An environment raised, or returned something that can't be learned from.

    The message is one line that names the environment and the step; the exception that it raised is the cause.

    Attributes:
        trace: the traceback of what it raised, cut to its own frames; empty if there are none.
    """

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


class UnusableError(Exception):
    """What an environment returned can't be used. The message continues after the environment's name."""


class Guard:
    """An environment to play: its numbers are plain Python or NumPy types, and its faults are `EnvError`s.

    Args:
        env: the environment.
        row: its number among several, for messages.
    """

    def __init__(self, env: gym.Env[Any, Any], row: int | None = None) -> None:
        self.env = env
        self._step: Any = env.step
        self._taken = as_taken(env.action_space)
        space: Any = env.observation_space
        self.shape, self.dtype = space.shape, space.dtype
        self.states = states_of(space) if isinstance(space, gym.spaces.Discrete) else range(0)
        number, env_id = "" if row is None else f" {row}", "without an id" if env.spec is None else env.spec.id
        self.name = f"environment{number} ({env_id})"
        self.steps = 0  # since its creation

    def __str__(self) -> str:
        """Return its name and its current step, the beginning of a message."""
        return f"{self.name}, at its step {self.steps:,}," if self.steps else f"{self.name}, in its first reset,"

    def reset(self, *, seed: int | None = None) -> tuple[Any, Info]:
        """Start an episode: as `gymnasium.Env.reset`.

        Raises:
            EnvError: if the environment raises, or returns something else.
        """
        try:
            obs, info = self.env.reset() if seed is None else seeded_reset(self.env, seed)
            if not isinstance(info, dict):  # for example two numbers that are the whole observation
                raise UnusableError(OLD_API["reset"])
            return self._plain(obs), info
        except (Exception, SystemExit) as error:
            fault, cause = blame(error, str(self), "reset")
            raise fault from cause

    def step(self, action: Any) -> Step:
        """Take an action: as `gymnasium.Env.step`, with plain numbers. Choices count from 0, for any `start`.

        The environment gets what `action_space.sample()` and Gymnasium's vector environments would pass (`as_taken`).

        Raises:
            EnvError: if the environment raises, or returns something else.
        """
        self.steps += 1
        try:
            returned: Step = self._step(self._taken(action))
            obs, reward, terminated, truncated, info = returned
            if type(reward) is float and type(terminated) is type(truncated) is bool and type(info) is dict:  # mostly
                if type(obs) is int:
                    if obs in self.states:
                        return returned
                elif type(obs) is np.ndarray and obs.dtype == self.dtype and obs.shape == self.shape:
                    return returned
            if not isinstance(info, dict):
                raise UnusableError(f"returned an info that is no dictionary: {_shown(info)}")
            return self._plain(obs), plain_reward(reward), bool(terminated), bool(truncated), info
        except (Exception, SystemExit) as error:
            fault, cause = blame(error, str(self), "step")
            raise fault from cause

    def render(self) -> Any:
        """Return the environment's rendering.

        Raises:
            EnvError: if it raises.
            gymnasium.error.Error: if a package for that is missing.
        """
        try:
            return self.env.render()
        except gym.error.Error:
            raise
        except Exception as error:
            fault, cause = blame(error, f"{self.name}, drawn at its step {self.steps:,},", "render")
            raise fault from cause

    def _plain(self, obs: Any) -> Any:
        if type(obs) is int and obs in self.states:
            return obs
        return plain_state(obs, self.states) if self.states else plain_array(obs, self.shape, self.dtype)


def as_taken(space: gym.Space[Any]) -> Callable[[Any], Any]:
    """Return a function that turns a policy's action into one that an environment takes.

    For a Discrete space that is a number of its dtype, mostly `np.int64`; otherwise an array of the space's shape and
    dtype, which the environment may keep. Choices count from the space's `start`. For a Box it is the nearest within
    the bounds; NaN stays NaN.
    """
    start = getattr(space, "start", 0)
    if isinstance(space, gym.spaces.Discrete):
        of_its_dtype = functools.cache(np.dtype(space.dtype).type)  # making one anew takes ten times as long
        return of_its_dtype if start == 0 else lambda action: of_its_dtype(action + int(start))
    if isinstance(space, gym.spaces.Box):
        low, high = space.low, space.high
        # What np.clip does, in a third of the time.
        return lambda action: np.minimum(np.maximum(action, low), high, out=np.empty_like(low))
    return lambda action: np.asarray(action + start, space.dtype)


def states_of(space: gym.spaces.Discrete) -> range:
    """Return the numbers of a Discrete space."""
    return range(int(space.start), int(space.start + space.n))


def plain_reward(reward: Any) -> float:
    """Return a reward as a float.

    Raises:
        UnusableError: if it is not a number.
    """
    try:
        if isinstance(reward, str | bytes):
            raise TypeError("float would read it")
        return float(_single(reward, "a reward"))
    except (TypeError, ValueError, OverflowError):
        raise UnusableError(f"paid a reward that is no number: {_shown(reward)}") from None


def plain_state(state: Any, states: range) -> int:
    """Return a state as an int.

    Raises:
        UnusableError: if it is not in `states`: as a Python index, -1 would be the last one.
    """
    try:
        number = operator.index(_single(state, "a state"))
    except TypeError:
        raise UnusableError(f"showed a state that is no whole number: {_shown(state)}") from None
    if number not in states:
        raise UnusableError(f"showed the state {number}, and its space has {states[0]} to {states[-1]}")
    return number


def plain_array(obs: Any, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Return an observation as an array of this shape and dtype; NumPy would broadcast other shapes.

    Raises:
        UnusableError: if it has another shape, is not an array of numbers, or the cast would change whole numbers.
    """
    try:
        array = np.asarray(obs)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in NUMBERS:
        raise UnusableError(f"showed an observation that is no array of numbers: {_shown(obs)}")
    if array.shape != shape:
        raise UnusableError(f"showed an observation of shape {array.shape}, not {shape}")
    with np.errstate(invalid="ignore", over="ignore"):
        cast = array.astype(dtype)
    if cast.dtype.kind != "f" and (cast != array).any():
        raise UnusableError(f"showed an observation of {array.dtype} with numbers that {dtype} has not")
    return cast


def _single(value: Any, what: str) -> Any:
    """Return the number in an array of one, as Gymnasium's checker does, with a warning; anything else unchanged."""
    if isinstance(value, np.ndarray) and value.ndim > 0 and value.size == 1:
        gym.logger.warn(f"An environment returns {what} as an array of shape {value.shape}: its one number is taken.")
        return value.item()
    return value


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def blame(error: Exception | SystemExit, where: str, method: str) -> tuple[EnvError, BaseException | None]:
    """Return what to raise for an error in a method of an environment, and its cause.

    Args:
        error: what was raised.
        where: the name of the environment, and the step.
        method: `reset`, `step` or `render`.
    """
    if isinstance(error, EnvError):
        return error, error.__cause__
    if isinstance(error, UnusableError):
        return EnvError(f"{where} {error}"), None
    if not is_theirs(traceback.extract_tb(error.__traceback__)[-1]):
        if any(f"got an unexpected keyword argument '{name}'" in str(error) for name in ("seed", "options")):
            return EnvError(f"{where} {OLD_API['seed']}"), error
        if "unpack" in str(error) and method in OLD_API:
            return EnvError(f"{where} {OLD_API[method]}"), error
    culprit, trace = culprit_of(error)
    return EnvError(f"{where} raised {described(culprit)}", trace), culprit


def culprit_of(error: BaseException) -> tuple[BaseException, str]:
    """Return which of an error and its causes was raised in the environment's code, and its traceback cut to that code.

    If none was: the error itself, and the traceback of the wrapper in this package that raised it, if one did.
    """
    candidate: BaseException | None = error
    while candidate is not None:
        trace = traceback.TracebackException.from_exception(candidate)
        _cut(trace)
        if trace.stack or isinstance(candidate, SyntaxError):  # a SyntaxError names the file itself
            return candidate, "".join(trace.format())
        candidate = candidate.__cause__ or candidate.__context__
    return error, _trace_of_wrapper(error)


def _trace_of_wrapper(error: BaseException) -> str:
    """Return the traceback from the last file of `CALLS` on, if it ends in another file of this package."""
    trace = traceback.TracebackException.from_exception(error, compact=True)
    calls = [place for place, frame in enumerate(trace.stack) if frame.filename in CALLS]
    frames = trace.stack[calls[-1] + 1 :] if calls else []
    if not frames or not frames[-1].filename.startswith(MINIRL):
        return ""
    trace.stack = traceback.StackSummary.from_list(frames)
    return "".join(trace.format())


def _cut(trace: traceback.TracebackException) -> None:
    trace.stack = traceback.StackSummary.from_list([frame for frame in trace.stack if is_theirs(frame)])
    for cause in (trace.__cause__, trace.__context__):
        if cause is not None:
            _cut(cause)


def is_theirs(frame: traceback.FrameSummary) -> bool:
    """Whether a frame belongs to the environment or to code that it calls."""
    return not frame.filename.startswith(OURS)
