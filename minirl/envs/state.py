"""Capturing and restoring an environment, so that a resumed run continues in the middle of its episodes.

What the next step depends on is in the attributes of an environment, of its wrappers and of the environments that it
holds: numbers, arrays, random generators, and containers of these. They are captured by name, each once: what two of
them share, such as an array, they share again. Environments, spaces, functions and classes stay those that the new
environment was made with, and get back what may have changed in them: attributes, the generator that `sample` draws
from, the variables that a function has closed over. If the new environment has another one in that place, because it
chooses as it plays, it can't be restored.

The emulator of an Atari game has its own state, which ALE can copy, random numbers included; so does MuJoCo's physics,
wherever it is held. Below a `PlayedAgain`, the episode so far is captured and played again. An environment that keeps
anything else (such as another physics engine) can't be captured, and the error names the attribute that stands in the
way.

What is captured is plain data (numbers, text, lists, dictionaries, byte arrays), which a checkpoint can hold and read
back without running any code from the file.
"""

import collections
import copy
import ctypes
import itertools
import random
import sys
import types
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from ale_py import ALEInterface, ALEState
from ale_py.env import AtariEnv
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers.utils import RunningMeanStd
from numpy.lib.array_utils import byte_bounds
from numpy.typing import NDArray

from minirl.envs.again import PlayedAgain
from minirl.streams import Stream

State = dict[str, Any]
Layer = gym.Env[Any, Any]

PLAIN = (bool, int, float, str, type(None))
NUMBERS_AND_TEXT = "biufcmMSU"  # kinds of NumPy's types: the others hold Python objects, or several fields
BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
# CONSTANT: what has no state of its own. KEPT: what is never recreated, only its parts are put back.
CONSTANT = (EnvSpec, ALEInterface, types.ModuleType, np.dtype)
# Also constant, by name, as the package may be missing: the model that defines the physics, and the rendering window.
MUJOCO_CONSTANT = ("MjModel", "MujocoRenderer")
KEPT = (gym.Env, gym.spaces.Space, RunningMeanStd, types.FunctionType, type, *CONSTANT)
# Attributes in which these Gymnasium classes store what an environment was made with.
MADE_WITH = {
    gym.utils.RecordConstructorArgs: ("_saved_kwargs",),
    gym.utils.EzPickle: ("_ezpickle_args", "_ezpickle_kwargs"),
}


class CantCapture(Exception):
    """An environment holds something that is not plain data. The message says what."""


class CantRestore(ValueError):
    """A saved state is of an environment that was made differently. The message says how."""


class OtherPart(CantRestore):
    """An environment now holds another object, function or class than when it was saved: it chooses as it plays."""


def capture(env: Layer) -> State:
    """Return the state of an environment, which stays unchanged.

    Raises:
        CantCapture: naming the class and the attribute that is not plain data.
    """
    try:
        state: State = encode(env)
    except (RecursionError, ValueError) as error:  # endless nesting, or closure variables that are not set yet
        raise CantCapture(f"{type(env.unwrapped).__name__} raises {error!r}") from error
    return state


def restore(env: Layer, state: State) -> None:
    """Put back what `capture` returned, into an environment made in the same way.

    Raises:
        CantRestore: if the environment has other layers, or one of them has other attributes.
    """
    seeded_reset(env, 0)  # creates what only a first reset creates
    _put_back(state, [env], env)


def layers_of(env: Layer) -> Iterator[Layer]:
    """Yield the wrappers of an environment, outermost first, and its core."""
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env
    yield env


def seeded_reset(env: Layer, seed: int) -> tuple[Any, dict[str, Any]]:
    """Reset an environment with a seed; also seed the spaces of all its layers, which may sample from them.

    A space that belongs to the class, one for all environments, is copied to the environment first.
    """
    # Not the seed itself: environment and spaces would draw the same numbers.
    seeds = np.random.SeedSequence(seed, spawn_key=(Stream.SPACES,)).generate_state(2).tolist()
    layers = [env]
    for layer in layers:
        layers += [part for part in vars(layer).values() if isinstance(part, gym.Env) and part not in layers]
        for name, space_seed in zip(("action_space", "observation_space"), seeds, strict=True):
            if isinstance(getattr(type(layer), name, None), gym.spaces.Space):
                vars(layer).setdefault(name, copy.deepcopy(getattr(layer, name)))
            if isinstance(space := getattr(layer, name, None), gym.spaces.Space):
                space.seed(space_seed)
    return env.reset(seed=seed)


