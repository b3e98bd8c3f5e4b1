"""What costs a small network more than its arithmetic: PyTorch's calls on few observations, and loops over modules."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minirl.fast.machine import Float32Linear

FEW = 500_000  # multiplications: beyond, PyTorch is as fast as NumPy

Layer = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class _Known:
    """The layers of a `SmallSequential` in NumPy, and what they were made from."""

    def __init__(self, sequence: nn.Sequential) -> None:
        self.sequences = [
            module._modules for module in sequence.modules() if module is sequence or type(module) in CONTAINERS
        ]
        self.modules = _children(self.sequences)
        present = [module for module in self.modules if module is not None]
        hooks = [hooks for module in present for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.hooks = [*hooks, *OF_ALL_MODULES]  # none as long as these are empty
        self.attributes = list(map(vars, present))  # where a `forward` that is not the class's would be
        self.owners = [module._parameters for module in present if module._parameters]
        self.layers = _layers(sequence)  # None if PyTorch must do it
        self.rows = FEW // max(1, sum(weight.numel() for weight in sequence.parameters()))  # most inputs for NumPy
        self.seen = self.look()

    def look(self) -> tuple[list[nn.Module | None], list[type], list[int]]:
        """Return the layers that there are now, their types, and the addresses of their parameters."""
        modules = _children(self.sequences)
        return modules, list(map(type, modules)), _memory(self.owners)


class SmallSequential(nn.Sequential):
    """An `nn.Sequential`, which NumPy computes, to rounding, for a few float32 vectors (B, n) without gradients.

    It does so if the layers are linear, ReLU and tanh on the CPU: exactly these types, without hooks. For anything
    else, and whenever a gradient is needed or something is compiled, it is an `nn.Sequential`. Two layers of 24 take 10
    microseconds instead of 30, which counts if each step has one observation.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, n) -> (B, m)."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or inputs.ndim != 2 or _watched(inputs):
            return nn.Sequential.forward(self, inputs)  # type: ignore[no-untyped-call,no-any-return]
        layers, rows = self.in_numpy()
        if layers is None or len(inputs) > rows or inputs.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return nn.Sequential.forward(self, inputs)  # type: ignore[no-untyped-call,no-any-return]
        values = inputs.numpy()
        for layer in layers:
            values = layer(values)
        return torch.from_numpy(values)

    def in_numpy(self) -> tuple[list[Layer] | None, int]:
        """The layers, on the memory of the weights, rebuilt when these change; and for how many inputs to use them."""
        known: _Known | None = self.__dict__.get("known")
        if known is None or known.look() != known.seen:
            # Neither a module nor a parameter, so it is neither saved nor copied.
            known = self.__dict__["known"] = _Known(self)
        altered = any(known.hooks) or any("forward" in attributes for attributes in known.attributes)
        return (None if altered else known.layers), known.rows

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "known"}


CONTAINERS = (SmallSequential, nn.Sequential)
OF_ALL_MODULES = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)


def _children(sequences: list[dict[str, nn.Module | None]]) -> list[nn.Module | None]:
    return [module for modules in sequences for module in modules.values()]


def _watched(inputs: Tensor) -> bool:
    """Whether PyTorch transforms, traces or counts operations, as `torch.func.vmap` does: then it must compute them."""
    return (
        type(inputs) is not Tensor
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
    )


def _memory(owners: list[dict[str, Any]]) -> list[int]:
    return [weight.data_ptr() for owned in owners for weight in owned.values() if weight is not None]


def _layers(sequence: nn.Sequential) -> list[Layer] | None:
    layers: list[Layer] = []
    for module in sequence._modules.values():
        if isinstance(module, nn.Sequential) and type(module) in CONTAINERS:
            inner = _layers(module)
        else:
            layer = _layer(module)
            inner = None if layer is None else [layer]
        if inner is None:
            return None
        layers += inner
    return layers


def _layer(module: nn.Module) -> Layer | None:
    # Exactly these types: a subclass may compute something else.
    if type(module) is nn.ReLU:
        return lambda inputs: np.maximum(inputs, 0)
    if type(module) is nn.Tanh:
        return np.tanh
    if isinstance(module, nn.Linear) and type(module) in (nn.Linear, Float32Linear):
        weight, bias = module.weight.detach(), module.bias
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            product, sum_ = weight.numpy().T, 0 if bias is None else bias.detach().numpy()
            return lambda inputs: inputs @ product + sum_
    return None


class Layers:
    """The modules of a network. They are looked up again only when one was replaced: a look takes a network's time."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._look()

    def _look(self) -> None:
        self.by_name = dict(self.network.named_modules())
        self.modules = list(self.by_name.values())
        self.owners = [module._modules for module in self.modules]
        self.children = _children(self.owners)

    def changed(self) -> bool:
        """Look whether they are what they were, and if not, look them up again."""
        if _children(self.owners) == self.children:
            return False
        self._look()
        return True

    def parameters(self) -> list[Tensor]:
        """Return the parameters, each once, as `nn.Module.parameters` does."""
        self.changed()
        weights = (weight for module in self.modules for weight in module._parameters.values() if weight is not None)
        return list({id(weight): weight for weight in weights}.values())

    def copy_buffers(self, other: "Layers") -> None:
        """Copy another network's buffers, also those that came later: a layer may put another tensor in its place."""
        for place, ahead in other.by_name.items():
            for name, buffer in ahead._buffers.items():
                if buffer is None or place not in self.by_name:  # a layer that only the other one has
                    continue
                buffers = self.by_name[place]._buffers
                if (mine := buffers.get(name)) is not None:
                    mine.copy_(buffer)
                else:
                    buffers[name] = buffer.clone()


class InTraining:
    """A context in which a network is in training mode: `network.train()` before, `network.eval()` after.

    If no module overrides these methods, they are not called: around each update of a small network they would take a
    tenth of a run's time.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self.layers = network, Layers(network)
        self._look()

    def _look(self) -> None:
        modules = self.layers.modules
        kinds = {type(module) for module in modules}
        self.plain = all(kind.train is nn.Module.train and kind.eval is nn.Module.eval for kind in kinds)
        self.plain &= not any({"train", "eval"} & vars(module).keys() for module in modules)

    def __enter__(self) -> None:
        if self.layers.changed():
            self._look()
        self._set(True)

    def __exit__(self, *_: object) -> None:
        self._set(False)

    def _set(self, training: bool) -> None:
        if not self.plain:
            self.network.train(training)
            return
        for module in self.layers.modules:
            module.__dict__["training"] = training  # as `nn.Module.train` does
