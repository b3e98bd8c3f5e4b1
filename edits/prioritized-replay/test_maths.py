"""Sampling probabilities and weights by brute force, the weighted loss and its gradient by hand."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from minirl.dqn import DQNConfig, QNetwork, dqn_loss, gradient_step
from minirl.replay import Batch, ReplayBuffer

NOTHING = np.zeros(2, np.bool_)


def filled(steps: int, length: int, *, stacked: bool = False, ends: tuple[int, ...] = ()) -> ReplayBuffer:
    """Return a memory of two environments, in which the transition of step t has the reward 2 t + its environment."""
    shape, dtype = ((2, 36, 36), np.uint8) if stacked else ((1,), np.float32)
    memory = ReplayBuffer(2 * length, gym.spaces.Box(0, 255, shape, dtype), 2, stacked=stacked, seed=3)
    obs = np.zeros((2, *shape), dtype)
    for t in range(steps):
        ended = np.array([t in ends, False])
        memory.add(obs, np.zeros(2, np.int64), 2.0 * t + np.arange(2), obs, ended, NOTHING)
    return memory


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("steps", [3, 9])  # five are remembered
def test_each_transition_is_drawn_as_often_as_its_priority_says(steps: int, stacked: bool) -> None:
    memory = filled(steps, 5, stacked=stacked, ends=(5, 6, 7))  # frames of such short episodes are lost sooner
    stored = {2 * t + env for env, size in enumerate(memory._sizes()) for t in range(steps - size, steps)}
    assert len(stored) == len(memory)
    # Give each a priority by its reward, as a training does: by where it was drawn from.
    for _ in range(50):
        batch = memory.sample(len(memory))
        memory.set_priorities(batch.where, -(batch.rewards + 1))
    alpha, beta = 0.7, 0.4
    powers = {reward: (reward + 1) ** alpha for reward in stored}
    chances = {reward: power / sum(powers.values()) for reward, power in powers.items()}
    weights = {reward: (len(stored) * chance) ** -beta for reward, chance in chances.items()}
    drawn = [memory.sample(len(memory), alpha, beta) for _ in range(40_000 // len(memory))]
    rewards, given = (np.concatenate([batch[column] for batch in drawn]) for column in (2, 5))
    assert set(rewards) == stored
    for reward in stored:
        expected = chances[reward]
        deviation = (expected * (1 - expected) / len(rewards)) ** 0.5
        assert abs((rewards == reward).mean() - expected) < 5 * deviation
        np.testing.assert_allclose(given[rewards == reward], weights[reward] / max(weights.values()), rtol=1e-5)


def test_a_new_transition_has_the_largest_priority() -> None:
    memory = filled(1, 4)
    assert memory.priorities[:, :2].tolist() == [[1, 0], [1, 0]]  # the first ones
    memory.set_priorities(np.array([0, 4]), np.array([-7.0, 2.0]))
    memory.add(np.zeros((2, 1)), np.zeros(2, np.int64), np.zeros(2), np.zeros((2, 1)), NOTHING, NOTHING)
    np.testing.assert_allclose(memory.priorities[:, :2], [[7, 7], [2, 7]], rtol=1e-5)


def test_alpha_0_is_uniform_and_beta_0_weighs_nothing() -> None:
    memory = filled(4, 4)
    memory.set_priorities(np.arange(8), np.arange(8.0))
    assert (memory.sample(8, 0.0, 1.0).weights == 1).all()
    assert (memory.sample(8, 1.0, 0.0).weights == 1).all()


def test_the_weighted_loss_and_its_gradient_by_hand() -> None:
    q_values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    loss = dqn_loss(q_values, torch.tensor([0, 1]), torch.tensor([3.0, 3.0]), torch.tensor([0.5, 1.0]))
    loss.backward()
    assert loss.item() == (0.5 * (1 - 3) ** 2 + 1.0 * (4 - 3) ** 2) / 2
    assert q_values.grad is not None
    assert q_values.grad.tolist() == [[0.5 * (1 - 3), 0.0], [0.0, 1.0 * (4 - 3)]]


def test_a_gradient_step_gives_the_td_errors_of_before() -> None:
    torch.manual_seed(0)
    online, target = (QNetwork(gym.spaces.Box(-1, 1, (3,), np.float32), 2) for _ in range(2))
    obs, next_obs, rewards = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4)
    actions, terminated, weights = torch.tensor([0, 1, 1, 0]), torch.tensor([True, False, False, True]), torch.ones(4)
    with torch.no_grad():
        following = [target(s)[online(s).argmax()].item() for s in next_obs]
        expected = [
            rewards[i] + (0 if terminated[i] else 0.9 * following[i]) - online(obs[i])[actions[i]] for i in range(4)
        ]
    adam, config = torch.optim.Adam(online.parameters()), DQNConfig(gamma=0.9)
    batch = Batch(obs, actions, rewards, next_obs, terminated, weights, torch.arange(4))
    logged, errors = gradient_step(online, target, adam, config, torch.float32, batch)
    torch.testing.assert_close(errors, torch.stack(expected))
    torch.testing.assert_close(logged["td_loss"], errors.square().mean())


def test_what_is_saved_and_put_back_has_the_same_priorities() -> None:
    memory, other = filled(9, 5), filled(9, 5)
    memory.set_priorities(np.arange(10), np.arange(10.0))
    other.set_counters(memory.counters())
    for mine, theirs in zip(memory.sample(8, 0.6, 0.4), other.sample(8, 0.6, 0.4), strict=True):
        assert np.array_equal(mine, theirs)