def seed_generators(seed: int, *place: int) -> None:
    """Seed Python's and NumPy's global generators of a worker process; `place` is unique to the worker."""
    words = np.random.SeedSequence(seed, spawn_key=(Stream.WORKER, *place)).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002 - environments may draw from the global generator


def capture_generators() -> State:
    """Return the states of Python's and NumPy's global generators, as plain data."""
    return {"numpy": encode(np.random.get_state(legacy=False)), "python": encode(random.getstate())}  # noqa: NPY002


def restore_generators(state: State) -> None:
    """Put back what `capture_generators` returned."""
    np.random.set_state(decode(state["numpy"]))  # noqa: NPY002
    random.setstate(decode(state["python"]))


def encode(value: Any) -> Any:
    """Describe a value so that `decode` makes the same one, with exact types, so that arithmetic stays the same.

    Numbers and text stand for themselves, lists and tuples for lists and tuples of described items; everything else is
    a dictionary whose first key says what it is.

    Raises:
        CantCapture: if an environment holds something that is not plain data.
        TypeError: naming the type, if the value itself is not plain data.
    """
    writer = _Writer()
    description = writer.describe(value)
    writer.describe_arrays()
    return description


def decode(state: Any) -> Any:
    """Make the value that `encode` described.

    Raises:
        ValueError: if it is not such a description.
    """
    return _make(state, [], None)


class _Writer:
    """Describes values. Mutable ones are numbered in order of appearance; when one comes again, its number is its
    whole description.
    """

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, Any]] = {}  # by id: the number, and the object, or its id might be reused
        self.arrays: list[tuple[NDArray[Any], State, int]] = []

    def describe(self, value: Any) -> Any:
        kind = type(value)
        if kind in PLAIN:
            return value
        if kind is tuple:
            return tuple(self.describe(item) for item in value)
        if kind is frozenset:
            return {"frozenset": [self.describe(item) for item in value]}
        if kind is bytes:
            return {"bytes": np.frombuffer(value, np.uint8)}
        if isinstance(value, np.generic) and value.dtype.kind in NUMBERS_AND_TEXT and value.nbytes:
            return {"scalar": value.dtype.str, "bytes": value.tobytes().hex()}

        if id(value) in self.seen:
            return {"again": self.seen[id(value)][0]}
        number = len(self.seen)
        self.seen[id(value)] = number, value
        if kind is list:
            return [self.describe(item) for item in value]
        if kind is dict:
            return {"dict": [(self.describe(key), self.describe(item)) for key, item in value.items()]}
        if kind is set:
            return {"set": [self.describe(item) for item in value]}
        if kind is collections.deque:
            return {"deque": [self.describe(item) for item in value], "maxlen": value.maxlen}
        if kind is np.ndarray and value.dtype.kind in NUMBERS_AND_TEXT:
            state: State = {}
            self.arrays.append((value, state, number))
            return state
        if kind is np.random.Generator:
            bits = value.bit_generator
            return {"generator": type(bits).__name__, "state": self.describe(bits.state)}
        if kind is np.random.RandomState:
            return {"random state": self.describe(value.get_state(legacy=False))}
        if kind is random.Random:
            return {"random": self.describe(value.getstate())}
        if is_physics(value):
            return {"physics": self.describe(physics_state(value))}
        if isinstance(value, KEPT):
            return self.describe_kept(value)
        raise TypeError(kind.__name__)

    def describe_kept(self, value: Any) -> State:
        state: State = {"kept": name_of(value)}
        if isinstance(value, AtariEnv):
            if value.ale.getFloat("repeat_action_probability") > 0:
                raise CantCapture("with sticky actions, ALE's own state lacks the button that is held")
            state["emulator"] = self.describe(value.ale.cloneState(include_rng=True).__getstate__())
        parts = state["parts"] = {}
        for name, part in _parts(value).items():
            try:
                parts[name] = self.describe(part)
            except TypeError as error:
                if not isinstance(value, gym.Env):
                    raise
                raise CantCapture(f"{type(value).__name__}.{name} is a {error}") from None
        return state

    def describe_arrays(self) -> None:
        """Describe the arrays so far. If some overlap, the first one holds the memory of all of them."""
        groups: list[list[int]] = []
        end = -1
        for low, high, place in sorted((*byte_bounds(array), i) for i, (array, _, _) in enumerate(self.arrays)):
            if low >= end:
                groups.append([])
            groups[-1].append(place)
            end = max(end, high)
        for group in groups:
            members = [self.arrays[place] for place in sorted(group)]
            if len(members) == 1:  # perhaps a small view of a large array that nothing else here uses
                array, state, number = members[0]
                members = [(array.copy(order="K"), state, number)]
            lows, highs = zip(*(byte_bounds(array) for array, _, _ in members), strict=True)
            memory: Any = np.frombuffer(ctypes.string_at(min(lows), max(highs) - min(lows)), np.uint8)
            for array, state, _ in members:
                state |= {"array": memory, "dtype": array.dtype.str, "start": array.ctypes.data - min(lows)}
                state |= {"shape": array.shape, "strides": array.strides}
                memory = members[0][2]


