"""Passes over a function that PyTorch's compiler has read; a separate file, as importing the compiler takes 2 s."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.ir import TensorBox
from torch._inductor.lowering import register_lowering
from torch._inductor.mkldnn_ir import LinearUnary

aten = torch.ops.aten

LARGE = 1_500_000  # multiplications of a product from which oneDNN is worth its copies of transposed matrices


class Passes(CustomGraphPass):
    """All passes."""

    def __init__(self) -> None:
        self.onednn = onednn_is_faster()

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Apply them to a function that is being compiled."""
        digits_near_0(graph)
        if self.onednn:
            products_by_onednn(graph)

    def uuid(self) -> str:
        """The name of these passes in the compiler's cache."""
        return f"minirl: e^x - 1 by tanh{', products by oneDNN' * self.onednn}"


def digits_near_0(graph: torch.fx.Graph) -> None:
    """Write e^x - 1, of `Tensor.expm1` and in ELU, as 2 t / (1 - t) with t = tanh(x / 2) where |x| is at most 1.

    The compiler subtracts 1 from e^x, rounded to 1e-7: for x = 1e-6 that leaves one digit.
    """
    for node in graph.find_nodes(op="call_function", target=aten.expm1.default):
        with graph.inserting_before(node):
            x = torch.fx.Proxy(node.args[0])
            t = aten.tanh.default(aten.mul.Tensor(x, 0.5))
            near = aten.div.Tensor(aten.mul.Tensor(t, 2), aten.add.Tensor(aten.neg.default(t), 1))
            far = aten.sub.Tensor(aten.exp.default(x), 1)
            result = aten.where.self(aten.le.Scalar(aten.abs.default(x), 1), near, far)
        node.replace_all_uses_with(result.node)
        graph.erase_node(node)


def onednn_is_faster() -> bool:
    """Whether MKL, which PyTorch multiplies float32 with, leaves half of this CPU idle: an AMD CPU with AVX-512."""
    processor = Path("/proc/cpuinfo")
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and processor.exists()
        and "AuthenticAMD" in processor.read_text()
    )


def products_by_onednn(graph: torch.fx.Graph) -> None:
    """Let oneDNN compute the large float32 matrix products: 256 x 256 by a batch of 128 in half the time."""
    for product in (aten.mm.default, aten.addmm.default):
        for node in graph.find_nodes(op="call_function", target=product):
            *bias, rows, columns = node.args
            left, right = rows.meta["val"], columns.meta["val"]
            sizes = *left.shape, right.shape[1]
            if (
                right.device.type != "cpu"
                or right.dtype != torch.float32
                or not all(isinstance(size, int) for size in sizes)  # compiled for batches of any size
                or math.prod(sizes) < LARGE
                or node.kwargs
                or any(term.meta["val"].dim() != 1 for term in bias)
            ):
                continue
            with graph.inserting_before(node):
                weight = graph.call_function(aten.permute.default, (columns, [1, 0]))
                weight.meta["val"] = right.permute([1, 0])
                linear = graph.call_function(torch.ops.minirl_fast.linear.default, (rows, weight, *(bias or [None])))
            linear.meta = node.meta
            node.replace_all_uses_with(linear)
            graph.erase_node(node)


# x W^T + b by oneDNN. The compiler knows this call, but uses it only for weights that never change.
library = torch.library.Library("minirl_fast", "DEF")
library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def shape_of_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return an empty tensor of the result's shape."""
    return x.new_empty((len(x), len(weight)))


torch.library.register_fake("minirl_fast::linear", shape_of_linear, lib=library)


@register_lowering(torch.ops.minirl_fast.linear.default, type_promotion_kind=None)
def write_linear(x: Any, weight: Any, bias: Any) -> Any:
    """Lower the call to oneDNN's."""
    return TensorBox.create(LinearUnary.create(x, weight, bias, "none", [], ""))
