"""Double DQN's target, loss and schedules: every branch worked out by hand, values and gradients."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from minirl.checks import ConfigError
from minirl.dqn import (
    Clock,
    DQNConfig,
    QNetwork,
    double_dqn_target,
    dqn_loss,
    epsilon_at,
    target_updates_due,
    times_due,
)

CARTPOLE = gym.make("CartPole-v1").observation_space
PIXELS = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)


def numbers(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def test_the_online_network_chooses_and_the_target_network_judges() -> None:
    next_q_online = torch.tensor([[1.0, 5.0, 2.0], [9.0, 0.0, 0.0], [0.0, 1.0, 7.0]], dtype=torch.float64)
    next_q_target = torch.tensor([[30.0, 10.0, 20.0], [4.0, 8.0, 6.0], [50.0, 60.0, 70.0]], dtype=torch.float64)
    targets = double_dqn_target(
        numbers(1.0, -2.0, 3.0), torch.tensor([False, False, True]), next_q_online, next_q_target, gamma=0.5
    )
    # Row 0: online picks 1, worth 10, though the target's own best is 30; row 1: picks 0, worth 4; row 2 ended.
    assert targets.tolist() == [1 + 0.5 * 10, -2 + 0.5 * 4, 3.0]


def test_nothing_leaks_through_a_real_end() -> None:
    nan = torch.full((1, 2), torch.nan)
    targets = double_dqn_target(torch.tensor([2.0]), torch.tensor([True]), torch.zeros(1, 2), nan, 0.9)
    assert targets.tolist() == [2.0]


def test_the_target_carries_no_gradient() -> None:
    rewards, q = numbers(1.0, grad=True), torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    assert not double_dqn_target(rewards, torch.tensor([False]), q, q, 0.9).requires_grad


def test_squared_loss_by_hand() -> None:
    q_values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    loss = dqn_loss(q_values, torch.tensor([1, 0]), numbers(5.0, 2.5))
    loss.backward()
    assert loss.item() == pytest.approx(((2 - 5) ** 2 + (3 - 2.5) ** 2) / 2)
    assert q_values.grad is not None
    assert q_values.grad.tolist() == [[0.0, -3.0], [0.5, 0.0]]  # 2 (Q - y) / B, for the action taken alone


def test_huber_loss_by_hand() -> None:
    q_values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    loss = dqn_loss(q_values, torch.tensor([1, 0]), numbers(5.0, 2.5), huber=True)
    loss.backward()
    assert loss.item() == pytest.approx(((3 - 0.5) + 0.5 * 0.5**2) / 2)  # beyond 1 linear, within it half the square
    assert q_values.grad is not None
    assert q_values.grad.tolist() == [[0.0, -0.5], [0.25, 0.0]]  # clip(Q - y, -1, 1) / B


@pytest.mark.parametrize("wrong", ["rewards", "terminated", "next_q_online", "next_q_target"])
def test_the_target_refuses_shapes_that_would_broadcast(wrong: str) -> None:
    arguments = {
        "rewards": torch.zeros(3),
        "terminated": torch.zeros(3, dtype=torch.bool),
        "next_q_online": torch.zeros(3, 2),
        "next_q_target": torch.zeros(3, 2),
    }
    assert double_dqn_target(**arguments, gamma=0.9).shape == (3,)
    arguments[wrong] = arguments[wrong][:, None] if arguments[wrong].ndim == 1 else arguments[wrong][:1]
    with pytest.raises(ValueError, match=wrong):
        double_dqn_target(**arguments, gamma=0.9)


@pytest.mark.parametrize("wrong", ["q_values", "actions", "targets"])
def test_the_loss_refuses_shapes_that_would_broadcast(wrong: str) -> None:
    arguments = {"q_values": torch.zeros(3, 2), "actions": torch.zeros(3, dtype=torch.int64), "targets": torch.zeros(3)}
    assert dqn_loss(**arguments, huber=False).shape == ()
    arguments[wrong] = arguments[wrong][:, None] if arguments[wrong].ndim == 1 else arguments[wrong][:1]
    with pytest.raises(ValueError, match=wrong):
        dqn_loss(**arguments, huber=False)


# Schedules


def test_epsilon_falls_linearly_and_stays_down() -> None:
    config = DQNConfig(
        total_timesteps=1000, learning_starts=0, exploration_fraction=0.4, start_epsilon=0.9, end_epsilon=0.1
    )
    assert [epsilon_at(config, Clock(steps, 7)) for steps in (0, 100, 200, 399, 400, 401, 1000)] == pytest.approx(
        [0.9, 0.7, 0.5, 0.102, 0.1, 0.1, 0.1]
    )


def test_epsilon_decays_by_episode() -> None:
    config = DQNConfig(epsilon_decay=0.5, start_epsilon=1.0, end_epsilon=0.1, exploration_fraction=0.1)
    assert [epsilon_at(config, Clock(5000, episodes)) for episodes in (0, 1, 2, 3, 4, 100)] == pytest.approx(
        [1.0, 0.5, 0.25, 0.125, 0.1, 0.1]
    )


def test_the_notebooks_epsilon() -> None:
    config = DQNConfig(epsilon_decay=0.995, end_epsilon=0.01)
    assert epsilon_at(config, Clock(0, 100)) == pytest.approx(0.6058, abs=1e-4)
    assert epsilon_at(config, Clock(0, 499)) == pytest.approx(0.0820, abs=1e-4)
    assert epsilon_at(config, Clock(0, 10_000)) == 0.01


@pytest.mark.parametrize(
    ("every", "before", "now", "times"),
    [(1, 4, 5, 1), (4, 3, 4, 1), (4, 4, 5, 0), (4, 0, 8, 2), (4, 7, 15, 2), (9, 0, 8, 0)],
)
def test_how_often_a_multiple_is_passed(every: int, before: int, now: int, times: int) -> None:
    assert times_due(every, before, now) == times


def test_the_target_is_due_by_steps_or_by_episodes() -> None:
    by_steps = DQNConfig(target_network_frequency=10)
    assert target_updates_due(by_steps, Clock(9, 3), Clock(10, 3)) == 1
    assert target_updates_due(by_steps, Clock(10, 4), Clock(11, 5)) == 0
    assert target_updates_due(by_steps, Clock(8, 4), Clock(32, 5)) == 3
    by_episodes = DQNConfig(target_network_episodes=5)
    assert target_updates_due(by_episodes, Clock(10, 4), Clock(11, 5)) == 1
    assert target_updates_due(by_episodes, Clock(9, 3), Clock(10, 3)) == 0


# Network


def test_the_notebooks_network_has_770_parameters() -> None:
    network = QNetwork(CARTPOLE, 2)
    assert [tuple(parameter.shape) for parameter in network.parameters()] == [
        *[(24, 4), (24,), (24, 24), (24,), (2, 24), (2,)]
    ]
    assert sum(parameter.numel() for parameter in network.parameters()) == 770


def test_the_network_is_the_mlp_it_says() -> None:
    network = QNetwork(CARTPOLE, 2, (5, 3)).double()
    w1, b1, w2, b2, w3, b3 = [parameter.detach().numpy() for parameter in network.parameters()]
    obs = np.random.default_rng(0).normal(size=(7, 4))
    hidden = np.maximum(np.maximum(obs @ w1.T + b1, 0) @ w2.T + b2, 0)
    np.testing.assert_allclose(network(torch.from_numpy(obs)).detach().numpy(), hidden @ w3.T + b3, atol=1e-12)


def test_all_values_start_near_zero() -> None:
    torch.manual_seed(0)
    values = QNetwork(CARTPOLE, 2)(torch.randn(50, 4))
    assert values.abs().max() < 0.1
    assert values.std() > 0


def test_images_go_through_the_nature_cnn() -> None:
    network = QNetwork(PIXELS, 6, hidden_sizes=(3,))
    values = network(torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8))
    assert values.shape == (2, 6)
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_687_206  # that of Mnih et al., 6 actions


@pytest.mark.parametrize("space", [gym.spaces.Discrete(3), gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)])
def test_other_observations_are_refused(space: gym.Space[object]) -> None:
    with pytest.raises(ConfigError, match="--env-id"):
        QNetwork(space, 2)
