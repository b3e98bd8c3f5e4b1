"""A compiled function is the plain one: of any network, optimiser and loss, whatever changes while it is used."""

import copy
import functools
import random
import shlex
import struct
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._inductor import cpp_builder
from torch._inductor.exc import CppCompileError
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from minirl.fast import passes
from minirl.fast.compiled import Compiled, compiled, is_whole
from minirl.fast.passes import products_by_onednn
from minirl.fast.rewrites import FEW, StandIn, Steppable, Traceable
from tests.weights import parameters

Optimizers = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass
class Coefficients:
    """Python numbers that the loss reads."""

    extra: float = 0.0
    aux: float = 0.0


class Network(nn.Module):
    """A body, a head, a second head that is not used at first, and a number that `forward` reads."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), *layers, nn.Tanh(), nn.Linear(8, 8), nn.ReLU())
        self.head, self.aux = nn.Linear(8, 2), nn.Linear(8, 1)
        self.scale = 1.0

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(obs)
        return self.scale * self.head(features), features


def gradient_step(
    network: Network, optimizer: torch.optim.Optimizer, coefficients: Coefficients, obs: Tensor, wanted: Tensor
) -> Tensor:
    outputs, features = network(obs)
    loss = (outputs - wanted).square().mean() + coefficients.extra * outputs.abs().mean()
    if coefficients.aux > 0:
        loss = loss + coefficients.aux * network.aux(features).square().mean()
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(network.parameters(), 0.5, foreach=False)
    optimizer.step()
    return torch.stack([loss.detach(), norm])


def nothing(number: int, network: Network, optimizer: torch.optim.Optimizer, coefficients: Coefficients) -> None:
    """Change nothing."""


def much(number: int, network: Network, optimizer: torch.optim.Optimizer, coefficients: Coefficients) -> None:
    """Anneal the learning rates and a number of the network; freeze a layer from the fifth step on."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) / number
    network.scale = 1 + number / 10
    network.body[0].requires_grad_(number < 5)


def an_auxiliary_loss(
    number: int, network: Network, optimizer: torch.optim.Optimizer, coefficients: Coefficients
) -> None:
    """Anneal a weight of the loss; use the second head from step 4 to step 6. Its gradient comes and goes."""
    coefficients.extra = number / 10
    coefficients.aux = 1.0 if 4 <= number <= 6 else 0.0


def another_state(number: int, network: Network, optimizer: torch.optim.Optimizer, coefficients: Coefficients) -> None:
    """Load an optimiser's state in the middle, in a memory layout other than its own."""
    if number == 4:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def two_rates(network: nn.Module) -> torch.optim.Optimizer:
    assert isinstance(network, Network)
    groups: list[dict[str, Any]] = [
        {"params": network.body.parameters(), "lr": 1e-2},
        {"params": [*network.head.parameters(), *network.aux.parameters()]},
    ]
    return torch.optim.Adam(groups, lr=3e-2, fused=True)


CASES: dict[str, tuple[list[Callable[[], nn.Module]], Optimizers, Any]] = {
    "two rates, LayerNorm, annealed, a layer frozen": ([lambda: nn.LayerNorm(8)], two_rates, much),
    "AdamW, a number of the loss, a head that comes and goes": (
        [],
        lambda network: torch.optim.AdamW(network.parameters(), lr=1e-2),
        an_auxiliary_loss,
    ),
    "RMSprop, BatchNorm": (
        [lambda: nn.BatchNorm1d(8, affine=False)],
        lambda network: torch.optim.RMSprop(network.parameters(), lr=1e-3),
        nothing,
    ),
    "SGD with momentum, another state, features folded": (
        [lambda: nn.Unflatten(1, (2, 4)), lambda: nn.Flatten()],
        lambda network: torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9),
        another_state,
    ),
}


