"""Where and how the arithmetic runs: device, precision, and compilation with its fallback to eager."""

import contextlib
import ctypes
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from minirl.checks import ConfigError
from minirl.networks import RoundedCopy

BETAS = (0.9, 0.999)  # of Adam
NOTHING = 1e-30  # a moment of Adam below this is 0
GIGABYTE = 1 << 30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names in glibc's malloc.h
SMALL = 50_000  # weights; CartPole's networks have 770 and 9,155, Atari's 1.7 million

FEW = 40_000  # multiplications: up to here, to call a matrix product costs more than its arithmetic

# On the processor: no Python between the kernels, and no second look at the shapes there: half the time of a network
# like CartPole's. A tanh by way of exp takes half of its time. For a GPU the compiler's own: its `cpp_wrapper` needs
# CUDA's headers, which PyTorch does not bring. (Results on the stack, `aot_inductor.allow_stack_allocation`, would take
# a fifth less time for CartPole's update, but each call returns the same memory: what a caller keeps would change.)
INDUCTOR: dict[str, dict[str, Any]] = {
    "cpu": {
        "cpp_wrapper": True,
        "size_asserts": False,
        "alignment_asserts": False,
        "cpp.use_decompose_tanh": True,
    },
    "cuda": {},
}

Loss = Callable[..., tuple[Tensor, Tensor]]  # a batch -> the loss, and numbers to log


def select_device(name: str) -> torch.device:
    """Turn `auto`, `cpu` or `cuda` into a device; `auto` takes CUDA where there is one.

    Raises:
        ConfigError: if CUDA is asked for and there is none, or the name is another.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be auto, cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda must have a GPU that PyTorch can use: there is none here; use cpu or auto")
    return torch.device(name)


def select_precision(name: str, device: torch.device) -> torch.dtype:
    """Turn `auto`, `float32` or `bfloat16` into what convolutions are computed in.

    `auto` takes bfloat16 where the device multiplies it faster than float32, and float32 elsewhere.

    Raises:
        ConfigError: if the name is another.
    """
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    if name not in ("float32", "bfloat16"):
        raise ConfigError(f"--precision must be auto, float32 or bfloat16, not {name!r}")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32: a GPU in hardware, a processor by AMX or AVX-512.

    Where Intel's have AVX-512 with bfloat16 and no AMX, as in virtual machines that hide it, bfloat16 takes nearly
    twice as long as float32 (Emerald Rapids: 95 and 172 GFLOP/s a core); on AMD's it takes less than half as long.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    processor: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # an older PyTorch does not say
    if processor.get("amx_bf16"):
        return True
    return bool(processor.get("avx512_bf16")) and not processor.get("cpu_name", "").startswith("Intel")


def keep_freed_memory() -> None:
    """Have the C library keep the memory of freed arrays for the next ones, where it is glibc; elsewhere do nothing.

    Left to itself it returns arrays of some ten megabytes to the system, which hands them out again page by page: a
    minibatch of Pong then takes 8,460 page faults, and a sixth of its time.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and mallopt(M_MMAP_THRESHOLD, GIGABYTE):
        mallopt(M_TRIM_THRESHOLD, 2 * GIGABYTE - 1)


@contextlib.contextmanager
def threads_beside(num_workers: int) -> Iterator[None]:
    """Leave cores to the processes that play: between PyTorch's calls, too, its threads would keep them busy.

    Args:
        num_workers: processes, this one among them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - num_workers + 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def threads_for(network: nn.Module) -> Iterator[None]:
    """Compute a small network by one thread: to hand out so little work takes longer than to do it."""
    threads = torch.get_num_threads()
    if sum(parameter.numel() for parameter in network.parameters()) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def batch_guards(guards: Sequence[Any]) -> list[bool]:
    """Say which of a compiled function's conditions are looked at again at each call: those of the batch.

    There are 332 of them for CartPole's update, hooks of each module among them, and they took a fifth of its time. A
    batch of another shape or dtype is compiled anew; the network, the loss and the settings stay those of the first
    call. The one without a name is PyTorch's own state: whether gradients are on, and the like.
    """
    return [not guard.name or "batch" in guard.name for guard in guards]


class SmallProducts(TorchFunctionMode):
    """Within it, a linear layer with little to multiply is products and sums, which a compiler merges with the rest.

    Double DQN's update on CartPole has 14 matrix products; without their calls it takes a fifth less time.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Stand in for every function of PyTorch, and change this one."""
        if func is F.linear:
            inputs, weight, bias = args
            if inputs.ndim == 2 and bias is not None and inputs.shape[0] * weight.numel() <= FEW:
                # (out, in, 1) * (in, B): side by side in memory are the samples, which fill whole vectors.
                return (weight[:, :, None] * inputs.T).sum(dim=1).T + bias
        return func(*args, **(kwargs or {}))


