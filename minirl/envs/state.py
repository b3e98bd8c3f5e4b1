"""Capturing an environment and putting it back, so that a resumed run goes on in the middle of its episodes.

An environment is a chain of wrappers around a core. What the next step depends on lies in their attributes: numbers,
arrays, random generators, and containers of these; those are captured by name. The emulator of an Atari game has a
state of its own, which ALE can copy, random numbers included. An environment that keeps anything else (a physics
engine, say) can't be captured, and says which attribute stands in the way.

What is captured is plain data (numbers, text, lists, dictionaries, byte arrays), which a checkpoint can hold and read
back without running anybody's code.
"""

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from ale_py import ALEInterface, ALEState
from ale_py.env import AtariEnv

State = dict[str, Any]
Layer = gym.Env[Any, Any]

PLAIN = (bool, int, float, str, type(None))
# What never changes once an environment is made, or only draws it; `env` is the next layer.
LEFT_OUT = {"env", "spec", "metadata", "P", "_cached_spec", "_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs"}
BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")


class CantCapture(Exception):
    """An environment holds something that is not plain data. The message says what."""


class CantRestore(ValueError):
    """A saved state is of an environment that was made otherwise. The message says how."""


def capture(env: Layer) -> list[State]:
    """Return the state of each layer, outermost first.

    Raises:
        CantCapture: naming the class and the attribute that is no plain data.
    """
    return [_capture_layer(layer) for layer in layers_of(env)]


def restore(env: Layer, states: list[State]) -> None:
    """Put back what `capture` returned, into an environment made in the same way.

    Raises:
        CantRestore: if the environment has other layers, or one of them keeps other things.
    """
    layers = list(layers_of(env))
    names, saved_names = [type(layer).__name__ for layer in layers], [state["class"] for state in states]
    if names != saved_names:
        raise CantRestore(f"the environment was made of {saved_names}, and is now of {names}")
    for layer, state in zip(layers, states, strict=True):
        # What is ours has all its attributes from the start; others may add to theirs as they play.
        gone = state["attributes"].keys() - vars(layer).keys()
        if gone and type(layer).__module__.startswith("minirl."):
            raise CantRestore(f"{type(layer).__name__} has no {' or '.join(sorted(gone))} any more")
        for name, value in state["attributes"].items():
            setattr(layer, name, decode(value))
        if isinstance(layer, AtariEnv):
            emulator = ALEState.__new__(ALEState)
            emulator.__setstate__(decode(state["emulator"]))
            layer.ale.restoreState(emulator)


def layers_of(env: Layer) -> Iterator[Layer]:
    """Yield the wrappers of an environment, outermost first, and its core."""
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env
    yield env


def _capture_layer(layer: Layer) -> State:
    state: State = {"class": type(layer).__name__, "attributes": {}}
    attributes = dict(vars(layer))
    if isinstance(layer, AtariEnv):
        if layer.ale.getFloat("repeat_action_probability") > 0:
            raise CantCapture("with sticky actions, ALE's own state lacks the button that is held")
        state["emulator"] = encode(layer.ale.cloneState(include_rng=True).__getstate__())
        attributes = {"_np_random": layer.np_random}  # all else of it is set once
    for name, value in attributes.items():
        if name in LEFT_OUT or isinstance(value, gym.spaces.Space | ALEInterface):
            continue
        try:
            state["attributes"][name] = encode(value)
        except TypeError as error:
            raise CantCapture(f"{type(layer).__name__}.{name} is a {error}") from None
    return state


def encode(value: Any) -> State:
    """Describe a value so that `decode` makes the same one: exact types, so that arithmetic with it stays the same.

    Raises:
        TypeError: naming the type, if the value is no plain data.
    """
    if isinstance(value, np.random.Generator):
        return {"generator": type(value.bit_generator).__name__, "state": encode(value.bit_generator.state)}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        data = np.frombuffer(value.tobytes(), np.uint8)
        return {"array": data, "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, np.generic):
        return {"scalar": encode(np.array(value))}
    if type(value) is bytes:
        return {"bytes": np.frombuffer(value, np.uint8)}
    if type(value) in PLAIN:
        return {"plain": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [encode(item) for item in value]}
    if type(value) is dict:
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    raise TypeError(type(value).__name__)


def decode(state: State) -> Any:
    """Make the value that `encode` described.

    Raises:
        ValueError: if it is no such description.
    """
    kind, value = next(iter(state.items()))
    if kind == "generator":
        if value not in BIT_GENERATORS:
            raise ValueError(f"there is no generator of random numbers called {value!r}")
        bits = getattr(np.random, value)()
        bits.state = decode(state["state"])
        return np.random.Generator(bits)
    if kind == "array":
        return np.frombuffer(np.asarray(value).tobytes(), state["dtype"]).reshape(state["shape"]).copy()
    if kind == "scalar":
        return decode(value)[()]
    if kind == "bytes":
        return np.asarray(value).tobytes()
    if kind == "plain":
        return value
    if kind == "dict":
        return {decode(key): decode(item) for key, item in value}
    items = [decode(item) for item in value]
    return tuple(items) if kind == "tuple" else items