def steps(case: str, device: str, *, enabled: bool, count: int = 8) -> tuple[list[Tensor], Network, Any]:
    """What each of some steps returned, read at the end; the network after them."""
    layers, make_optimizer, change = CASES[case]
    torch.manual_seed(0)
    network = Network(*(make() for make in layers)).to(device)
    optimizer, coefficients = make_optimizer(network), Coefficients()
    step = compiled(gradient_step, network, optimizer, coefficients, enabled=enabled)
    generator = torch.Generator().manual_seed(1)
    returned = []
    for number in range(1, count + 1):
        change(number, network, optimizer, coefficients)
        obs, wanted = (torch.randn(16, n, generator=generator).to(device) for n in (4, 2))
        returned.append(step(obs, wanted))
    return returned, network, step


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_step_is_the_plain_one_whatever_changes(case: str, device: str) -> None:
    plain, compiled_ones = (steps(case, device, enabled=enabled) for enabled in (False, True))
    assert compiled_ones[2].enabled, "it fell back"
    torch.testing.assert_close(torch.stack(compiled_ones[0]), torch.stack(plain[0]), rtol=1e-4, atol=1e-5)
    if "BatchNorm" not in case:  # the bias before it has no gradient but rounding
        torch.testing.assert_close(parameters(compiled_ones[1]), parameters(plain[1]), rtol=1e-3, atol=1e-5)
    for mine, other in zip(compiled_ones[1].buffers(), plain[1].buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-2)


def small(enabled: bool = True) -> tuple[nn.Linear, torch.optim.Optimizer, Any]:
    """A network whose weight is 0 at first and goes for 2; its step takes (B,) and returns the loss."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)

    def step(network: nn.Linear, optimizer: torch.optim.Optimizer, batch: Tensor) -> Tensor:
        loss = ((network.weight - 2) * batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return network, optimizer, compiled(step, network, optimizer, enabled=enabled)


@pytest.mark.slow
def test_a_compiled_step_is_its_own_networks_and_takes_batches_of_other_shapes() -> None:
    torch.compiler.reset()  # it remembers which sizes changed in other tests, and prepares for it
    (first, _, first_step), (second, _, second_step) = small(), small()
    for size in (2, 5):
        first_step(torch.ones(size))
    second_step(torch.ones(2, dtype=torch.float64))
    assert first_step.enabled
    assert second_step.enabled
    assert first.weight.item() == pytest.approx(0.2, rel=0.02)  # Adam's steps are about the learning rate
    assert second.weight.item() == pytest.approx(0.1, rel=0.02)
    # mean(1, 4, 16) = 7: all of the larger batch counts
    weight = first.weight.item()
    assert first_step(torch.tensor([1.0, 2.0, 4.0])).item() == pytest.approx(7 * (2 - weight) ** 2)


@pytest.mark.slow
def test_what_a_call_returns_stays_what_it_was() -> None:
    _, _, step = small()
    kept = [step(torch.full((3,), float(number))) for number in range(1, 5)]
    _, _, again = small()
    at_once = [again(torch.full((3,), float(number))).item() for number in range(1, 5)]
    assert [loss.item() for loss in kept] == at_once
    assert len(set(at_once)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-5, 1e-7])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ELU])
def test_what_is_near_0_keeps_its_digits(activation: type[nn.Module], size: float) -> None:
    """The compiler computes tanh from exp, and ELU as e^x - 1: the head's gradient would be 2 % off, or 200 %."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8, bias=False), activation(), nn.Linear(8, 1))
    obs = size * torch.randn(16, 4)

    def step(network: nn.Module, optimizer: torch.optim.Optimizer, obs: Tensor) -> Tensor:
        loss: Tensor = network(obs).mean()
        optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    plain = copy.deepcopy(network).double()
    plain(obs.double()).mean().backward()
    fast: Any = compiled(step, network, torch.optim.SGD(network.parameters(), lr=0.1))
    fast(obs)
    assert fast.enabled, "it fell back"
    for mine, other in zip(network.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_a_power_less_1_is_exact_everywhere() -> None:
    x = torch.cat([torch.logspace(-30, 2, 200), torch.tensor([0.0, torch.inf])])
    x = torch.cat([x, -x, torch.tensor([torch.nan])])
    power: Any = compiled(torch.expm1)
    torch.testing.assert_close(power(x), x.double().expm1().float(), rtol=1e-6, atol=0, equal_nan=True)
    assert power.enabled, "it fell back"


@pytest.mark.parametrize(
    ("number", "bias", "sizes"), [(92, 0, "fake"), (92, 1, "fake"), (91, 0, "fake"), (92, 0, "symbolic")]
)
def test_large_products_of_float32_go_to_onednn(number: int, bias: int, sizes: Literal["fake", "symbolic"]) -> None:
    """92 x 128 x 128 multiplications are large, 91 x 128 x 128 are not; for a symbolic number of rows it is unknown."""

    def products(x: Tensor, weight: Tensor, terms: Tensor) -> tuple[Tensor, ...]:
        every = (
            torch.addmm(terms, x, weight, beta=2),
            torch.addmm(terms[None], x, weight),
            x.double() @ weight.double(),
        )
        return torch.addmm(terms, x, weight) if bias else x @ weight, *every

    x, weight, terms = torch.randn(number, 128), torch.randn(128, 128), torch.randn(128)
    graph = make_fx(products, tracing_mode=sizes)(x, weight, terms).graph
    products_by_onednn(graph)
    calls = [node for node in graph.nodes if node.op == "call_function" and "permute" not in str(node.target)]
    large = [node for node in calls if node.target == torch.ops.minirl_fast.linear.default]
    assert len(large) == (number == 92 and sizes == "fake")
    assert sum(node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) for node in calls) == (
        4 - len(large)
    )
    for node in large:
        rows, columns, term = node.args
        assert (rows.name, columns.args[0].name, term and term.name) == ("x_1", "weight_1", "terms_1" if bias else None)


