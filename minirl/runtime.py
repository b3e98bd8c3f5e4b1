"""Where and how the arithmetic runs: device, precision, and compilation with its fallback to eager."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from minirl.config import ConfigError

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

    `auto` takes bfloat16 where the device multiplies it natively, which is twice as fast, and float32 elsewhere.

    Raises:
        ConfigError: if the name is another.
    """
    if name == "auto":
        return torch.bfloat16 if has_native_bfloat16(device) else torch.float32
    if name not in ("float32", "bfloat16"):
        raise ConfigError(f"--precision must be auto, float32 or bfloat16, not {name!r}")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # PyTorch has no public name for these two; without them, the answer is no.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)


class AdamStep:
    """One step of Adam on a loss: its gradient, clipped if asked, and the update of the weights.

    Compiled, all of that is one function, which takes a fourth of the time for a network as small as CartPole's. Where
    there is no compiler, or compilation fails, a warning says so and the steps are eager.

    Args:
        network: whose parameters are trained.
        loss: from a batch of tensors to the loss and to numbers to log, which are returned detached.
        learning_rate: may be changed between steps.
        eps: of Adam.
        max_grad_norm: the gradient's norm is clipped to it; None for never.
        compiled: whether to compile.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        *,
        learning_rate: float,
        eps: float = 1e-8,
        max_grad_norm: float | None = None,
        compiled: bool = False,
    ) -> None:
        self.parameters: list[Tensor] = list(network.parameters())
        self.loss = loss
        self.learning_rate = learning_rate
        self.max_grad_norm = max_grad_norm
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate, eps=eps, fused=True)
        for parameter in self.parameters:  # as Adam itself would at its first step
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
        self.compiled: Callable[..., Tensor] | None = None
        if compiled:
            torch._dynamo.config.trace_autograd_ops = True  # the gradient becomes part of the function
            self.compiled = torch.compile(self._whole_step, fullgraph=True)

    def __call__(self, *batch: Tensor) -> Tensor:
        """Take a step; return what the loss function gave to log, before the step."""
        if self.compiled is not None:
            try:
                return self.compiled(self._state(), torch.tensor(self.learning_rate), *batch)
            except Exception as error:  # a missing compiler, a bug in one: nothing of the step was done yet
                reason = str(error).strip().split("\n")[0]
                warnings.warn(f"compilation failed, going on without: {reason}", stacklevel=2)
                self.compiled = None
        self.optimizer.param_groups[0]["lr"] = self.learning_rate
        loss, logged = self.loss(*batch)
        self.optimizer.zero_grad()
        loss.backward()
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        return logged.detach()

    def _state(self) -> dict[str, list[Tensor]]:
        states = [self.optimizer.state[parameter] for parameter in self.parameters]
        return {name: [state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq")}

    def _whole_step(self, state: dict[str, list[Tensor]], learning_rate: Tensor, *batch: Tensor) -> Tensor:
        """The same as the eager step, written so that it can be compiled in one piece."""
        loss, logged = self.loss(*batch)
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            if self.max_grad_norm is not None:
                norm = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients]))
                scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                gradients = tuple(gradient * scale for gradient in gradients)
            group = self.optimizer.param_groups[0]
            adam(
                self.parameters,
                list(gradients),
                state["exp_avg"],
                state["exp_avg_sq"],
                [],
                state["step"],
                foreach=False,
                capturable=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=learning_rate,
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )
        return logged.detach()
