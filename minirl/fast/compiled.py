"""A plain function as one compiled piece, such as a whole gradient step of any network, optimiser and loss.

    def gradient_step(agent, optimizer, config, batch):
        loss = ...
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
        optimizer.step()
        return loss.detach()

    step = compiled(gradient_step, agent, optimizer, config)      # the same as functools.partial(gradient_step, ...)

What is trained is bound here; a batch's tensors come with each call. The result is that of the plain function, up to
rounding. Python numbers that it reads, the shapes of a batch and which parameters are frozen are checked at each call;
if they change, the function is compiled again for them. If compilation fails (no compiler, or Python that PyTorch can't
compile), a warning says why, and the plain function runs. What became of it is part of an optimiser's state,
`group["compiled"]`: 0 if compilation failed, 1 if the step is compiled, 2 if it was compiled again and again. A resumed
run does as before, or says why its bits may differ.
"""

import contextlib
import functools
import inspect
import logging
import re
import shutil
import struct
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._filelock import FileLock
from torch.utils._pytree import tree_leaves

from minirl.distributed import PATIENT, wait_at_most
from minirl.fast import gpu
from minirl.fast.rewrites import CantCompile, StandIn, Steppable, Traceable
from minirl.fast.trial import NOT_THEIRS, parameters_reached

# On the CPU there is no Python between the kernels, and shapes are not checked again there, which halves the time of a
# network like CartPole's. A GPU gets the compiler's own wrapper: `cpp_wrapper` needs CUDA's headers, which PyTorch does
# not bring. There, nothing that changes the order of sums is chosen by timing, or two runs would end in different bits.
# Numbers of `torch.rand` are those of the plain function; those of a dropout are not. (Not used:
# `aot_inductor.allow_stack_allocation`, which returns results in memory that the next call overwrites, and
# `cpp.use_decompose_tanh`, which loses tanh near 0.)
INDUCTOR: dict[str, dict[str, Any]] = {
    "cpu": {
        "cpp_wrapper": True,
        "size_asserts": False,
        "alignment_asserts": False,
        "fallback_random": True,
    },
    "cuda": {"fallback_random": True, "deterministic": True},
}

# The guards of a compiled function that are about code and not about values: which types, functions and attributes
# there are. If that code is PyTorch's own or that of this package, they are not checked again at each call.
CODE = {
    "BUILTIN_MATCH",
    "CLASS_MATCH",
    "CLOSURE_MATCH",
    "DUPLICATE_INPUT",
    "FUNCTION_MATCH",
    "HASATTR",
    "MODULE_MATCH",
    "NOT_PRESENT_IN_GENERIC_DICT",
    "TYPE_MATCH",
}
# How a guard names what is read from such a module, or from Python's own functions.
FROM_FIXED = re.compile(r"G\['__(import_torch|import_minirl_dot_fast|builtins)")
FIXED = re.compile(r"(torch|builtins|collections|minirl\.fast)(\.|$)")  # modules that do not change while they run

SETTLED = 3  # variants of a step whose numbers change: for the first value, for the next, and for any


