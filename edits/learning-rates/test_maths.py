"""Adam's first step is lr g / (|g| + eps): each half of the network takes it at its own rate, and both rates fall."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from minirl import ppo

SIZES: dict[str, Any] = {"num_envs": 2, "num_steps": 8, "minibatch_size": 16, "update_epochs": 1}
RATES: dict[str, Any] = {"learning_rate": 0.001, "critic_learning_rate": 0.01, "anneal_lr": True}
CONFIG = ppo.PPOConfig("CartPole-v1", total_timesteps=32, compile=False, **SIZES, **RATES)


def test_both_rates_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[list[float]] = []
    first: list[list[tuple[Tensor, Tensor]]] = []  # of each group's weights, how far they moved, and their gradients

    class Spy(torch.optim.Adam):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            rates.append([group["lr"] for group in self.param_groups])
            groups = [group["params"] for group in self.param_groups]
            before = [[weight.detach().clone() for weight in group] for group in groups]
            super().step(closure)
            if not first:
                for group, old in zip(groups, before, strict=True):
                    pairs = zip(group, old, strict=True)
                    first.append([(weight.detach() - other, weight.grad.clone()) for weight, other in pairs])

    monkeypatch.setattr(torch.optim, "Adam", Spy)
    agent = ppo.train(CONFIG, device="cpu")
    assert rates == [pytest.approx([0.001, 0.01]), pytest.approx([0.0005, 0.005])]
    shapes = [[tuple(moved.shape) for moved, _ in group] for group in first]
    body = [(64, 4), (64,), (64, 64), (64,)]
    assert shapes == [[*body, (2, 64), (2,)], [*body, (1, 64), (1,)]], "the actor's weights, and the critic's"
    assert sum(len(group) for group in first) == len(list(agent.parameters()))
    for rate, group in zip((0.001, 0.01), first, strict=True):
        for moved, gradient in group:
            torch.testing.assert_close(moved, -rate * gradient / (gradient.abs() + 1e-5), rtol=1e-3, atol=1e-6)


def test_compiled_they_are_the_same() -> None:
    plain, other = (ppo.train(dataclasses.replace(CONFIG, compile=on), device="cpu") for on in (False, True))
    for weight, twin in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, twin, rtol=1e-3, atol=1e-5)
