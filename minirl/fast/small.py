"""What costs a small network more than its arithmetic: PyTorch's calls for few observations, walks over modules."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

FEW = 500_000  # multiplications: beyond, PyTorch is as fast as NumPy

Layer = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class _Known(NamedTuple):
    """What a `SmallSequential` was when it was last looked at, and that in NumPy."""

    modules: tuple[nn.Module | None, ...]
    parameters: list[dict[str, Any]]  # of those modules that have any
    memory: list[int]  # where they lie
    layers: list[Layer] | None  # None where PyTorch must do it
    rows: int  # inputs that are few


class SmallSequential(nn.Sequential):
    """An `nn.Sequential`, which NumPy computes, to rounding, for a few float32 vectors (B, n) without gradients.

    It does so where the layers are linear ones, ReLU and tanh on the processor: exactly these types, without hooks.
    For anything else, and wherever a gradient is wanted or something is compiled, it is an `nn.Sequential`. Two layers
    of 24 take 10 microseconds instead of 30, which counts where each step looks at one observation.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, n) -> (B, m)."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or inputs.ndim != 2:
            return super().forward(inputs)  # type: ignore[no-untyped-call,no-any-return]
        layers, rows = self._in_numpy()
        if layers is None or len(inputs) > rows or inputs.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(inputs)  # type: ignore[no-untyped-call,no-any-return]
        values = inputs.numpy()
        for layer in layers:
            values = layer(values)
        return torch.from_numpy(values)

    def _in_numpy(self) -> tuple[list[Layer] | None, int]:
        """The layers, on the memory of the weights, made anew when there are others; and for how many inputs."""
        known: _Known | None = self.__dict__.get("known")
        if known is not None and known.modules == tuple(self._modules.values()):
            memory = [
                weight.data_ptr() for owned in known.parameters for weight in owned.values() if weight is not None
            ]
            if memory == known.memory:
                return known.layers, known.rows
        modules = tuple(self._modules.values())
        owners = [module._parameters for module in modules if module is not None and module._parameters]
        memory = [weight.data_ptr() for owned in owners for weight in owned.values() if weight is not None]
        layers = [_layer(module) for module in modules]
        found = None if None in layers else [layer for layer in layers if layer is not None]
        rows = FEW // max(1, sum(weight.numel() for weight in self.parameters()))
        self.__dict__["known"] = _Known(modules, owners, memory, found, rows)  # no module's business: it is not saved
        return found, rows

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "known"}


def _layer(module: nn.Module | None) -> Layer | None:
    # Exactly these types: a subclass may compute something else.
    if module is None or module._forward_hooks or module._forward_pre_hooks:
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


class InTraining:
    """A context in which a network is in training mode: `network.train()` before, `network.eval()` after.

    Where no module has such methods of its own, they are not called: around each update of a small network they would
    take a tenth of a training's time.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.modules = list(network.modules())
        kinds = {type(module) for module in self.modules}
        self.plain = all(kind.train is nn.Module.train and kind.eval is nn.Module.eval for kind in kinds)

    def __enter__(self) -> None:
        self._set(True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._set(False)

    def _set(self, training: bool) -> None:
        if not self.plain:
            self.network.train(training)
            return
        for module in self.modules:
            module.__dict__["training"] = training  # as `nn.Module.train` does
