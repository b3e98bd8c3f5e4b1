"""Small layers in NumPy where nothing is learned: for a few observations each call of PyTorch costs more than its sums.

Two layers of 24 take 10 microseconds instead of 30, which counts where each step looks at one observation.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

FEW = 500_000  # multiplications: beyond, PyTorch is as fast

Layer = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class SmallSequential(nn.Sequential):
    """An `nn.Sequential`, which NumPy computes, to rounding, for a few float32 vectors (B, n) without gradients.

    It does so where the layers are linear ones, ReLU and tanh on the processor: exactly these types, without hooks.
    For anything else, and wherever a gradient is wanted or something is compiled, it is an `nn.Sequential`.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, n) -> (B, m)."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or inputs.ndim != 2:
            return super().forward(inputs)  # type: ignore[no-untyped-call,no-any-return]
        layers = self._in_numpy()
        if layers is None or inputs.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(inputs)  # type: ignore[no-untyped-call,no-any-return]
        if len(inputs) * self.__dict__["multiplications"] > FEW:
            return super().forward(inputs)  # type: ignore[no-untyped-call,no-any-return]
        values = inputs.numpy()
        for layer in layers:
            values = layer(values)
        return torch.from_numpy(values)

    def _in_numpy(self) -> list[Layer] | None:
        """The layers, on the memory of the weights; made anew when that is another, or there are other layers."""
        seen = [
            (module, [None if weight is None else weight.data_ptr() for weight in module._parameters.values()])
            for module in self._modules.values()
            if module is not None
        ]
        if self.__dict__.get("seen") != seen:
            # Beside the modules and parameters that `nn.Module` keeps track of: nothing of it is saved.
            layers = [_layer(module) for module, _ in seen]
            self.__dict__["layers"] = None if None in layers else layers
            self.__dict__["multiplications"] = sum(weight.numel() for weight in self.parameters())
            self.__dict__["seen"] = seen
        result: list[Layer] | None = self.__dict__["layers"]
        return result

    def __getstate__(self) -> dict[str, object]:
        return {
            name: value for name, value in self.__dict__.items() if name not in ("layers", "multiplications", "seen")
        }


def _layer(module: nn.Module) -> Layer | None:
    # Exactly these types: a subclass may compute something else.
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    if type(module) is nn.ReLU:
        return lambda inputs: np.maximum(inputs, 0)
    if type(module) is nn.Tanh:
        return np.tanh
    if type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
        weight = module.weight.detach().numpy().T
        bias = np.float32(0) if module.bias is None else module.bias.detach().numpy()
        return lambda inputs: inputs @ weight + bias
    return None