def _make(state: Any, seen: list[Any], old: Any) -> Any:
    """Make what is described; `seen` has what came before, by number, and `old` is the new environment's value in that
    place.
    """
    if type(state) is tuple:
        return tuple(_make(item, seen, old_item) for item, old_item in _beside(state, old))
    if type(state) is list:
        things: list[Any] = []
        seen.append(things)
        things.extend(_make(item, seen, old_item) for item, old_item in _beside(state, old))
        return things
    if type(state) is not dict:
        return state
    kind, value = next(iter(state.items()))
    if kind == "again":
        return seen[value]
    if kind == "frozenset":
        return frozenset(_make(item, seen, None) for item in value)
    if kind == "bytes":
        return np.asarray(value).tobytes()
    if kind == "scalar":
        return np.frombuffer(bytes.fromhex(state["bytes"]), value)[0]

    number = len(seen)
    seen.append(None)
    if kind == "dict":
        made: Any = {}
        seen[number] = made
        for key_state, item in value:
            key = _make(key_state, seen, None)
            made[key] = _make(item, seen, old.get(key) if isinstance(old, dict) else None)
    elif kind == "set":
        made = seen[number] = {_make(item, seen, None) for item in value}
    elif kind == "deque":
        made = seen[number] = collections.deque(maxlen=state["maxlen"])
        made.extend(_make(item, seen, old_item) for item, old_item in _beside(value, old))
    elif kind == "array":
        made = seen[number] = _make_array(
            state, seen[value].base if isinstance(value, int) else np.asarray(value).copy()
        )
    elif kind == "generator":
        if value not in BIT_GENERATORS:
            raise ValueError(f"there is no generator of random numbers called {value!r}")
        bits = getattr(np.random, value)()
        bits.state = _make(state["state"], seen, None)
        made = seen[number] = np.random.Generator(bits)
    elif kind == "random state":
        made = seen[number] = np.random.RandomState()
        made.set_state(_make(value, seen, None))
    elif kind == "random":
        made = seen[number] = random.Random()
        made.setstate(_make(value, seen, None))
    elif kind == "kept":
        made = seen[number] = old
        _put_back(state, seen, old)
    elif kind == "physics":
        made = seen[number] = old
        set_physics_state(old, _make(value, seen, None))
    else:
        raise ValueError(f"no value is called {kind!r}")
    return made


def _make_array(state: State, memory: NDArray[np.uint8]) -> NDArray[Any]:
    dtype = np.dtype(state["dtype"])
    if dtype.kind not in NUMBERS_AND_TEXT:
        raise ValueError(f"no array of plain data has the type {dtype}")
    return np.ndarray(state["shape"], dtype, memory, state["start"], state["strides"])