class Limit(logging.Filter):
    """Keeps why PyTorch has compiled something too often, which it would print in five lines."""

    reason = ""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to print it."""
        ours = "hit config" in str(record.msg) and "_traced_" in str(record.args)
        if not ours or not isinstance(record.args, tuple):
            return True
        # As in "0/7: self.stand_ins[0].n == 7   # where it is read"
        self.reason = re.sub(r"^\d+/\d+: ", "", str(record.args[-2])).split("#")[0].strip()
        return False


LIMIT = Limit()


def pays_off(choice: bool | None, gradient_steps: float, *, images: bool = False) -> bool:
    """Whether to compile: as chosen, else in long runs. It takes some 20 seconds and saves 10 ms per step on images."""
    return gradient_steps >= (5_000 if images else 50_000) if choice is None else choice


def compiled(function: Callable[..., Any], *bound: Any, enabled: bool = True) -> Callable[..., Any]:
    """Return `functools.partial(function, *bound)`, compiled when it is first called.

    Args:
        function: from networks, optimisers, settings and tensors to tensors.
        bound: its first arguments; every network and optimiser that it changes must be among them. Before it is
            compiled it is tried with copies of these, and of what it reads by name from its module.
        enabled: whether to compile at all.
    """
    return Compiled(function, bound) if enabled else functools.partial(function, *bound)


class Compiled:
    """See `compiled`."""

    def __init__(self, function: Callable[..., Any], bound: Sequence[Any]) -> None:
        self.function = function
        self.bound = bound
        self.plain = functools.partial(function, *bound)
        self.enabled = True
        self.optimizers = [Steppable(item) for item in bound if isinstance(item, Optimizer)]
        self.parameters = [weight for optimizer in self.optimizers for weight in optimizer.parameters]
        self.rewritten = Traceable(self.parameters)
        optimizers = iter(self.optimizers)
        self.stand_ins = [
            StandIn(next(optimizers), self.rewritten) if isinstance(item, Optimizer) else item for item in bound
        ]
        modules = [item for item in bound if isinstance(item, nn.Module)]
        weights = [*self.parameters, *(weight for module in modules for weight in module.parameters())]
        self.device = weights[0].device if weights else torch.device("cpu")
        self.trained: list[bool] | None = None  # which parameters were not frozen at the last check
        self.arguments: Sequence[Any] = ()  # of the last call, if calls are recorded
        self.whole: Callable[..., Any] | None = None
        self.looks = 0  # how often it was found that other parameters have a gradient
        self.variants = 0  # how many were compiled here
        self.before = 0  # what the optimiser's state said of a run that is resumed

    def __call__(self, *arguments: Any) -> Any:
        """Call the function with its first arguments and these."""
        if not self.enabled:
            return self.plain(*arguments)
        try:
            return self._call(arguments)
        except CantCompile as error:
            return self._give_up(error, arguments)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            limit = torch._dynamo.config.recompile_limit
            why = f"each new value is compiled again, and {limit} is the limit: {self._in_its_words(LIMIT.reason)}"
            return self._give_up(CantCompile(why), arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            # A parameter that has a gradient now may have had none at the last check, or the reverse. Or Ctrl-C has
            # ended the C++ compiler, which it reaches as well: this run stops later, and as a compiled one.
            self.trained, self.looks = None, self.looks + 1
            for optimizer in self.optimizers:
                optimizer.release()
            if self.looks > torch._dynamo.config.recompile_limit:
                why = "which weights have a gradient changes again and again, perhaps by another step of the optimiser"
                return self._give_up(CantCompile(why), arguments)
            with contextlib.suppress(torch._dynamo.exc.TorchDynamoException):
                return self._call(arguments)
            return self._give_up(error, arguments)
        except Exception as error:  # no compiler, an older PyTorch, a bug in either; nothing has run yet
            if self.whole is not None:
                raise
            return self._give_up(error, arguments)
        finally:
            for optimizer in self.optimizers:
                optimizer.release()

    def _call(self, arguments: Sequence[Any]) -> Any:
        if self.whole is None:
            self._go_on()
        for optimizer in self.optimizers:
            optimizer.prepare()
        trained = [weight.requires_grad for weight in self.parameters]
        if trained != self.trained:
            self._make_gradients(arguments)
            self.trained = trained
        self.rewritten.reached.clear()  # here: compiled code would see another value at the second call
        if self.device.type in gpu.RECORDED:
            self.arguments = arguments
        if self.whole is not None:
            result = self.whole(*arguments)
            self._remember()
            return result
        wait_at_most(PATIENT)  # for other ranks, which also compile it
        with contextlib.suppress(OSError):  # other processes clean up this cache, too
            drop_unfinished_files()
        logging.getLogger("torch._dynamo.convert_frame").addFilter(LIMIT)
        # What it says of code that it can't compile, in hundreds of lines: one of ours says why not.
        logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
        torch._dynamo.config.trace_autograd_ops = True  # for good: batches of another shape may come later
        torch._dynamo.config.skip_nnmodule_hook_guards = False  # a hook that is added later is seen
        torch._dynamo.config.allow_unspec_int_on_nn_module = True  # an agent's counter is a number that changes
        choices: dict[str, Any] = {"fullgraph": True, "options": {"guard_filter_fn": self._guards}}
        if self.device.type in gpu.RECORDED:
            choices["backend"] = self._recorded
        else:
            from minirl.fast.passes import Passes

            choices["options"] |= {**INDUCTOR["cpu"], "post_grad_custom_post_pass": Passes()}
        # Each has its own code object, by which PyTorch identifies it: otherwise the compiled code of other networks
        # would run. And its own name, by which PyTorch remembers which sizes have changed from call to call.
        code = types.FunctionType(Compiled._traced.__code__.replace(co_name=f"_traced_{id(self)}"), globals())
        whole: Callable[..., Any] = torch.compile(types.MethodType(code, self), **choices)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TensorFloat32")  # float32 is intended, on a GPU, too
            result = whole(*arguments)
        self.whole = whole
        self._remember()
        return result

    def _go_on(self) -> None:
        """Go on as before the run was stopped."""
        before = [group["compiled"] for group in self._groups() if "compiled" in group]
        if before and not all(before):
            raise CantCompile("its optimiser's steps were not before, in this run or the one that it goes on with")
        self.before = max(before, default=0)
        if self.before > 1:
            limit = torch._dynamo.config.recompile_limit
            why = f"a step compiled again and again, for new values, is given up on after {limit}, counted anew here"
            warnings.warn(f"{why}: if that happens, the bits differ from those of a run left alone", stacklevel=1)

    def _guards(self, conditions: Sequence[Any]) -> list[bool]:
        """Count a variant; see `that_can_change`."""
        self.variants += 1
        return that_can_change(conditions)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.optimizer.param_groups]

    def _in_its_words(self, guard: str) -> str:
        """Return a guard, `self.stand_ins[0].n == 7` say, in terms of the function's own arguments: `agent.n == 7`."""
        names = list(inspect.signature(self.function).parameters)
        bound = re.sub(r"self\.stand_ins\[(\d+)\]", lambda match: names[int(match[1])], guard)
        return re.sub(r"G\['(?:__import_\w+'\]\.|(\w+)'\])", r"\1", bound).replace(".steppable.optimizer", "")

    def _traced(self, *arguments: Any) -> Any:
        """What is compiled: the function, with equivalent forms of what PyTorch can't compile."""
        with self.rewritten:
            return self.function(*self.stand_ins, *arguments)

    def _recorded(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """The compiler's result, recorded and replayed; its guards have been checked before."""
        from torch._inductor.compile_fx import compile_fx  # takes a second

        held = [*module.parameters(), *module.buffers()]  # and an optimiser's state, if PyTorch takes it for constant
        whole: Any = compile_fx(module, inputs, config_patches=INDUCTOR[self.device.type])

        def of_the_call(given: Tensor) -> bool:
            return any(given is leaf for leaf in tree_leaves(self.arguments))

        return gpu.Replayed(whole, of_the_call, held).__call__

    def _make_gradients(self, arguments: Sequence[Any]) -> None:
        """Allocate `.grad` for the parameters to which the function gives a gradient.

        Raises:
            CantCompile: if the function does what compiled code would lose.
        """
        reached = parameters_reached(self.function, self.bound, self.parameters, arguments, self.device)
        for weight, has_gradient in zip(self.parameters, reached, strict=True):
            if not has_gradient:
                weight.grad = None
            elif weight.grad is None:  # otherwise it may be in the middle of adding up
                weight.grad = torch.zeros_like(weight)

    def _give_up(self, error: Exception, arguments: Sequence[Any]) -> Any:
        """Continue with the plain function."""
        reason, *more = str(error).strip().split("\n")
        if raised := re.search(r"raised exception \w+\('(.*)'\)", str(error)):  # by the function itself
            reason = raised[1]
        elif reason.endswith(":") and more:
            reason += f" {more[0].strip()}"
        if "marked that the function `Optimizer." in str(error):
            reason = "an optimiser must be among the bound arguments, not an attribute or a name of the module"
        if "data-dependent" in reason.lower():
            reason = "what it does next depends on the value of a tensor"
        if "grad_fn" in reason:
            reason += "; what is returned must be detached"
        places = re.findall(r'File "([^"]+)", line (\d+), in', str(error))
        theirs = [place for place in places if not place[0].startswith(NOT_THEIRS)]
        where = f" ({theirs[-1][0]}, line {theirs[-1][1]})" if theirs else ""
        warnings.warn(f"not compiled: {reason}{where}", stacklevel=1)  # once, from any caller
        self.enabled = False
        for optimizer in self.optimizers:
            optimizer.put_back()
        if self.whole is None and any(group.get("compiled") for group in self._groups()):
            now = "no longer compiled, as it was before it was stopped"
            warnings.warn(f"this run is {now}: its bits differ from those of a run left alone", stacklevel=1)
        self._remember()
        return self.plain(*arguments)

    def _remember(self) -> None:
        """Note in the optimiser's state: 0 for plain steps, 1 for compiled ones, 2 if compiled again and again."""
        now = max(self.before, 1 + (self.variants > SETTLED)) if self.enabled else 0
        for group in self._groups():
            group["compiled"] = now


def drop_unfinished_files() -> None:
    """Remove the files that a stopped compilation left half written in the compiler's cache: they would be loaded.

    While the C++ compiler writes a file, it holds a lock and works in a directory beside it, removed when it is done.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir  # the compiler: two seconds

    headers = Path(default_cache_dir()) / "precompiled_headers"
    for place, pattern in ((Path(cache_dir()), "*/*"), (headers, "*")):
        begun = {str(work).removesuffix("_CxxBuild") for work in place.glob(f"{pattern}_CxxBuild")}
        cut = {str(library.with_suffix("")) for library in place.glob(f"{pattern}.so") if not is_whole(library)}
        for name in begun | cut:
            lock = place / "locks" / f"{Path(name).name.split('.')[0]}.lock"
            with contextlib.suppress(TimeoutError), FileLock(lock, timeout=0):  # another process is writing it
                for ending in (".so", ".o", ".gch"):
                    Path(name + ending).unlink(missing_ok=True)
                shutil.rmtree(f"{name}_CxxBuild", ignore_errors=True)


def is_whole(library: Path) -> bool:
    """Whether a library is as long as its header says: loading a truncated one kills the process. Linux only."""
    if sys.platform != "linux":
        return True
    with library.open("rb") as file:
        head = file.read(64).ljust(64, b"\0")
    table, size, number = struct.unpack_from("Q10xHH", head, 40)  # an ELF file ends in a table of its sections
    return head.startswith(b"\x7fELF") and 0 < table <= library.stat().st_size - size * number


def that_can_change(conditions: Sequence[Any]) -> list[bool]:
    """Return which of a compiled function's guards are checked again at each call: all but those on fixed code.

    In CartPole's update these are 205 of 580; leaving out 260 made it a tenth faster.
    """
    return [one.guard_type not in CODE or not is_fixed(one.name, one.value) for one in conditions]


def is_fixed(name: str, value: Any) -> bool:
    """Whether a value that compiled code reads by this name is not the user's, who may replace it.

    A number may become one of another type; a layer may get attributes, or be replaced; an attribute (of a class, too)
    or a global may become another function of PyTorch's; an optimiser's state is created in its first step, and
    replaced from a checkpoint.
    """
    if isinstance(value, (int, float, str, NoneType, nn.Module)) or ".steppable.optimizer.state" in name:
        return False
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)) and not FROM_FIXED.match(name):
        return False
    owner = value if isinstance(value, (type, types.FunctionType)) else type(value)
    return FIXED.match(str(owner.__module__)) is not None
