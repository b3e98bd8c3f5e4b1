"""What a function reads that is not among its arguments, so that a trial call can be given copies of it."""

import copy
import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple


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