def _put_back(state: State, seen: list[Any], old: Any) -> None:
    """Put the parts of a kept object back into the new environment's object in its place."""
    name_now = name_of(old)
    if name_now != state["kept"]:
        kind = CantRestore if any(old is layer for layer in layers_of(seen[0])) else OtherPart
        raise kind(f"the environment was made of a {state['kept']}, and is now of a {name_now}")
    parts = _parts(old)
    # Our classes have all their attributes from the start; others may add attributes as they play.
    gone = state["parts"].keys() - parts.keys()
    if gone and type(old).__module__.startswith("minirl."):
        raise CantRestore(f"{name_now} has no {' or '.join(sorted(gone))} any more")
    if isinstance(old, AtariEnv):
        emulator = ALEState.__new__(ALEState)
        emulator.__setstate__(_make(state["emulator"], seen, None))
        old.ale.restoreState(emulator)
    for name, part in state["parts"].items():
        made = _make(part, seen, parts.get(name))
        if isinstance(old, types.FunctionType):
            (old.__closure__ or ())[int(name)].cell_contents = made
        elif name not in parts or made is not parts[name]:
            setattr(old, name, made)
    if isinstance(old, PlayedAgain):
        old.play()


def _parts(value: Any) -> dict[str, Any]:
    """Return the parts of a kept object that may change, by name."""
    if isinstance(value, types.FunctionType):
        return {str(i): cell.cell_contents for i, cell in enumerate(value.__closure__ or ())}
    if isinstance(value, gym.spaces.Space):
        return {name: part for name, part in vars(value).items() if name == "_np_random" or "space" in name}
    if isinstance(value, RunningMeanStd):
        return vars(value)
    if not isinstance(value, gym.Env):
        return {}
    if isinstance(value, AtariEnv):  # the rest is set only once
        return {name: getattr(value, name) for name in ("_np_random", "action_space", "observation_space")}
    if isinstance(value, PlayedAgain):
        return value.parts()
    made_with = {name for kind, names in MADE_WITH.items() if isinstance(value, kind) for name in names}
    return {name: part for name, part in vars(value).items() if not (name in made_with or is_constant(part))}


def name_of(value: Any) -> str:
    """Return what tells a kept object from others that may be in its place: for most, its class."""
    if isinstance(value, types.FunctionType):
        code = value.__code__
        numbers = [number for number in (*code.co_consts, *(value.__defaults__ or ())) if type(number) in PLAIN]
        text = repr((code.co_code, numbers, code.co_names, list(code.co_positions())))  # lambdas may share a line
        return f"function {value.__qualname__}, line {code.co_firstlineno} ({zlib.crc32(text.encode()):x})"
    return f"class {value.__qualname__}" if isinstance(value, type) else type(value).__name__


def is_constant(part: Any) -> bool:
    """Whether something has no state of its own."""
    return isinstance(part, CONSTANT) or type(part).__name__ in MUJOCO_CONSTANT


def is_physics(value: Any) -> bool:
    """Whether this is the data of a MuJoCo simulation; the package is loaded then."""
    return type(value).__name__ == "MjData" and "mujoco" in sys.modules


def physics_state(data: Any) -> State:
    """Return what the next step of a MuJoCo simulation depends on, and what was computed in the last step.

    An environment may read some of the latter before the next step: Ant reads where its body was.
    """
    mujoco = sys.modules["mujoco"]
    everything = mujoco.mjtState.mjSTATE_INTEGRATION
    integrated = np.empty(mujoco.mj_stateSize(data.model, everything))
    mujoco.mj_getState(data.model, data, integrated, everything)
    return {"integrated": integrated, "computed": {name: array.copy() for name, array in arrays_of(data).items()}}


def set_physics_state(data: Any, state: State) -> None:
    """Put back what `physics_state` returned, into a simulation of the same model."""
    mujoco = sys.modules["mujoco"]
    mujoco.mj_setState(data.model, data, state["integrated"], mujoco.mjtState.mjSTATE_INTEGRATION)
    for name, array in arrays_of(data).items():
        if array.shape == state["computed"][name].shape:  # arrays about contacts are as long as there are contacts
            array[...] = state["computed"][name]


def arrays_of(data: Any) -> dict[str, NDArray[Any]]:
    """Return the memory of a MuJoCo simulation, by name."""
    named = ((name, getattr(data, name)) for name in dir(data) if not name.startswith("_"))
    return {name: value for name, value in named if isinstance(value, np.ndarray)}


def _beside(states: Iterable[Any], old: Any) -> Iterable[tuple[Any, Any]]:
    """Pair descriptions with the new environment's values in their places, or None."""
    olds = old if isinstance(old, list | tuple | collections.deque) else ()
    return zip(states, itertools.chain(olds, itertools.repeat(None)), strict=False)
