"""A compiled function notices when a value that it reads from Python changes, wherever that is stored."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minirl.fast.compiled import compiled, that_can_change
from minirl.fast.rewrites import Traceable


class Thing:
    """A user's own object, which a loss may read from."""

    inherited = 1.0

    def __init__(self, number: float | None) -> None:
        self.number = number


class Derived(Thing):
    """Has no `inherited` of its own."""


class Scaled(nn.Module):
    """(B, 2) -> a number, 1 at first."""

    scale = 1.0
    of_class = staticmethod(torch.sign)

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.activation = nn.Linear(2, 1), nn.Identity()
        self.of_three: Any = torch.sign
        for weight in self.parameters():
            nn.init.ones_(weight)

    def forward(self, obs: Tensor) -> Tensor:
        number: Tensor = self.scale * self.activation(self.layer(0 * obs)).mean() + getattr(self, "late", 0.0)
        return number


def one() -> float:
    return 1.0


def three() -> float:
    return 3.0


class Three(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return 3 * features


def late_numbers() -> dict[str, tuple[Callable[[Scaled], Any], Callable[[Scaled], Any]]]:
    """Places -> what reads a number, 1, from there, and what makes it 3."""
    thing, derived, local, numbers = Thing(1.0), Derived(None), 1.0, {"first": 1.0}

    listed, more = [1.0], {"number": 0.0}

    def becomes_3() -> None:
        nonlocal local
        local = 3.0

    def by_default(listed: list[float] = listed, *, more: dict[str, float] = more) -> float:
        return listed[0] + more["number"]

    setattr(thing, "function", one)  # noqa: B010
    setattr(thing, "of_three", torch.sign)  # noqa: B010
    threes = torch.full((), 3.0)
    return {
        "closure": (lambda _: local, lambda _: becomes_3()),
        "object in a closure": (lambda _: thing.number, lambda _: setattr(thing, "number", 3.0)),
        "dict in a closure": (lambda _: sum(numbers.values()), lambda _: numbers.update(second=2.0)),
        "default": (lambda _: by_default(), lambda _: listed.__setitem__(0, 3.0)),
        "keyword default": (lambda _: by_default(), lambda _: more.update(number=2.0)),
        "class above": (lambda _: derived.inherited, lambda _: setattr(Thing, "inherited", 3.0)),
        "None": (lambda _: derived.number or 1.0, lambda _: setattr(derived, "number", 3.0)),
        "attribute that was missing": (
            lambda _: getattr(thing, "late", 1.0),
            lambda _: setattr(thing, "late", 3.0),
        ),
        "function": (lambda _: thing.function(), lambda _: setattr(thing, "function", three)),  # type: ignore[attr-defined]
        "function of PyTorch's": (
            lambda _: thing.of_three(threes),  # type: ignore[attr-defined]
            lambda _: setattr(thing, "of_three", torch.abs),
        ),
        "function of PyTorch's that the network has": (
            lambda network: network.of_three(threes),
            lambda network: setattr(network, "of_three", torch.abs),
        ),
        "function of PyTorch's that its class has": (
            lambda network: network.of_class(threes),
            lambda network: setattr(type(network), "of_class", staticmethod(torch.abs)),
        ),
        "attribute that a layer of PyTorch's had not": (
            lambda network: getattr(network.layer, "late", 1.0),
            lambda network: setattr(network.layer, "late", 3.0),
        ),
        "forward of a layer of PyTorch's": (
            lambda network: network(torch.ones(1, 2)).detach(),
            lambda network: setattr(network.activation, "forward", lambda features: 3 * features),
        ),
        "class of the network": (lambda network: network.scale, lambda network: setattr(network, "scale", 3.0)),
        "attribute that the network had not": (
            lambda network: network(torch.ones(1, 2)).detach(),
            lambda network: setattr(network, "late", 2.0),
        ),
        "activation": (
            lambda network: network(torch.ones(1, 2)).detach(),
            lambda network: setattr(network, "activation", Three()),
        ),
        "hook": (
            lambda network: network(torch.ones(1, 2)).detach(),
            lambda network: network.layer.register_forward_hook(lambda module, given, output: 3 * output),
        ),
    }


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("place", late_numbers())
def test_what_changes_is_seen_wherever_a_loss_reads_it(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Thing, "inherited", 1.0)
    monkeypatch.setattr(Scaled, "of_class", staticmethod(torch.sign))
    read, change = late_numbers()[place]
    network = Scaled()

    def step(network: Scaled, optimizer: torch.optim.Optimizer, obs: Tensor) -> Tensor:
        number: Tensor | float = read(network)
        loss = 0 * network(obs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result: Tensor = number + loss.detach()
        return result

    fast: Any = compiled(step, network, torch.optim.SGD(network.parameters(), lr=0.1))
    assert fast(torch.ones(1, 2)).item() == 1.0
    change(network)
    assert fast(torch.ones(1, 2)).item() == 3.0
    assert fast.enabled, "it fell back"


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[1.0, 0.5, 0.25, 0, 2, 3], [1, 2, 3, 2.5, 0.5]])
@pytest.mark.parametrize("place", ["bound", "argument"])
def test_a_number_may_become_one_of_another_type(place: str, numbers: list[float]) -> None:
    network, thing = Scaled(), Thing(None)

    def step(network: Scaled, thing: Thing, given: Any) -> Tensor:
        weight = network.layer.weight.detach().sum()  # 2
        number: Any = thing.number if place == "bound" else given
        result: Tensor = weight * number
        return result

    fast: Any = compiled(step, network, thing)
    for number in numbers:
        thing.number = number
        assert fast(number if place == "argument" else 0).item() == 2 * float(number)
    assert fast.enabled, "it fell back"


def test_only_conditions_on_fixed_code_are_dropped() -> None:
    @dataclass
    class Condition:
        guard_type: str
        value: Any
        name: str = "L['batch']"

    linear = nn.Linear(1, 1)
    kept = [Condition("TENSOR_MATCH", linear.weight), Condition("CONSTANT_MATCH", 1), Condition("TYPE_MATCH", linear)]
    kept += [Condition("TYPE_MATCH", 0.5), Condition("TYPE_MATCH", None)]
    kept += [Condition("CLOSURE_MATCH", one), Condition("HASATTR", Thing(1.0)), Condition("CLASS_MATCH", Thing)]
    kept += [Condition("TYPE_MATCH", {}, "self.stand_ins[0].steppable.optimizer.state")]
    kept += [Condition("NOT_PRESENT_IN_GENERIC_DICT", linear), Condition("BUILTIN_MATCH", torch.abs, "L['x'].act")]
    of_torch = "G['__import_torch_dot_nn_dot_modules_dot_linear'].F.relu"
    dropped = [Condition("CLOSURE_MATCH", nn.functional.relu, of_torch), Condition("HASATTR", linear.weight)]
    dropped += [Condition("CLASS_MATCH", nn.Linear, "G['__import_torch_dot_nn'].Linear"), Condition("TYPE_MATCH", {})]
    dropped += [Condition("MODULE_MATCH", torch), Condition("HASATTR", Traceable([]))]
    assert that_can_change(kept) == [True] * len(kept)
    assert that_can_change(dropped) == [False] * len(dropped)
