"""Small layers in NumPy: the same numbers as PyTorch's, and PyTorch itself for anything else."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from minirl import dqn
from minirl.dqn import QNetwork, action_values, greedy_actions
from minirl.fast.small import FEW, InTraining, SmallSequential
from minirl.networks import Categorical, mlp, observation_tensor
from minirl.ppo import ActorCritic, act

VECTOR = gym.spaces.Box(-1, 1, (4,), np.float64)
CPU = torch.device("cpu")


def by_numpy(network: nn.Module, inputs: Tensor) -> bool:
    """Whether NumPy computes it."""
    assert isinstance(network, SmallSequential)
    layers, rows = network.in_numpy()
    return layers is not None and len(inputs) <= rows


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_layers_in_numpy_are_the_layers_and_follow_their_weights(activation: type[nn.Module]) -> None:
    body: Any = mlp((4, 8, 8), activation)
    inputs = torch.randn(6, 4)
    assert by_numpy(body, inputs)
    for change in ("none", "in place", "another parameter", "another memory", "another layer"):
        with torch.no_grad():
            if change == "in place":
                body[0].weight.add_(0.3)
            elif change == "another memory":
                body[0].weight.data = torch.randn(8, 4)
            if change == "another parameter":
                body[2].bias = nn.Parameter(torch.randn(8))
            if change == "another layer":
                body[2] = nn.Linear(8, 8)
            values = body(inputs)
        expected = nn.Sequential(*body)(inputs)
        assert expected.requires_grad
        torch.testing.assert_close(values, expected.detach(), rtol=1e-4, atol=1e-6)
        assert by_numpy(body, inputs), change


class Doubling(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * super().forward(inputs)


def hooked() -> nn.Module:
    layer = nn.Linear(4, 8)
    layer.register_forward_hook(lambda module, inputs, output: 3 * output)
    return layer


@pytest.mark.parametrize(
    "layers",
    [
        lambda: (nn.Linear(4, 8), nn.GELU()),
        lambda: (Doubling(4, 8), nn.ReLU()),
        lambda: (nn.Linear(4, 8), nn.Sequential(nn.LayerNorm(8), nn.ReLU())),
        lambda: (nn.Linear(4, 8), nn.Dropout(0.5)),
        lambda: (hooked(), nn.ReLU()),
        lambda: (nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU()),
    ],
)
def test_any_other_layers_are_pytorchs(layers: Callable[[], tuple[nn.Module, ...]]) -> None:
    torch.manual_seed(0)
    body = SmallSequential(*layers()).eval()
    inputs = torch.randn(5, 4)
    assert not by_numpy(body, inputs)
    with torch.no_grad():
        assert torch.equal(body(inputs), nn.Sequential(*body)(inputs))


@pytest.mark.parametrize("what", ["hook", "pre-hook", "own forward", "own class", "a hook of all modules"])
def test_a_layer_that_is_changed_later_is_seen(what: str) -> None:
    torch.manual_seed(0)
    body = mlp((4, 8, 3), nn.Tanh)
    layer, inputs = body[2], torch.randn(5, 4)
    assert by_numpy(body, inputs)
    assert isinstance(layer, nn.Linear)
    if what == "hook":
        undo: Any = layer.register_forward_hook(lambda *arguments: arguments[-1] + 1).remove
    elif what == "pre-hook":
        undo = layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)).remove
    elif what == "own forward":
        vars(layer)["forward"] = lambda inputs: nn.Linear.forward(layer, inputs) + 1
        undo = functools.partial(vars(layer).pop, "forward")
    elif what == "own class":
        layer.__class__ = Doubling
        undo = functools.partial(setattr, layer, "__class__", nn.Linear)
    else:
        undo = nn.modules.module.register_module_forward_hook(lambda *arguments: arguments[-1] + 1).remove
    try:
        with torch.no_grad():
            values = body(inputs)
        torch.testing.assert_close(values, body(inputs).detach())
        assert not by_numpy(body, inputs)
    finally:
        undo()
    assert by_numpy(body, inputs)


def test_what_pytorch_transforms_or_counts_is_pytorchs() -> None:
    """An ensemble as `torch.func` computes it, a directional derivative, and a count of multiplications."""
    torch.manual_seed(0)
    bodies: list[nn.Module] = [mlp((4, 8, 3), nn.ReLU) for _ in range(3)]
    inputs, ensemble = torch.randn(5, 4), copy.deepcopy(bodies[0])
    parameters, _ = torch.func.stack_module_state(bodies)
    with torch.no_grad():
        assert all(by_numpy(body, inputs) for body in (ensemble, *bodies))
        expected = torch.stack([body(inputs) for body in bodies])
        values = torch.func.vmap(lambda some: torch.func.functional_call(ensemble, some, (inputs,)))(parameters)
        torch.testing.assert_close(values, expected)
        slope = torch.func.jvp(bodies[0], (inputs,), (torch.ones(5, 4),))[1]
        with FlopCounterMode(display=False) as counter:
            bodies[0](inputs)
    difference = (bodies[0](inputs + 1e-3) - bodies[0](inputs - 1e-3)).detach() / 2e-3
    torch.testing.assert_close(slope, difference, rtol=0.05, atol=0.01)
    assert counter.get_total_flops() == 2 * 5 * (4 * 8 + 8 * 3)


def test_large_batches_other_dtypes_and_gradients_are_pytorchs() -> None:
    body = mlp((4, 8), nn.ReLU)
    assert not by_numpy(body, torch.randn(FEW // 40 + 1, 4))
    assert body(torch.randn(2, 4)).requires_grad
    with torch.no_grad():
        assert body.double()(torch.randn(2, 4).double()).dtype == torch.float64
        assert body.float()(torch.randn(3, 2, 4)).shape == (3, 2, 8)
        with torch.autocast("cpu", torch.bfloat16):
            assert body(torch.randn(2, 4)).dtype == torch.bfloat16


def test_what_is_known_is_neither_copied_nor_saved() -> None:
    body = mlp((4, 8), nn.ReLU)
    inputs = torch.randn(2, 4)
    assert by_numpy(body, inputs)
    twin: Any = copy.deepcopy(body)
    with torch.no_grad():
        twin[0].weight.mul_(2)
        assert not torch.equal(twin(inputs), body(inputs))
    assert set(body.state_dict()) == {"0.weight", "0.bias"}


class Colder(ActorCritic):
    def forward(self, obs: Tensor) -> tuple[Categorical, Tensor]:
        distribution, values = super().forward(obs.clamp(-0.5, 0.5))
        assert isinstance(distribution, Categorical)
        return Categorical(logits=distribution.logits * 2), values + 1


def test_who_changes_forward_acts_with_the_changed_network() -> None:
    torch.manual_seed(0)
    agent = Colder(VECTOR, gym.spaces.Discrete(3))
    with torch.no_grad():
        agent.actor.weight.mul_(100)
    obs = torch.randn(50, 4)
    with torch.no_grad():
        actions, log_probs, values = act(agent, torch.float32, obs)
    distribution, expected_values = agent(obs)
    torch.testing.assert_close(log_probs, distribution.log_prob(actions).detach())
    torch.testing.assert_close(values, expected_values.detach())


def test_a_head_that_starts_at_zero_is_seen_when_it_is_set() -> None:
    network = QNetwork(VECTOR, 2, (8,))
    with torch.no_grad():
        for parameter in network.head.parameters():
            parameter.zero_()
        obs = np.zeros((1, 4), np.float32)
        assert action_values(network, CPU, obs).tolist() == [[0, 0]]
        network.head.bias.copy_(torch.tensor([0.0, 5.0]))
        assert action_values(network, CPU, obs).tolist() == [[0, 5]]


def test_what_is_done_to_observations_before_the_network_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    network, obs = QNetwork(VECTOR, 2, (8,)), np.array([[0.1, -0.2, 0.3, 0.4]], np.float32)
    expected = action_values(network, CPU, 2 * obs)
    monkeypatch.setattr(dqn, "observation_tensor", lambda obs, device: 2 * observation_tensor(obs, device))
    np.testing.assert_allclose(action_values(network, CPU, obs), expected, rtol=1e-6)


def test_a_greedy_policy_follows_the_weights_and_takes_the_first_of_equals() -> None:
    network = QNetwork(VECTOR, 3, (8,))
    policy = functools.partial(greedy_actions, network, CPU)
    with torch.no_grad():
        network.head.weight.zero_()
        for values, best in (([0.0, 2.0, 1.0], 1), ([3.0, 2.0, 3.0], 0)):
            network.head.bias.copy_(torch.tensor(values))
            assert policy(np.zeros((5, 4), np.float32)).tolist() == [best] * 5


class Doubled(QNetwork):
    def forward(self, obs: Tensor) -> Tensor:
        values: Tensor = 2 * super().forward(obs)
        return values


def test_a_q_network_acts_in_numpy_and_another_one_as_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    obs = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    for kind in (QNetwork, Doubled):
        network = kind(VECTOR, 3, (8, 8))
        with torch.no_grad():
            network.head.weight.mul_(100)
            network.head.bias.add_(1)
        expected = network(torch.from_numpy(obs)).detach().numpy()
        q_values = functools.partial(action_values, network, CPU)
        np.testing.assert_allclose(q_values(obs), expected, rtol=1e-4, atol=1e-5)
        if kind is QNetwork:
            with monkeypatch.context() as patch:
                patch.setattr(nn.Linear, "forward", None)  # nobody calls PyTorch
                np.testing.assert_allclose(q_values(obs), expected, rtol=1e-4, atol=1e-5)
        network.register_forward_hook(lambda module, inputs, output: output + 7)
        np.testing.assert_allclose(q_values(obs), expected + 7, rtol=1e-4, atol=1e-5)


class Frozen(nn.BatchNorm1d):
    """Stays in evaluation mode, as users write it."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)


@pytest.mark.parametrize("own", [None, "class", "instance"])
def test_in_training_is_train_and_eval(own: str | None) -> None:
    network = nn.Sequential(nn.Linear(2, 2), Frozen(2) if own == "class" else nn.BatchNorm1d(2), nn.Dropout()).eval()
    if own == "instance":
        network[1].train = lambda mode=True: network[1]  # type: ignore[method-assign]
    with InTraining(network):
        assert [module.training for module in network.modules()] == [True, True, not own, True]
    assert not any(module.training for module in network.modules())


def test_in_training_sees_a_layer_that_comes_later() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    in_training, late = InTraining(network), nn.Dropout().eval()
    network[1] = nn.Sequential(late).eval()
    with in_training:
        assert late.training
    assert not late.training
