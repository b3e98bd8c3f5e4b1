"""Equivalent forms of what PyTorch's compiler can't compile, or compiles badly."""

import inspect
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from minirl.fast import gpu

FEW = 40_000  # multiplications: up to here, calling a matrix product costs more than its arithmetic

# Results of arithmetic on single numbers, such as Adam's corrections and the clipped norm's factor, are kept in memory.
# Otherwise the compiler would compute them again, powers and all, for every eight weights that they are a factor of.
ARITHMETIC = ("__rpow__", "mul", "__mul__", "__truediv__", "__rdiv__", "clamp")


# Attributes that PyTorch itself gives to every optimiser, or to those that inherit from its own.
PYTORCHS = re.compile(
    r"defaults|state|param_groups|_optimizer_\w+_hooks|_zero_grad_profile_name|_opt_called|_warned_capturable\w+"
    r"|_need_device_dtype_check\w+|_step_supports_amp_scaling"
)


class CantCompile(Exception):
    """The compiled function would not do what the plain one does. The message says why."""


def all_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of all groups."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def own_attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Return what somebody's own optimiser has besides `state` and `param_groups`, such as a count of its steps."""
    if type(optimizer).__module__.startswith("torch."):
        return {}
    return {
        name: value for name, value in vars(optimizer).items() if not PYTORCHS.fullmatch(name) and not callable(value)
    }


