"""Each step that the two optimisers take in a training, against their formulas in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from minirl import dqn, ppo

Step = tuple[list[Tensor], list[Tensor], list[Tensor]]  # the weights before, their gradients, the weights after


def steps_of(name: str, train: Any, config: Any, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Train, and return what the optimiser of that name did."""
    steps: list[Step] = []

    class Spy(getattr(torch.optim, name)):  # type: ignore[misc]
        def step(self, closure: Any = None) -> None:
            weights = [weight for group in self.param_groups for weight in group["params"]]
            before, gradients = ([tensor.detach().clone() for tensor in of] for of in (weights, grads(weights)))
            super().step(closure)
            steps.append((before, gradients, [weight.detach().clone() for weight in weights]))

    monkeypatch.setattr(torch.optim, name, Spy)
    train(config, device="cpu")
    return steps


def grads(weights: list[Any]) -> list[Tensor]:
    """Return their gradients."""
    return [weight.grad for weight in weights]


def test_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """w <- (1 - lr 0.01) w - lr m^ / (sqrt(v^) + 1e-5): the decay is outside of the moments."""
    sizes: dict[str, Any] = {"num_envs": 2, "num_steps": 8, "minibatch_size": 4, "update_epochs": 1}
    config = ppo.PPOConfig("CartPole-v1", total_timesteps=16, learning_rate=0.1, compile=False, **sizes)
    steps = steps_of("AdamW", ppo.train, config, monkeypatch)
    assert len(steps) == 4
    for number in range(len(steps[0][0])):
        first = second = torch.zeros((), dtype=torch.float64)
        for t, (before, gradients, after) in enumerate(steps, start=1):
            weight, gradient = before[number].double(), gradients[number].double()
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            update = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-5)
            expected = (1 - 0.1 * 0.01) * weight - 0.1 * update
            torch.testing.assert_close(after[number].double(), expected, rtol=1e-4, atol=1e-5)


def test_rmsprop(monkeypatch: pytest.MonkeyPatch) -> None:
    """w <- w - lr g / (sqrt(v - m^2) + 0.1), where m and v are running means of g and g^2 that keep 0.95."""
    sizes: dict[str, Any] = {"total_timesteps": 40, "learning_starts": 32, "batch_size": 32, "eval_frequency": None}
    config = dqn.DQNConfig("CartPole-v1", learning_rate=0.1, anneal_lr=False, compile=False, **sizes)
    steps = steps_of("RMSprop", dqn.train, config, monkeypatch)
    assert len(steps) == 9
    for number in range(len(steps[0][0])):
        mean = square = torch.zeros((), dtype=torch.float64)
        for before, gradients, after in steps:
            weight, gradient = before[number].double(), gradients[number].double()
            mean, square = 0.95 * mean + 0.05 * gradient, 0.95 * square + 0.05 * gradient**2
            expected = weight - 0.1 * gradient / ((square - mean**2).sqrt() + 0.1)
            torch.testing.assert_close(after[number].double(), expected, rtol=1e-4, atol=1e-5)
