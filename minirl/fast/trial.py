"""Trying a function out before it is compiled: called once, with copies of all that it may change."""

import copy
import dis
import functools
import inspect
import os
import pickle
import random
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from minirl.fast.rewrites import CantCompile, own_attributes

NOT_THEIRS = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))  # code that users do not edit


def parameters_reached(
    function: Callable[..., Any],
    bound: Sequence[Any],
    parameters: Sequence[Tensor],
    arguments: Sequence[Any],
    device: torch.device,
) -> list[bool]:
    """Call a function once, with copies, and return to which of some parameters it gives a gradient.

    Copied are its arguments, and what it reads by name from its module and from functions around it. What it reaches in
    other ways, such as an attribute of a class or a mutable default, it changes.

    Raises:
        CantCompile: if it can't be called with copies, draws from Python's or NumPy's global generator, or sets an
            optimiser's own attribute, which compiled code would lose.
    """
    forwards = [type(layer).forward for item in bound if isinstance(item, nn.Module) for layer in item.modules()]
    places = places_read_by([function, *forwards], but_in=NOT_THEIRS)
    memo: dict[int, Any] = {}
    try:
        given = (function, bound, parameters, arguments)
        function_there, twins, copies, arguments_there = copy.deepcopy(given, memo)
    except Exception as error:  # a copy may raise anything
        raise CantCompile(f"what it is given can't be copied, to try it: {error}") from error
    others = [place.copied(memo) for place in places]
    stepped: list[Optimizer] = []
    own: list[tuple[Optimizer, dict[str, Any]]] = []  # copied optimisers, with what is not PyTorch's of them
    for item, twin in zip(bound, twins, strict=True):
        if isinstance(item, Optimizer):  # whose own way of copying leaves that out
            own.append((twin, copy.deepcopy(own_attributes(item), memo)))
            vars(twin).update(own[-1][1])
            twin.register_step_post_hook(lambda twin, *_: stepped.append(twin))
    reached: set[int] = set()
    for weight in copies:
        if weight.requires_grad:
            weight.grad = None
            weight.register_post_accumulate_grad_hook(lambda weight: reached.add(id(weight)))
    before = global_generators()
    try:
        for place, other in zip(places, others, strict=True):
            place.put(other)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            function_there(*twins, *arguments_there)
    finally:
        for place in places:
            place.put(place.value)
        after = global_generators()
        random.setstate(before["Python's `random`"])
        np.random.set_state(before["NumPy's `np.random`"])  # noqa: NPY002
    for twin, attributes in own:
        for name, value in own_attributes(twin).items():
            if attributes.get(name, twin) is not value:
                raise CantCompile(f"the optimiser's `step` sets `{name}`, which is lost; keep it in `param_groups`")
    for item, twin in zip(bound, twins, strict=True):
        new = isinstance(item, SGD) and not item.state and any(group["momentum"] for group in item.param_groups)
        if new and sum(one is twin for one in stepped) > 1:
            raise CantCompile("PyTorch's compiler would lose the momentum between two first steps of SGD")
    for name in before:
        if pickle.dumps(before[name]) != pickle.dumps(after[name]):
            raise CantCompile(f"it draws from {name}, which PyTorch's compiler gets wrong; draw by PyTorch")
    return [id(weight) in reached for weight in copies]


def global_generators() -> dict[str, Any]:
    """Return the states of the generators that PyTorch does not know, by name."""
    return {"Python's `random`": random.getstate(), "NumPy's `np.random`": np.random.get_state()}  # noqa: NPY002


class Place(NamedTuple):
    """Where a function finds a value: under a name in its module, or in a cell of a function around it."""

    holder: dict[str, Any] | types.CellType
    name: str
    value: Any

    def copied(self, memo: dict[int, Any]) -> Any:
        """Return a copy of the value; itself if it can't be copied, as an open file, or means itself, as `object()`."""
        if type(self.value) is object:
            return self.value
        try:
            return copy.deepcopy(self.value, memo)
        except Exception:  # a copy may raise anything
            return self.value

    def put(self, value: Any) -> None:
        """Put a value there."""
        if isinstance(self.holder, dict):
            self.holder[self.name] = value
        else:
            self.holder.cell_contents = value


def places_read_by(functions: Iterable[Callable[..., Any]], *, but_in: tuple[str, ...]) -> list[Place]:
    """Return where functions, and those that they call by name, find what may change, such as a generator of numbers.

    Modules, classes and functions are left out, and so is all that functions in files below the paths `but_in` read.
    """
    places: dict[tuple[int, str], Place] = {}
    waiting, seen = list(functions), set[int]()
    while waiting:
        function = waiting.pop()
        while isinstance(function, functools.partial):
            function = function.func
        function = inspect.unwrap(getattr(function, "__func__", function))  # of a method, of decorators
        if not isinstance(function, types.FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        if function.__code__.co_filename.startswith(but_in):
            continue
        for place in _read_by(function):
            if isinstance(place.value, types.FunctionType | types.MethodType):
                waiting.append(place.value)
            elif not isinstance(place.value, types.ModuleType | types.BuiltinFunctionType | type):
                places[id(place.holder), place.name] = place
    return list(places.values())


def _read_by(function: types.FunctionType) -> Iterator[Place]:
    for name in _names(function.__code__) & function.__globals__.keys():
        yield Place(function.__globals__, name, function.__globals__[name])
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield Place(cell, name, cell.cell_contents)
        except ValueError:  # nothing is in it yet
            continue


def _names(code: types.CodeType) -> set[Any]:
    """Return the names that a function's code, and that of the functions within it, reads from its module."""
    read = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return read.union(*(_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)))
