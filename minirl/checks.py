"""What is refused, and how: an error of the user's, and tensors that do not fit. Imports nothing at run time."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class ConfigError(ValueError):
    """A setting, flag or file that the user can put right. The message names it and says what would be right."""


def require_same_shape(**tensors: "Tensor") -> None:
    """Raise ValueError unless all tensors have one shape.

    PyTorch would broadcast (B,) against (B, 1) to (B, B) without a word, and the loss would still look sane.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes must be the same: {listed}")
