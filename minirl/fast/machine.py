"""Where the arithmetic runs: device, precision, threads, memory."""

import contextlib
import ctypes
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minirl.checks import ConfigError
from minirl.distributed import launched
from minirl.fast.turns import Turns

PRECISIONS = ("auto", "float32", "bfloat16")
GIGABYTE = 1 << 30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names in glibc's malloc.h
SMALL = 200_000  # weights; two layers of 256 on vectors have 70,000, two such networks 140,000, Atari's 1.7 million


def select_device(name: str) -> torch.device:
    """Turn `auto`, `cpu` or `cuda` into a device; `auto` takes CUDA if there is one.

    With several GPUs, it is the one that torchrun assigned to this process.

    Raises:
        ConfigError: if CUDA is asked for and there is none, or the name is not one of these.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be auto, cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda must have a GPU that PyTorch can use: there is none here; use cpu or auto")
    if name == "cuda":
        if launched():
            number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if number >= count:
                raise ConfigError(f"--nproc-per-node must be at most {count} here, the number of GPUs")
            torch.cuda.set_device(number)
        torch.backends.cudnn.deterministic = True  # otherwise a convolution may round differently from call to call
        torch.backends.cudnn.allow_tf32 = False  # otherwise float32 products would have a mantissa of 10 bits
    return torch.device(name)


def select_precision(name: str, device: torch.device, *, images: bool) -> torch.dtype:
    """Turn `auto`, `float32` or `bfloat16` into the dtype of a network's products.

    `auto` takes bfloat16 for images if the device multiplies it faster than float32, and float32 otherwise.

    Raises:
        ConfigError: if the name is not one of these.
    """
    if name == "auto":
        return torch.bfloat16 if images and has_fast_bfloat16(device) else torch.float32
    if name not in PRECISIONS:
        raise ConfigError(f"--precision must be auto, float32 or bfloat16, not {name!r}")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32: a GPU in hardware, a CPU by AMX or AVX-512.

    On Intel CPUs with AVX-512's bfloat16 but no AMX, as in virtual machines that hide it, bfloat16 takes nearly twice
    as long as float32 (Emerald Rapids: 95 and 172 GFLOP/s per core); on AMD's it takes less than half as long.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    processor: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # an older PyTorch does not say
    if processor.get("amx_bf16"):
        return True
    return bool(processor.get("avx512_bf16")) and not processor.get("cpu_name", "").startswith("Intel")


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed arrays for the next ones; do nothing with another C library.

    By default it returns arrays of some ten megabytes to the system, which hands them out again page by page: a
    minibatch of Pong then takes 8,460 page faults, a sixth of its time.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and mallopt(M_MMAP_THRESHOLD, GIGABYTE):
        mallopt(M_TRIM_THRESHOLD, 2 * GIGABYTE - 1)


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Within the block, compute with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> contextlib.AbstractContextManager[None]:
    """Within the block, compute with one thread: while workers play, PyTorch's other threads would spin on their cores.

    It is one for any number of workers: with two, sums round differently, and the number of workers must change nothing
    but the speed.
    """
    return threads(1)


@contextlib.contextmanager
def tuned(network: nn.Module, num_threads: int | None = None) -> Iterator[Turns]:
    """Within the block, compute with this many threads, in turns with other runs; from here on, keep freed memory.

    None means one thread for a small network and PyTorch's number for others. With 256 x 256 units and batches of 128 a
    second thread gains a tenth, compiled up to a third; without it, two runs on two cores do twice as much in total.
    """
    keep_freed_memory()
    parameters = list(network.parameters())
    weights = sum(parameter.numel() for parameter in parameters)
    number = num_threads or (1 if weights < SMALL else torch.get_num_threads())
    on_a_gpu = any(parameter.is_cuda for parameter in parameters)
    with threads(number), Turns(1 if on_a_gpu else number) as turns:
        yield turns


def autocast(precision: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return `torch.autocast` to this precision, or nothing for float32; weights and gradients stay float32."""
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, precision)


class Float32Linear(nn.Linear):
    """A linear layer in float32, even under `autocast`: with rounded logits, PPO's ratios would be 1 % off."""

    def forward(self, features: Tensor) -> Tensor:
        """(B, features) -> (B, outputs)."""
        if not torch.is_autocast_enabled(features.device.type):
            return super().forward(features)
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.to(self.weight.dtype), self.weight, self.bias)


class RoundedLinear(nn.Linear):
    """An `nn.Linear` with a rounded copy of its weight, for use under autocast."""

    rounded: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(inputs, rounded_or_not(self.weight, self.rounded), self.bias)


class RoundedConv2d(nn.Conv2d):
    """An `nn.Conv2d` with a rounded copy of its weight, for use under autocast."""

    rounded: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, channels, ...)."""
        maps: Tensor = self._conv_forward(inputs, rounded_or_not(self.weight, self.rounded), self.bias)
        return maps


ROUNDED: dict[type, Any] = {nn.Linear: RoundedLinear, nn.Conv2d: RoundedConv2d}
PLAIN: dict[type, Any] = {rounded: plain for plain, rounded in ROUNDED.items()}


def rounded_or_not(weight: Tensor, rounded: Tensor) -> Tensor:
    """Return the rounded copy if autocast would round the weight to the same, and no gradient is wanted."""
    kind = weight.device.type
    same = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == rounded.dtype
    return rounded if same and not torch.is_grad_enabled() else weight


@contextlib.contextmanager
def rounded_weights(network: nn.Module, precision: torch.dtype) -> Iterator[None]:
    """Within the block, linear and convolutional layers have weights rounded as `torch.autocast` would, but only once.

    Autocast rounds them at every call, which for a few observations takes longer than their products. The results are
    the same, unless a weight changes within the block, which a warning says; the weights themselves stay float32. Only
    PyTorch's own layer types are meant, since a subclass may use its weight differently, and not on a GPU, which rounds
    in no time and whose recorded graphs must stay as they are.
    """
    modules: list[Any] = [module for module in network.modules() if type(module) in ROUNDED]
    if precision == torch.float32 or any(module.weight.device.type != "cpu" for module in modules):
        modules = []
    # `spectral_norm` and others like it compute the weight anew at each call, in a hook.
    layers = [layer for layer in modules if "weight" in layer._parameters and not layer._forward_pre_hooks]
    versions = [layer.weight._version for layer in layers]
    try:
        for layer in layers:
            vars(layer)["rounded"] = layer.weight.detach().to(precision)
            layer.__class__ = ROUNDED[type(layer)]
        yield
    finally:
        for layer in layers:
            layer.__class__ = PLAIN.get(type(layer), type(layer))
            vars(layer).pop("rounded", None)
    if versions != [layer.weight._version for layer in layers]:
        warnings.warn(
            "a layer's weight has changed while actions were chosen, which its rounded copy did not: give the "
            "layer a class of its own, or --precision float32",
            stacklevel=1,
        )


@contextlib.contextmanager
def acting(network: nn.Module, precision: torch.dtype) -> Iterator[None]:
    """Within the block the network chooses actions while workers play: `one_thread`, `rounded_weights`."""
    with one_thread(), rounded_weights(network, precision):
        yield