class Steppable:
    """An optimiser whose `step` can be part of a compiled function.

    Within its call, between `prepare` and `release`, the learning rates are tensors, so that a new rate is no reason to
    compile again. The kernels become those that the compiler can fuse with the rest.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = all_parameters(optimizer)
        self.step = inspect.unwrap(type(optimizer).step)  # without the decorators, at which PyTorch stops compiling
        number = len(optimizer.param_groups)
        self.rates = [torch.empty((), device=self.parameters[0].device) for _ in range(number)]
        self.filled: list[Any] = [None] * number  # the numbers in them
        self.versions = [0] * number  # of the rates, by which changes in place are seen
        self.given: list[Any] = [None] * number  # what the groups have between calls
        self.groups: list[dict[str, Any]] = []  # as last seen; those of a checkpoint are others
        self.fused = [group.get("fused") for group in optimizer.param_groups]

    def prepare(self) -> None:
        """Turn the learning rates into tensors.

        Raises:
            CantCompile: if there are hooks, which would not be called, or the optimiser has other parameters now.
        """
        optimizer = self.optimizer
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            raise CantCompile("the optimiser has hooks, which only its own `step` calls")
        own = vars(optimizer).get("step")
        if own is not None and not hasattr(own, "_wrapped_by_lr_sched"):
            raise CantCompile("the optimiser has a `step` of its own, and only its class's is compiled")
        now = all_parameters(optimizer)
        same = len(now) == len(self.parameters) and len(optimizer.param_groups) == len(self.rates)
        if not same or not all(map(operator.is_, now, self.parameters)):
            raise CantCompile("the optimiser has other parameters than at first")
        for weight in self.parameters:
            if weight._backward_hooks or weight._post_accumulate_grad_hooks:
                raise CantCompile("a parameter has hooks, which only its own `backward` calls")
        if self.groups is not optimizer.param_groups:
            self.groups = optimizer.param_groups
            self._choose_kernels()
        for number, (group, rate) in enumerate(zip(self.groups, self.rates, strict=True)):
            self.given[number] = given = group["lr"]
            if isinstance(given, Tensor) or given != self.filled[number]:
                if rate.device.type in gpu.RECORDED:
                    rate.fill_(given)  # a replay reads it there
                else:  # the optimiser may have kept the last one
                    self.rates[number] = rate = torch.full_like(rate, float(given))
                self.filled[number] = None if isinstance(given, Tensor) else given
            self.versions[number] = rate._version
            group["lr"] = rate
        optimizer._opt_called = True  # type: ignore[attr-defined]  # asked for by PyTorch's schedulers

    def release(self) -> None:
        """Give the groups their learning rates back, which may be numbers that are saved, compared or changed."""
        for number, (group, rate, given) in enumerate(zip(self.groups, self.rates, self.given, strict=False)):
            if group["lr"] is not rate:
                continue
            group["lr"] = given
            if rate._version != self.versions[number]:  # the step itself has changed it in place
                if isinstance(given, Tensor):
                    given.copy_(rate)
                else:
                    group["lr"] = self.filled[number] = rate.item()

    def _choose_kernels(self) -> None:
        state = self.optimizer.state
        for group, rate in zip(self.groups, self.rates, strict=True):
            if "fused" in group:
                group["fused"] = False
            if "capturable" in group and rate.is_cuda:  # steps are counted on the GPU, also those of a checkpoint
                group["capturable"] = True
                for weight in filter(state.__contains__, group["params"]):
                    state[weight]["step"] = state[weight]["step"].to(rate.device)

    def put_back(self) -> None:
        """Put the optimiser back as it was."""
        self.release()
        for group, fused in zip(self.optimizer.param_groups, self.fused, strict=False):
            if "fused" in group:
                group["fused"] = fused


class StandIn:
    """Takes an optimiser's place while a function is compiled. `.grad` is a tensor that stays, and is zeroed."""

    def __init__(self, steppable: Steppable, rewritten: "Traceable") -> None:
        self.steppable = steppable
        self.rewritten = rewritten

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimiser's own."""
        return self.steppable.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `Optimizer.zero_grad`."""
        with torch.no_grad():
            for weight in self.steppable.parameters:
                if weight.grad is not None:
                    weight.grad.zero_()
        mine, reached = self.steppable.parameters, self.rewritten.reached
        self.rewritten.reached = [weight for weight in reached if not any(weight is one for one in mine)]

    def step(self) -> None:
        """As `Optimizer.step`.

        Raises:
            RuntimeError: if a parameter's gradient was not computed here: its moments would still move it.
        """
        for weight in self.steppable.parameters:
            if weight.grad is not None and not any(weight is other for other in self.rewritten.reached):
                raise RuntimeError("`step` meets a gradient that `backward` has not computed since `zero_grad`")
        with torch.no_grad():
            self.steppable.step(self.steppable.optimizer)


class Traceable(TorchFunctionMode):
    """A context in which what PyTorch's compiler can't compile, or compiles badly, takes an equivalent form.

    `backward` adds to the existing `.grad`. A small linear layer becomes products and sums, which the compiler fuses
    with the rest: that is a fifth of the update's time for a network like CartPole's. Single numbers that come from
    arithmetic are computed once.

    Args:
        parameters: what `backward` computes the gradient of.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()
        self.parameters = parameters
        self.reached: list[Tensor] = []  # parameters that `backward` has given a gradient

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Intercept every function of PyTorch, and replace some."""
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:
            return self._backward(*args, **kwargs)
        if func is F.linear and len(args) == 3:
            inputs, weight, bias = args
            if inputs.ndim == 2 and bias is not None and inputs.shape[0] * weight.numel() <= FEW:
                # (out, in, 1) * (in, B): the samples are adjacent in memory and fill whole vectors.
                return (weight[:, :, None] * inputs.T).sum(dim=1).T + bias
        if func is torch.Tensor.unflatten:  # is Python, with a `super()` that the compiler can't follow here
            return torch.unflatten(*args, **kwargs)
        result = func(*args, **kwargs)
        if getattr(func, "__name__", "") in ARITHMETIC and result.ndim == 0 and not result.requires_grad:
            return result.as_strided((), ())  # the same value, but kept in memory
        return result

    def _backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        if gradient is not None or create_graph or inputs is not None:
            raise RuntimeError("in a compiled function, backward takes no more than retain_graph")
        weights = [weight for weight in self.parameters if weight.requires_grad]
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            loss, weights, retain_graph=retain_graph, allow_unused=True
        )
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is None:
                    continue
                if weight.grad is None:
                    raise RuntimeError("a parameter that had no gradient has one now")
                weight.grad.add_(gradient)
                self.reached.append(weight)