@pytest.mark.slow
def test_products_by_onednn_are_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "onednn_is_faster", lambda: True)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 128, bias=False), nn.Tanh(), nn.Linear(128, 1)
    )
    obs = torch.randn(128, 128)

    def step(network: nn.Module, optimizer: torch.optim.Optimizer, obs: Tensor) -> Tensor:
        loss: Tensor = network(obs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    plain = copy.deepcopy(network).double()
    plain(obs.double()).square().mean().backward()
    fast: Any = compiled(step, network, torch.optim.SGD(network.parameters(), lr=0.1))
    _, (code,) = run_and_get_code(fast, obs)
    assert code.count("linear_pointwise(") >= 5, "two forwards, three backwards"
    for mine, other in zip(network.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert (mine.grad - other.grad).norm() <= 1e-6 * other.grad.norm()


@pytest.mark.parametrize("at", ["once", "the first call"])
def test_a_compilation_that_fails_is_one_warning_and_then_the_plain_function(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no C++ compiler here\nand a long trace")

    monkeypatch.setattr(torch, "compile", fail if at == "once" else lambda function, **options: fail)
    network, optimizer, step = small()
    plain, _, plain_step = small(enabled=False)
    with pytest.warns(UserWarning, match="not compiled: no C.. compiler here$"):
        step(torch.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(torch.ones(3))
    for _ in range(2):
        plain_step(torch.ones(3))
    assert torch.equal(network.weight, plain.weight)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert isinstance(optimizer.param_groups[0]["lr"], float), "the optimiser is what it was"


def test_a_second_attempt_has_the_same_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[int] = []

    def compile_late(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            attempts.append(1)
            if len(attempts) == 1:
                raise torch._dynamo.exc.TorchDynamoException("a gradient comes and goes")
            return function(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", compile_late)
    network, optimizer, step = small()
    plain, _, plain_step = small(enabled=False)
    for number in range(3):
        step(torch.ones(3))
        plain_step(torch.ones(3))
        assert optimizer.param_groups[0]["lr"] == 0.1, number
        assert isinstance(optimizer.param_groups[0]["lr"], float), number
    assert step.enabled
    torch.testing.assert_close(network.weight, plain.weight)


class Killed(BaseException):
    """What a killed process sees: nothing is tidied up on the way out."""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["SIGKILL", "Ctrl-C"])
def test_a_compilation_that_was_stopped_in_its_last_link_is_done_once_more(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C reaches the C++ compiler, too, while training continues until it has saved."""
    build = cpp_builder.run_compile_cmd
    left: list[Path] = []

    def stopped_once(command: str, cwd: str) -> None:
        output = [Path(word) for word in shlex.split(command) if word.endswith(".main.so")]
        if left or not output:
            return build(command, cwd)
        left.extend(output)
        output[0].touch()
        raise Killed if end == "SIGKILL" else CppCompileError(["g++"], "")

    monkeypatch.setattr(cpp_builder, "run_compile_cmd", stopped_once)
    with fresh_cache(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.compiler.reset()
        _, optimizer, step = small()
        if end == "SIGKILL":
            with pytest.raises(Killed):
                step(torch.ones(2))
            assert left[0].stat().st_size == 0
            _, optimizer, step = small()
        step(torch.ones(2))
        assert step.enabled
        assert optimizer.param_groups[0]["compiled"]
        assert is_whole(left[0])
        assert not list(Path(cache_dir()).glob("*/*_CxxBuild"))


def test_a_library_that_was_cut_is_not_whole(tmp_path: Path) -> None:
    library = tmp_path / "a.so"
    header = b"\x7fELF".ljust(40, b"\0") + struct.pack("Q10xHH", 5_900, 64, 3)  # 3 sections, as a linker leaves them
    library.write_bytes(header.ljust(5_900 + 3 * 64, b"\0"))
    assert is_whole(library)
    for size in (5_900 + 3 * 64 - 1, 5_000, 64, 20, 0):
        with library.open("rb+") as file:
            file.truncate(size)
        assert not is_whole(library), size
    library.write_bytes(bytes(5_000))
    assert not is_whole(library), "its length was written, and nothing else"


@pytest.mark.parametrize("before", [None, 1, 0])
@pytest.mark.parametrize("now", [True, False])
def test_a_resumed_run_compiles_as_before_or_says_that_it_does_not(
    now: bool, before: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_or_not(function: Any, **options: Any) -> Any:
        if not now:
            raise RuntimeError("no C++ compiler here")
        return lambda batch: batch

    monkeypatch.setattr(torch, "compile", compile_or_not)
    _, optimizer, step = small()
    saved = optimizer.state_dict()
    if before is not None:
        saved["param_groups"][0]["compiled"] = before
    optimizer.load_state_dict(saved)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        step(torch.ones(2))
    said = "".join(str(warning.message) for warning in seen)
    assert ("its bits differ from those of a run left" in said) == (before == 1 and not now)
    assert ("its optimiser's steps were not before" in said) == (before == 0)
    assert optimizer.state_dict()["param_groups"][0]["compiled"] == (now and before != 0)


@pytest.mark.parametrize("what", ["Python that can't be compiled", "hooks of the optimiser"])
def test_what_cannot_be_compiled_runs_as_it_is_and_a_line_says_why(what: str) -> None:
    called: list[int] = []
    network = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    if what == "hooks of the optimiser":
        optimizer.register_step_post_hook(lambda *_: called.append(1))

    def step(network: nn.Linear, optimizer: torch.optim.Optimizer, batch: Tensor) -> Tensor:
        loss: Tensor = network(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if what == "Python that can't be compiled":
            torch._dynamo.graph_break()  # as `print` and many others; does nothing where nothing is compiled
            called.append(1)
        return loss.detach()

    before = parameters(network)
    with pytest.warns(UserWarning, match="not compiled: "):
        compiled(step, network, optimizer)(torch.ones(2, 1))
    assert len(called) == 1, "not when it was tried out"
    assert not torch.equal(parameters(network), before)


def negate(tensor: Tensor | None) -> None:
    assert tensor is not None
    tensor.neg_()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("what", ["hook", "accumulated", "optimiser", "group", "layer", "step"])
def test_what_would_not_be_seen_is_not_compiled(what: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    ends = []
    for enabled in (False, True):
        network, optimizer, step = small(enabled)

        def add(network: nn.Linear = network, optimizer: torch.optim.Optimizer = optimizer) -> None:
            if what == "hook":
                network.weight.register_hook(lambda gradient: -gradient)
            elif what == "accumulated":
                network.weight.register_post_accumulate_grad_hook(lambda weight: negate(weight.grad))
            elif what == "optimiser":
                optimizer.register_step_pre_hook(lambda *_: negate(network.weight.grad))
            elif what == "group":
                optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
            elif what == "layer":
                network.weight = nn.Parameter(torch.full((1, 1), 3.0))
                optimizer.param_groups[0]["params"][0] = network.weight
            else:
                own = optimizer.step

                def flipped() -> None:
                    negate(network.weight.grad)
                    own()

                optimizer.step = flipped  # type: ignore[assignment,method-assign]

        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for number in range(4):
                if number == (1 if late else 0):
                    add()
                step(torch.ones(2))
        assert len([warning for warning in seen if "not compiled: " in str(warning.message)]) == enabled
        ends.append(network.weight.item())
    assert ends[0] == pytest.approx(ends[1])
    assert (ends[0] < 0) == (what not in ("group", "layer") and not late)


def test_learning_rates_are_numbers_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that stays would be changed by `*=`, and one that was kept would have changed with it."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    ends = []
    for enabled in (False, True):
        network, optimizer, step = small(enabled)
        group = optimizer.param_groups[0]
        for number in range(8):
            if number == 2:
                kept = group["lr"]
                group["lr"] *= 0.1
            elif number == 4:
                group["lr"] = kept
            elif number in (5, 6):
                group["lr"] = 0.1 if number == 6 else group["lr"] * 3
            elif number == 7:
                group["lr"] = torch.tensor(0.05)
            step(torch.ones(2))
        assert isinstance(group["lr"], Tensor), "the user's own"
        assert group["lr"].item() == pytest.approx(0.05)
        ends.append(network.weight.item())
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


@pytest.mark.slow
def test_a_number_that_never_stays_the_same_is_given_up_on_and_named(capfd: pytest.CaptureFixture[str]) -> None:
    ends, given_up = [], []
    moves = [False, True] * 8
    for kind in ("plain", "compiled", "stopped"):
        network, optimizer, _ = small()
        network.calls = 0  # type: ignore[assignment]

        def step(network: Any, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
            network.calls += 1
            optimizer.zero_grad()
            ((network.weight - 2) * batch).square().mean().mul(1 / (1 + network.calls)).backward()
            if moves[network.calls]:
                optimizer.step()

        call = compiled(step, network, optimizer, enabled=kind != "plain")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for number in range(14):
                if (kind, number) == ("stopped", 5):
                    saved, played, weight = optimizer.state_dict(), network.calls, network.weight.detach().clone()
                    network, optimizer, _ = small()
                    network.calls = played
                    network.weight.data.copy_(weight)
                    optimizer.load_state_dict(saved)
                    call = compiled(step, network, optimizer)
                call(torch.ones(2))
                if getattr(call, "enabled", True) is False:
                    given_up.append((kind, number))
        assert network.calls == 14
        said = [str(warning.message) for warning in seen]
        assert sum("the bits differ from those of a run left alone" in line for line in said) == (kind == "stopped")
        reasons = [line for line in said if "not compiled: " in line]
        assert len(reasons) == (kind != "plain")
        assert kind == "plain" or "8 is the limit: network.calls == " in reasons[0]
        ends.append(network.weight.item())
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
    assert given_up == [("compiled", number) for number in range(8, 14)] + [("stopped", 13)]
    assert "hit config" not in capfd.readouterr().err


MISSING = object()
FILE: Any = sys.stderr


class Count:
    """Something with a state of its own, that a step reads by name."""

    def __init__(self) -> None:
        self.calls, self.seen = 0, torch.zeros(1)

    def next(self) -> int:
        self.calls += 1
        self.seen.add_(1)
        return self.calls


COUNT = Count()


def counted() -> int:
    return COUNT.next()


def test_looking_for_gradients_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call finds the parameters that have one, with copies: nothing changes, and no random number is used."""
    monkeypatch.setitem(globals(), "COUNT", of_the_module := Count())
    around = Count()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
    unused = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([*network.parameters(), unused], lr=0.1)

    def step(network: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
        optimizer.zero_grad()
        (network(batch).square().mean() * counted() * around.next()).backward()
        optimizer.step()
        batch.zero_()

    before = copy.deepcopy(network.state_dict())
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002
    batch = torch.randn(4, 2, generator=torch.Generator())
    Compiled(step, (network, optimizer))._make_gradients([batch])
    assert batch.all()
    for count in (of_the_module, around):
        assert count.calls == count.seen.item() == 0
    assert of_the_module is COUNT
    assert torch.equal(drawn[0], torch.get_rng_state())
    assert random.getstate() == drawn[1]
    np.testing.assert_equal(np.random.get_state(legacy=False), drawn[2])  # noqa: NPY002
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert unused.grad is None
    for weight in network.parameters():
        assert weight.grad is not None
        assert not weight.grad.any()
        assert weight.grad.stride() == weight.stride()


@pytest.mark.usefixtures("without_inductor")
def test_what_can_not_be_copied_is_left_where_it_is() -> None:
    """An open file, and a sentinel that is told by what it is."""

    def step(network: nn.Module, optimizer: torch.optim.Optimizer, scale: Any = MISSING) -> None:
        optimizer.zero_grad()
        loss = network(torch.ones(1, 1)).sum()
        (loss if scale is MISSING else scale).backward()
        if loss.shape == (7,):
            print(loss, file=FILE)
        optimizer.step()

    network = nn.Linear(1, 1)
    call = compiled(step, network, torch.optim.SGD(network.parameters(), lr=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


@pytest.mark.usefixtures("without_inductor")
def test_two_steps_of_one_optimiser_that_reach_other_weights_are_given_up_on() -> None:
    def one_layer(network: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
        optimizer.zero_grad()
        network[number].weight.square().sum().backward()
        optimizer.step()

    ends = []
    for enabled in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
        steps = [compiled(functools.partial(one_layer, number=i), network, optimizer, enabled=enabled) for i in (0, 1)]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(12):
                for step in steps:
                    step()
        said = [str(warning.message) for warning in seen if "not compiled: " in str(warning.message)]
        assert len(said) == (2 if enabled else 0)
        assert all("which weights have a gradient changes again and again" in line for line in said)
        ends.append(parameters(network))
    torch.testing.assert_close(ends[0], ends[1])


@pytest.mark.slow
def test_a_gradient_that_is_lost_shows_in_the_step_itself() -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)

    def step(network: nn.Linear, optimizer: torch.optim.Optimizer, scale: Tensor) -> Tensor:
        loss = (scale * network.weight).sqrt().sum()  # 0, and its slope is infinite
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), 0.5, foreach=False)
        optimizer.step()
        return torch.stack([loss.detach(), norm])

    loss, norm = compiled(step, network, torch.optim.SGD(network.parameters(), lr=0.1))(torch.ones(1))
    assert loss.item() == 0.0
    assert not norm.isfinite()


@pytest.mark.parametrize(("device", "in_cpp"), [("cpu", True), ("cuda", False)])
def test_a_gpu_is_compiled_for_without_the_headers_of_cuda(
    device: str, in_cpp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def spy(function: Any, *, options: dict[str, Any], **others: Any) -> Any:
        seen.update(options)
        return function

    monkeypatch.setattr(torch, "compile", spy)
    function = Compiled(abs, [])
    function.device = torch.device(device)
    function.trained = []  # it has been tried out: that would need the device
    assert function(-1) == 1
    assert seen.get("cpp_wrapper", False) == in_cpp
    assert seen["guard_filter_fn"] == function._guards


def test_compilation_does_not_warn_that_float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_as_for_a_gpu(function: Any, **choices: Any) -> Any:
        def first_call(*arguments: Any) -> Any:
            warnings.warn("TensorFloat32 tensor cores available but not enabled", stacklevel=1)
            warnings.warn("another", stacklevel=1)
            return function(*arguments)

        return first_call

    monkeypatch.setattr(torch, "compile", compile_as_for_a_gpu)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert compiled(abs)(-1) == 1
    assert [str(warning.message) for warning in seen] == ["another"]


@pytest.mark.parametrize(("batch_size", "bias", "products"), [(64, True, True), (70, True, False), (64, False, False)])
def test_a_small_linear_layer_is_products_and_sums_and_gives_the_same(
    batch_size: int, bias: bool, products: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 24, bias=bias, dtype=torch.float64)
    assert 64 * 24 * 24 <= FEW < 70 * 24 * 24
    inputs = torch.randn(batch_size, 24, dtype=torch.float64, requires_grad=True)
    weights = [inputs, *layer.parameters()]
    expected = layer(inputs)
    with Traceable([]):
        outputs = layer(inputs)
    matrix_product = "Addmm" if bias else "Mm"
    assert type(expected.grad_fn).__name__.startswith(matrix_product)
    assert type(outputs.grad_fn).__name__.startswith(matrix_product) != products
    torch.testing.assert_close(outputs, expected)
    gradients = [torch.autograd.grad(outcome.square().sum(), weights) for outcome in (outputs, expected)]
    torch.testing.assert_close(*gradients)


def test_the_stand_in_adds_gradients_up_until_they_are_set_to_zero() -> None:
    """As `backward` and `zero_grad` do; it is otherwise only traced, so its plain Python is tested here."""
    weight = nn.Parameter(torch.tensor([3.0]))
    weight.grad = torch.zeros(1)
    steppable = Steppable(torch.optim.SGD([weight], lr=0.5))
    steppable.prepare()
    rewritten = Traceable(steppable.parameters)
    optimizer = StandIn(steppable, rewritten)
    with rewritten:
        (2 * weight).sum().backward()
        (weight**2).sum().backward()
        assert weight.grad.item() == 2 + 6
        optimizer.step()
        assert weight.item() == 3 - 0.5 * 8
        optimizer.zero_grad()
        assert weight.grad.item() == 0
        rewritten.reached.clear()
        with pytest.raises(RuntimeError, match="has not computed since"):
            optimizer.step()
        weight.grad = None
        with pytest.raises(RuntimeError, match="had no gradient has one"):
            (2 * weight).sum().backward()


# What a step may do besides one backward pass


def steps_of(step: Any, enabled: bool, calls: int = 3) -> tuple[list[float], float, list[str]]:
    """Call a step some times; return all weights, the learning rate, and what was warned of."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    kind = torch.optim.SGD if step is with_a_layer_that_comes_to_learn_in_between else torch.optim.Adam
    optimizer = kind(network.parameters(), lr=0.1)
    if step is with_two_steps_of_momentum:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network.own = optimizer  # type: ignore[assignment]
    network[0].requires_grad_(step is not with_a_layer_that_comes_to_learn_in_between)
    call = compiled(step, network, optimizer, enabled=enabled)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(calls):
            call(torch.ones(4, 2))
            network[0].requires_grad_(True)
    weights = torch.cat([weight.detach().flatten() for weight in network.parameters()]).tolist()
    said = [str(warning.message) for warning in seen if warning.category is UserWarning]  # not what PyTorch deprecates
    return weights, optimizer.param_groups[0]["lr"], said


def with_a_second_pass_through_one_layer(network: Any, optimizer: torch.optim.Optimizer, obs: Tensor) -> None:
    for whole in (True, False):
        optimizer.zero_grad()
        (network(obs) if whole else network[2].weight.square()).mean().backward()
        optimizer.step()  # Adam leaves a weight without a gradient alone, and would move one whose gradient is 0


def with_another_rate_in_place(network: Any, optimizer: torch.optim.Optimizer, obs: Tensor) -> None:
    optimizer.zero_grad()
    network(obs).mean().backward()
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] *= 0.5


def with_pythons_random(network: Any, optimizer: torch.optim.Optimizer, obs: Tensor) -> None:
    optimizer.zero_grad()
    (random.uniform(1, 2) * network(obs).mean()).backward()
    optimizer.step()


def with_numpys_random(network: Any, optimizer: torch.optim.Optimizer, obs: Tensor) -> None:
    optimizer.zero_grad()
    (np.random.uniform(1, 2) * network(obs).mean()).backward()  # noqa: NPY002
    optimizer.step()


def with_gradients_by_hand(network: Any, optimizer: torch.optim.Optimizer, obs: Tensor) -> None:
    weights = list(network.parameters())
    for weight, gradient in zip(weights, torch.autograd.grad(network(obs).mean(), weights), strict=True):
        weight.grad = 2 * gradient
    optimizer.step()


def with_a_layer_that_comes_to_learn_in_between(network: Any, optimizer: torch.optim.Optimizer, obs: Tensor) -> None:
    network.calls = getattr(network, "calls", 0) + 1
    network(obs).mean().backward()
    if network.calls == 3:  # gradients add up until then
        optimizer.step()
        optimizer.zero_grad()


class WithItsLastRate(torch.optim.SGD):
    """Keeps the rate of its last step, as corrections of the momentum do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                weight.sub_(weight.grad * (group["lr"] ** 2 / group.get("last_lr", 1.0)))
            group["last_lr"] = group["lr"]


@pytest.mark.usefixtures("without_inductor")
def test_an_optimiser_may_keep_its_last_learning_rate() -> None:
    ends = []
    for enabled in (False, True):
        network = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(network.weight)
        optimizer = WithItsLastRate(network.parameters())
        call = compiled(with_one_pass, network, optimizer, enabled=enabled)
        for rate in (1.0, 0.5, 0.25):
            optimizer.param_groups[0]["lr"] = rate
            call(torch.ones(1, 1))
        ends.append(network.weight.item())
    assert ends[0] == ends[1] == -(1.0 + 0.5**2 / 1.0 + 0.25**2 / 0.5)


def with_one_pass(network: Any, optimizer: torch.optim.Optimizer, obs: Tensor) -> None:
    optimizer.zero_grad()
    network(obs).mean().backward()
    optimizer.step()


def with_two_steps_of_momentum(network: Any, optimizer: torch.optim.Optimizer, obs: Tensor) -> None:
    for _ in range(2):
        with_one_pass(network, optimizer, obs)


def with_a_branch(network: Any, optimizer: torch.optim.Optimizer, obs: Tensor) -> None:
    optimizer.zero_grad()
    loss = network(obs).mean()
    (2 * loss if loss > 0 else loss).backward()
    optimizer.step()


def with_a_condition_on_a_count(network: Any, optimizer: torch.optim.Optimizer, obs: Tensor) -> None:
    optimizer.zero_grad()
    positive = int((obs > 0).sum())
    (network(obs).mean() * (2 if positive > 3 else 1)).backward()
    optimizer.step()


def with_an_optimiser_in_an_attribute(network: Any, optimizer: torch.optim.Optimizer, obs: Tensor) -> None:
    network.own.zero_grad()
    network(obs).mean().backward()
    network.own.step()


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (
            with_a_second_pass_through_one_layer,
            "not compiled: `step` meets a gradient that `backward` has not comput",
        ),
        (with_another_rate_in_place, ""),
        (with_pythons_random, "not compiled: it draws from Python's `random`"),
        (with_numpys_random, "not compiled: it draws from NumPy's `np.random`"),
        (with_gradients_by_hand, "not compiled: `step` meets a gradient that `backward` has not computed"),
        (with_an_optimiser_in_an_attribute, "not compiled: an optimiser must be among the bound arguments"),
        (with_a_layer_that_comes_to_learn_in_between, ""),
        (
            with_two_steps_of_momentum,
            "not compiled: PyTorch's compiler would lose the momentum between two first steps",
        ),
        (with_a_branch, "not compiled: what it does next depends on the value of a tensor ("),
        (with_a_condition_on_a_count, "not compiled: what it does next depends on the value of a tensor ("),
    ],
)
def test_an_unusual_step_does_what_the_plain_one_does_or_says_why_not(step: Any, reason: str) -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    weights, rate, _ = steps_of(step, enabled=False)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    weights_here, rate_here, said = steps_of(step, enabled=True)
    assert weights_here == pytest.approx(weights, abs=1e-5)
    assert rate_here == pytest.approx(rate)
    assert len(said) == bool(reason)
    assert reason in "".join(said)


@pytest.mark.slow
def test_a_counter_that_decides_a_branch_is_compiled_once_for_each_way() -> None:
    def every_third(network: Any, optimizer: torch.optim.Optimizer, obs: Tensor) -> None:
        network.calls = getattr(network, "calls", 0) + 1
        optimizer.zero_grad()
        (network(obs).mean() / network.calls).backward()
        if network.calls % 3 == 0:
            optimizer.step()

    (weights, _, _), (weights_here, _, said) = (steps_of(every_third, enabled, calls=14) for enabled in (False, True))
    assert weights_here == pytest.approx(weights, abs=1e-5)
    assert said == [], "it is not given up on"


@pytest.mark.usefixtures("without_inductor")
def test_choosing_with_pythons_random_is_not_compiled_either() -> None:
    def act(network: nn.Module, obs: Tensor) -> Tensor:
        values: Tensor = network(obs)
        return (values * random.random()).detach()

    network = nn.Linear(2, 1)
    random.seed(0)
    expected = act(network, torch.ones(1, 2))
    random.seed(0)
    with pytest.warns(UserWarning, match="it draws from Python's `random`"):
        assert torch.equal(compiled(act, network)(torch.ones(1, 2)), expected)
