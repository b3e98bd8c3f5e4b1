"""Q(s, a) = V(s) + A(s, a) - mean A(s, .) with numbers by hand, also where the network acts."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from minirl.dqn import QNetwork, action_values, greedy_actions


@pytest.fixture
def network() -> QNetwork:
    """Features are the observation; A = (o_0, o_1, o_0 + o_1), V = 2 o_0 + 3 o_1 + 1."""
    network = QNetwork(gym.spaces.Box(-9, 9, (2,)), num_actions=3, hidden_sizes=(2,))
    weights = [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [[2.0, 3.0]]
    for layer, weight in zip((network.body[0], network.head, network.value), weights, strict=True):
        layer.weight.data = torch.tensor(weight)
    network.value.bias.data.fill_(1.0)
    return network


def test_values_by_hand(network: QNetwork) -> None:
    """(1, 2) has A = (1, 2, 3), whose mean is 2, and V = 9."""
    assert network(torch.tensor([[1.0, 2.0]])).tolist() == [[8.0, 9.0, 10.0]]
    obs, device = np.array([[1.0, 2.0], [5.0, 0.0]], np.float32), torch.device("cpu")
    expected = np.array([[8, 9, 10], [5 + 23 / 3, 23 / 3, 5 + 23 / 3]])  # A = (5, 0, 5), V = 11
    assert action_values(network, device, obs) == pytest.approx(expected, abs=1e-5)
    assert greedy_actions(network, device, obs).tolist() == [2, 0]


def test_gradients_by_hand(network: QNetwork) -> None:
    """Of Q(s, a_0): 1 for V, 1 - 1/3 for its own advantage and -1/3 for the others, times the features (1, 2)."""
    network(torch.tensor([[1.0, 2.0]]))[0, 0].backward()
    assert network.value.bias.grad.tolist() == [1.0]
    assert network.value.weight.grad.tolist() == [[1.0, 2.0]]
    assert network.head.bias.grad.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert network.head.weight.grad.flatten().tolist() == pytest.approx([2 / 3, 4 / 3, -1 / 3, -2 / 3, -1 / 3, -2 / 3])
    # The body's: V's (2, 3), and of A_0 - mean A: (1, 0) - (2, 2) / 3.
    assert network.body[0].bias.grad.tolist() == pytest.approx([2 + 1 / 3, 3 - 2 / 3])
