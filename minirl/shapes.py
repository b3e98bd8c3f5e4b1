"""Shape checks for the pure functions of the algorithms."""

from torch import Tensor


def require_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors have one shape.

    PyTorch would broadcast (B,) against (B, 1) to (B, B) without a word, and the loss would still look sane.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes must be the same: {listed}")
