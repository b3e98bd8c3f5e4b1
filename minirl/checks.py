"""What is refused, and how: a user's mistake, tensors that do not fit, a class whose code has changed."""

import ast
import functools
import hashlib
import inspect
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class ConfigError(ValueError):
    """A setting, flag or file that the user can correct. The message names it and says what would be right."""


def described(error: BaseException) -> str:
    """Return an error's type and message, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def require_same_shape(**tensors: "Tensor") -> None:
    """Raise ValueError unless all tensors have one shape.

    PyTorch would silently broadcast (B,) against (B, 1) to (B, B), and the loss would still look sane.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes must be the same: {listed}")


@functools.cache
def fingerprint(kind: type) -> str:
    """Return a short text that changes with the code of a class, but not with its comments and docstrings.

    A faster replacement for exactly one class checks that the class is unchanged, so that an edit of it takes effect.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]
