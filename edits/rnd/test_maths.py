"""The moments, the intrinsic rewards and the predictor's gradient, by hand and by loops."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from minirl.ppo import ActorCritic, Moments, PPOConfig, RandomDistillation, gradient_step

ONE = gym.spaces.Box(-9, 9, (1,), np.float32)


def linear(weight: float) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, weight)
    return layer


def doubling(num_envs: int, gamma: float, predicted: float) -> RandomDistillation:
    """Return a distillation whose target says 2 x, and its predictor `predicted` times x."""
    rnd = RandomDistillation(ONE, num_envs, gamma)
    rnd.target, rnd.predictor = linear(2.0).requires_grad_(False), linear(predicted)
    return rnd


def test_moments_are_those_of_all_values_together() -> None:
    values = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1
    moments = Moments(3)
    for part in values.split([1, 40, 59]):
        moments.update(part)
    torch.testing.assert_close(moments.mean, values.mean(dim=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moments.var, values.var(dim=0, correction=0), rtol=1e-4, atol=1e-4)


def test_the_error_and_its_gradient_by_hand() -> None:
    rnd = doubling(1, 0.9, predicted=0.5)
    rnd.seen.mean.fill_(1.0)
    rnd.seen.var.fill_(4.0)
    errors = rnd(torch.tensor([[1.0], [5.0], [99.0]]))  # normalised: 0, 2, and 49 clipped to 5
    assert errors.tolist() == pytest.approx([0.0, (1.5 * 2) ** 2, (1.5 * 5) ** 2])
    errors.mean().backward()
    # d/dw ((w - 2) x)^2 = 2 (w - 2) x^2
    assert rnd.predictor.weight.grad.item() == pytest.approx(2 * -1.5 * (0 + 4 + 25) / 3)
    assert rnd.target.weight.grad is None


def test_intrinsic_rewards_are_errors_over_the_deviation_of_their_discounted_sums() -> None:
    rng, gamma, (steps, envs) = np.random.default_rng(0), 0.5, (4, 3)
    rnd, running, seen, sums = doubling(envs, gamma, predicted=0.0), np.zeros(envs), [], []
    for _ in range(2):  # rollouts: the sums go on from one to the next, and through the ends of episodes
        obs = rng.normal(3.0, 2.0, (steps, envs, 1))
        rewards = rnd.rewards(torch.tensor(obs, dtype=torch.float32)).numpy()
        seen += obs.flatten().tolist()
        errors = (2 * (obs[..., 0] - np.mean(seen)) / np.std(seen)) ** 2
        for error in errors:
            running = gamma * running + error
            sums += running.tolist()
        np.testing.assert_allclose(rewards, errors / np.std(sums), rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(rnd.sum, running, rtol=2e-3)


def test_a_gradient_step_moves_agent_and_predictor_and_not_the_target() -> None:
    torch.manual_seed(0)
    agent, rnd = ActorCritic(ONE, gym.spaces.Discrete(2)), RandomDistillation(ONE, 1, 0.9)
    before = {name: weight.clone() for name, weight in [*agent.named_parameters(), *rnd.named_parameters()]}
    adam = torch.optim.Adam([*agent.parameters(), *rnd.predictor.parameters()], lr=0.1)
    columns = ("log_probs", "advantages", "values", "returns")
    samples = {name: torch.randn(8) for name in columns} | {"actions": torch.randint(2, (8,))}
    samples |= {"observations": torch.randn(8, 1), "next_observations": torch.randn(8, 1)}
    gradient_step(agent, rnd, adam, PPOConfig(), torch.float32, samples, torch.arange(4), torch.tensor(0.1))
    for name, weight in [*agent.named_parameters(), *rnd.named_parameters()]:
        assert torch.equal(weight, before[name]) == name.startswith("target"), name