class Compiled:
    """A function that is compiled when it is first called, for the network and the settings that it has then.

    Where there is no compiler, or compilation fails, a warning says so and the calls go to the plain function.

    Args:
        function: what to compile, its tensors named `batch` (see `batch_guards`); the gradient may be part of it.
        device: where its tensors are.
        plain: what to call instead; by default `function` as it is.
        enabled: whether to compile at all.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        device: torch.device,
        *,
        plain: Callable[..., Any] | None = None,
        enabled: bool = True,
    ) -> None:
        self.function = function
        self.device = device
        self.plain = function if plain is None else plain
        self.enabled = enabled
        self.compiled: Callable[..., Any] | None = None  # from the first call on

    def __call__(self, *arguments: Any) -> Any:
        """Call the compiled function, or the plain one."""
        if not self.enabled:
            return self.plain(*arguments)
        if self.compiled is not None:
            return self.compiled(*arguments)
        try:
            torch._dynamo.config.trace_autograd_ops = True  # for good: batches of another shape may come later
            # Each of several networks has a function of its own: without guards, another's would do its work.
            choices: dict[str, Any] = {"fullgraph": True, "isolate_recompiles": True}
            choices["options"] = {**INDUCTOR[self.device.type], "guard_filter_fn": batch_guards}
            compiled: Callable[..., Any] = torch.compile(self.function, **choices)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="TensorFloat32")  # float32 is meant, on a GPU, too
                result = compiled(*arguments)
        except Exception as error:  # no compiler, an older PyTorch, a bug in either; nothing is done yet
            reason = str(error).strip().split("\n")[0]
            warnings.warn(f"compilation failed, going on without: {reason}", stacklevel=1)  # once, whoever called
            self.enabled = False
            return self.plain(*arguments)
        self.compiled = compiled
        return result


def adam_rates(learning_rate: float, steps: int) -> Tensor:
    """`step_size` and `correction` of `adam_` at step t = 1, 2, ...: lr / (1 - b1^t) and 1 / sqrt(1 - b2^t) (2,)."""
    rates = learning_rate / (1 - BETAS[0] ** steps), 1 / math.sqrt(1 - BETAS[1] ** steps)
    return torch.from_numpy(np.array(rates, np.float32))  # half as long as `torch.tensor`


def adam_(
    weights: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step_size: Tensor,
    correction: Tensor,
    eps: float,
) -> None:
    """Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1), in place.

        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g^2
        w <- w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    The same as `torch.optim.Adam`, to rounding. PyTorch's own, compiled, computes the powers of b1 and b2 again for
    every sixteen weights, which takes a third of its time. And where a unit has stopped firing, m and v fade towards
    numbers with which some processors take thirty times as long (denormal, below 1e-38), and stay there: 0.9 times
    the smallest is rounded back to it. A moment below 1e-30, which moves nothing, is 0 here.

    Args:
        weights: w, and of the same shape
        gradient: g,
        mean: m,
        square: v.
        step_size: lr / (1 - b1^t), a scalar.
        correction: 1 / sqrt(1 - b2^t), a scalar.
        eps: keeps the divisor from 0.
    """
    mean.lerp_(gradient, 1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    for moment in (mean, square):
        moment.masked_fill_(moment.abs() < NOTHING, 0)
    weights.sub_(step_size * mean / (square.sqrt() * correction + eps))


class AdamStep:
    """One step of Adam on a loss: its gradient, clipped if asked, and the update of the weights.

    Compiled, all of that is one function, which takes a fourth of the time for a network as small as CartPole's.

    Args:
        rounded: the network, whose original is trained.
        loss: from a batch of tensors to the loss, computed with the rounded copy, and to numbers to log (K,).
        eps: of Adam.
        max_grad_norm: the gradient's norm is clipped to it; None for never.
        compiled: whether to compile.
    """

    def __init__(
        self,
        rounded: RoundedCopy[Any],
        loss: Loss,
        *,
        eps: float = 1e-8,
        max_grad_norm: float | None = None,
        compiled: bool = False,
    ) -> None:
        self.rounded = rounded
        self.parameters: list[Tensor] = list(rounded.original.parameters())
        self.device = self.parameters[0].device
        self.loss = loss
        self.eps = eps
        self.max_grad_norm = max_grad_norm
        self.step = Compiled(self._whole_step, self.device, plain=self._eager_step, enabled=compiled)
        self.optimizer = torch.optim.Adam(self.parameters, betas=BETAS, eps=eps, fused=True)
        for parameter in self.parameters:  # as Adam itself would at its first step
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
        self.steps = 0  # taken, in earlier sessions too
        self.moments = self._moments()

    def __call__(self, learning_rate: float, *batch: Tensor) -> Tensor:
        """Take a step; return what the loss gave to log, and behind it the gradient's norm before clipping (K + 1,)."""
        self.steps += 1
        self.optimizer.param_groups[0]["lr"] = learning_rate
        rates = adam_rates(learning_rate, self.steps).to(self.device, non_blocking=True)
        logged: Tensor = self.step(self.moments, rates, *batch)
        return logged

    def state_dict(self) -> dict[str, Any]:
        """Return what `torch.optim.Adam` saves."""
        for state in self.optimizer.state.values():
            state["step"].fill_(self.steps)
        return self.optimizer.state_dict()

    def load(self, saved: dict[str, Any]) -> None:
        """Put back what `state_dict` returned.

        Raises:
            ValueError, and others: if it is another network's.
        """
        shapes = [[tensor.shape for tensor in tensors] for tensors in self.moments]
        self.optimizer.load_state_dict(saved)
        for parameter, state in self.optimizer.state.items():  # whoever saved them: see `_eager_step`
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].shape == parameter.shape:
                    state[name] = torch.empty_like(parameter).copy_(state[name])
        self.moments = self._moments()
        if shapes != [[tensor.shape for tensor in tensors] for tensors in self.moments]:
            raise ValueError("the optimiser is of a network of other shapes")
        self.steps = int(self.optimizer.state[self.parameters[0]]["step"])

    def _moments(self) -> list[tuple[Tensor, Tensor]]:
        """The mean of each parameter's gradient, and of its square."""
        states = [self.optimizer.state[parameter] for parameter in self.parameters]
        return [(state["exp_avg"], state["exp_avg_sq"]) for state in states]

    def _eager_step(self, moments: list[tuple[Tensor, Tensor]], rates: Tensor, *batch: Tensor) -> Tensor:
        loss, logged = self.loss(*batch)
        for parameter, gradient in zip(self.parameters, self._gradients(loss), strict=True):
            # In the parameter's own layout, as `backward` gives it: the fused kernel goes through memory, not shapes.
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or math.inf)
        self.optimizer.step()
        self.rounded.refresh()
        return torch.cat([logged.detach(), norm[None]])

    def _gradients(self, loss: Tensor) -> list[Tensor]:
        """The gradient of each parameter, in its own precision."""
        gradients = torch.autograd.grad(loss, list(self.rounded.network.parameters()))
        return [gradient.to(parameter.dtype) for gradient, parameter in zip(gradients, self.parameters, strict=True)]

    def _whole_step(self, moments: list[tuple[Tensor, Tensor]], rates: Tensor, *batch: Tensor) -> Tensor:
        """The eager step, written so that it can be compiled in one piece."""
        with SmallProducts():
            loss, logged = self.loss(*batch)
        gradients = self._gradients(loss)
        with torch.no_grad():
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
            clipped = (self.max_grad_norm or math.inf) / (norm + 1e-6)
            # Joined with the rates it is computed once; alone, again for every sixteen weights.
            scale, step_size, correction = torch.cat([clipped.clamp(max=1.0)[None], rates])
            for weights, gradient, (mean, square) in zip(self.parameters, gradients, moments, strict=True):
                adam_(weights, gradient * scale, mean, square, step_size, correction, self.eps)
            self.rounded.refresh()
        return torch.cat([logged.detach(), norm[None]])
