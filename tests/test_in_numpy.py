"""Acting in NumPy: the same numbers as torch's, and torch itself where NumPy does not know a layer."""

from collections.abc import Callable

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical

from minirl.dqn import QNetwork, greedy_policy, q_function
from minirl.fast.in_numpy import Policy, draw, first_to_ring, in_numpy, policy_in_numpy, sample_in_numpy
from minirl.networks import mlp
from minirl.ppo import ActorCritic, act
from tests.devices import DEVICES

VECTOR = gym.spaces.Box(-1, 1, (4,), np.float64)


def fast(agent: ActorCritic) -> Policy | None:
    return policy_in_numpy(agent, (agent.actor_body, agent.actor), (agent.critic_body, agent.critic))


class Doubling(nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(inputs)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_layers_in_numpy_are_the_layers_and_follow_their_weights(activation: type[nn.Module]) -> None:
    body, head = mlp((4, 8, 8), activation), nn.Linear(8, 3)
    function = in_numpy(body, head)
    assert function is not None
    obs = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    for _ in range(2):
        expected = head(body(torch.from_numpy(obs))).detach().numpy()
        values = function(obs)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for parameter in [*body.parameters(), *head.parameters()]:
                parameter.add_(0.3)


@pytest.mark.parametrize(
    "change",
    [
        lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU()),
        lambda: nn.Sequential(Doubling(4, 8), nn.ReLU()),
        lambda: nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU()),
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.LayerNorm(8), nn.ReLU())),
    ],
)
def test_who_changes_a_layer_acts_with_the_changed_network(change: Callable[[], nn.Sequential]) -> None:
    torch.manual_seed(0)
    assert in_numpy(change()) is None
    obs = torch.randn(5, 4)
    network = QNetwork(VECTOR, 3, (8,))
    network.body = change()
    np.testing.assert_allclose(q_function(network)(obs.numpy()), network(obs).detach().numpy(), rtol=1e-5)
    agent = ActorCritic(VECTOR, gym.spaces.Discrete(2))
    agent.critic_body, agent.critic = change(), nn.Linear(8, 1)
    assert fast(agent) is None


class Colder(ActorCritic):
    def forward(self, obs: torch.Tensor) -> tuple[Categorical, torch.Tensor]:
        distribution, values = super().forward(obs)
        return Categorical(logits=distribution.logits * 2), values


class Shifted(ActorCritic):
    def forward(self, obs: torch.Tensor) -> tuple[Categorical, torch.Tensor]:
        distribution, values = super().forward(obs)
        return distribution, values + 1


class Doubled(QNetwork):
    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(obs)


@pytest.mark.parametrize("kind", [ActorCritic, Colder, Shifted])
def test_who_changes_forward_acts_with_the_changed_network(kind: type[ActorCritic]) -> None:
    torch.manual_seed(0)
    agent = kind(VECTOR, gym.spaces.Discrete(3))
    with torch.no_grad():
        agent.actor.weight.mul_(100)
    obs = torch.randn(50, 4)
    assert (fast(agent) is not None) == (kind is ActorCritic)
    actions, log_probs, values = act(agent, obs)
    distribution, expected_values = agent(obs)
    torch.testing.assert_close(log_probs, distribution.log_prob(actions))
    torch.testing.assert_close(values, expected_values)

    network = Doubled(VECTOR, 3, (8,))
    with torch.no_grad():
        network.head.weight.fill_(0.3)
    np.testing.assert_allclose(q_function(network)(obs.numpy()), network(obs).detach().numpy(), rtol=1e-5)


def test_a_greedy_policy_follows_the_weights_and_asks_the_network_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To make the function in NumPy, and compare it with the network, takes ten times as long as to call it."""
    network = QNetwork(VECTOR, 3, (8,))
    policy = greedy_policy(network)
    monkeypatch.setattr(network, "forward", None)
    weight, bias = network.head.parameters()
    with torch.no_grad():
        weight.zero_()
        for values, best in (([0.0, 2.0, 1.0], 1), ([3.0, 2.0, 3.0], 0)):  # the first of equally good ones
            bias.copy_(torch.tensor(values))
            assert policy(np.zeros((5, 4), np.float32)).tolist() == [best] * 5


def test_a_policy_in_numpy_is_the_networks() -> None:
    torch.manual_seed(0)
    agent = ActorCritic(VECTOR, gym.spaces.Discrete(3))
    with torch.no_grad():
        agent.actor.weight.mul_(300)  # actions that differ in likelihood
    obs = torch.randn(4, 4).repeat(5_000, 1)
    policy = fast(agent)
    assert policy is not None
    actions, log_probs, values = policy(obs)
    distribution, expected_values = agent(obs)
    torch.testing.assert_close(log_probs, distribution.log_prob(actions).detach())
    torch.testing.assert_close(values, expected_values.detach())
    for row in range(4):
        shares = np.bincount(actions[row::4].numpy(), minlength=3) / 5_000
        np.testing.assert_allclose(shares, distribution.probs[row].detach().numpy(), atol=0.03)
    torch.manual_seed(0)
    first = policy(obs)[0]
    torch.manual_seed(0)
    assert torch.equal(first, act(agent, obs)[0]), "torch's own draws"


def test_a_draw_is_the_first_clock_to_ring_and_torchs_own_draw() -> None:
    logits = np.log(np.array([[0.2, 0.5, 0.3]], np.float32)).repeat(3, axis=0) + 5  # a constant changes nothing
    clocks = np.array([[0.1, 0.3, 0.2], [0.1, 0.2, 0.2], [9.0, 0.6, 0.3]], np.float32)
    actions, log_probs = sample_in_numpy(logits, clocks)
    assert actions.tolist() == [0, 1, 2]
    np.testing.assert_allclose(np.exp(log_probs), [0.2, 0.5, 0.3], rtol=1e-5)

    many = torch.randn(1_000, 6)
    torch.manual_seed(3)
    expected = torch.distributions.Categorical(logits=many).sample()
    torch.manual_seed(3)
    drawn, _ = sample_in_numpy(many.numpy(), torch.empty(1_000, 6).exponential_().numpy())
    assert drawn.tolist() == expected.tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_draws_on_a_gpu_are_torchs_own_without_its_checks(device: str) -> None:
    distribution = Categorical(logits=torch.tensor([2.0, 0.5, -1.0, -torch.inf]).to(device).expand(4_000, 4))
    torch.manual_seed(0)
    expected = distribution.sample()
    torch.manual_seed(0)
    assert torch.equal(first_to_ring(distribution.logits), expected)
    shares = expected.bincount(minlength=4) / 4_000
    torch.testing.assert_close(shares, distribution.probs[0], atol=0.03, rtol=0)
    torch.manual_seed(0)
    actions, log_probs = draw(distribution)
    assert torch.equal(actions, expected)
    torch.testing.assert_close(log_probs, distribution.log_prob(expected))


def test_an_impossible_action_is_never_drawn_and_large_logits_overflow_nothing() -> None:
    logits = np.array([[-np.inf, 1e30, -1e30], [0, -np.inf, -np.inf]], np.float32)
    actions, log_probs = sample_in_numpy(logits, np.ones((2, 3), np.float32))
    assert actions.tolist() == [1, 0]
    assert log_probs.tolist() == [0, 0]
