"""What a gradient step of Double DQN does, and what moves the target network."""

import copy
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from minirl.dqn import DQNConfig, QNetwork, TargetUpdate, double_dqn_target, dqn_loss, gradient_step, make_q_network
from minirl.envs.make import make_vector_env
from minirl.fast.compiled import Compiled, compiled, pays_off
from minirl.replay import Batch
from tests.weights import assert_close_elsewhere_and_in_bfloat16, parameters

CPU = torch.device("cpu")


def random_batch(size: int = 16, seed: int = 0) -> Batch[Any]:
    rng = np.random.default_rng(seed)
    return Batch(
        rng.normal(size=(size, 4)).astype(np.float32),
        rng.integers(2, size=size),
        rng.normal(size=size).astype(np.float32),
        rng.normal(size=(size, 4)).astype(np.float32),
        rng.random(size) < 0.4,
    )


class Learner:
    """What `train` has: two networks, the optimiser, the step, and what moves the target network."""

    def __init__(self, device: str, config: DQNConfig) -> None:
        torch.manual_seed(0)
        with make_vector_env("CartPole-v1", 1) as envs:
            spaces = envs.observation_space, envs.action_space
            self.online, self.target = (make_q_network(config, *spaces).to(device) for _ in range(2))
        self.target.load_state_dict(self.online.state_dict())
        self.device = device
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=config.learning_rate, fused=True)
        bound = (self.online, self.target, self.optimizer, config, torch.float32)
        self.step = compiled(gradient_step, *bound, enabled=pays_off(config.compile, config.num_gradient_steps))
        self.target_step = TargetUpdate(self.target, self.online, config.tau)

    def update(self, batch: Batch[Any], learning_rate: float) -> dict[str, torch.Tensor]:
        self.optimizer.param_groups[0]["lr"] = learning_rate
        logged: dict[str, torch.Tensor] = self.step(batch.to(torch.device(self.device)))
        return logged


def cartpole_learner(device: str = "cpu", **settings: Any) -> Learner:
    return Learner(device, DQNConfig(**{"compile": False, **settings}))


@pytest.mark.parametrize("huber", [False, True])
def test_an_update_is_one_step_of_adam_on_the_loss(huber: bool) -> None:
    learner = cartpole_learner(huber=huber, gamma=0.9, learning_rate=0.01, max_grad_norm=None)
    other = cartpole_learner()
    with torch.no_grad():
        for parameter in other.online.parameters():
            parameter.mul_(-1.5)
    learner.target.load_state_dict(other.online.state_dict())
    reference = cartpole_learner().online
    batch = random_batch()
    obs, actions, rewards, next_obs, terminated = map(torch.from_numpy, batch)
    targets = double_dqn_target(rewards, terminated, reference(next_obs), other.online(next_obs), 0.9)
    q_values = reference(obs)
    loss = dqn_loss(q_values, actions, targets, huber=huber)
    adam = torch.optim.Adam(reference.parameters(), lr=0.01)
    loss.backward()
    adam.step()

    target_before = parameters(learner.target)
    logged = learner.update(batch, 0.01)
    torch.testing.assert_close(parameters(learner.online), parameters(reference))
    assert torch.equal(parameters(learner.target), target_before)
    gradient = torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None])
    expected = {"td_loss": loss, "q_values": q_values[range(16), actions].mean(), "grad_norm": gradient.norm()}
    torch.testing.assert_close({name: logged[name] for name in expected}, expected)
    assert not any(number.requires_grad for number in logged.values())


@pytest.mark.usefixtures("without_inductor")
def test_traced_updates_are_the_eager_ones(device: str) -> None:
    check_compiled_updates(None, False, device)


@pytest.mark.slow
@pytest.mark.parametrize(("max_grad_norm", "huber"), [(None, False), (0.25, True)])
def test_compiled_updates_are_the_eager_ones_to_rounding(max_grad_norm: float | None, huber: bool, device: str) -> None:
    check_compiled_updates(max_grad_norm, huber, device)


def check_compiled_updates(max_grad_norm: float | None, huber: bool, device: str) -> None:
    eager, fast = (
        cartpole_learner(device, max_grad_norm=max_grad_norm, huber=huber, compile=choice) for choice in (False, True)
    )
    for i in range(6):
        if i == 3:  # Adam's state is then another one
            for learner in (eager, fast):
                learner.optimizer.load_state_dict(copy.deepcopy(learner.optimizer.state_dict()))
        batch = random_batch(seed=i)
        logged = []
        for learner in (eager, fast):
            torch.manual_seed(i)  # a layer may draw noise
            logged.append(learner.update(batch, 0.01 / (i + 1)))
        torch.testing.assert_close(logged[0], logged[1])
        for learner in (eager, fast):
            learner.target_step.update()
    assert isinstance(fast.step, Compiled)
    assert fast.step.enabled, "it fell back"
    torch.testing.assert_close(parameters(eager.online), parameters(fast.online))
    for old, new in zip(eager.optimizer.state.values(), fast.optimizer.state.values(), strict=True):
        torch.testing.assert_close(old, new)


@pytest.mark.parametrize("enabled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_an_update_returns_stays_what_it_was(enabled: bool) -> None:
    """`train` keeps the numbers of many updates and takes their mean: each must have memory of its own."""
    learner = cartpole_learner(compile=enabled)
    kept = [learner.update(random_batch(seed=i), 0.01) for i in range(6)]
    other = cartpole_learner(compile=enabled)
    at_once = [copy.deepcopy(other.update(random_batch(seed=i), 0.01)) for i in range(6)]
    torch.testing.assert_close(kept, at_once, rtol=0, atol=0)
    assert len({numbers["td_loss"].item() for numbers in at_once}) == 6


@pytest.mark.slow
def test_every_network_of_a_process_is_compiled() -> None:
    """Each has a function of its own: PyTorch would take the first one's for all, or give up after a few of them."""
    with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=1):
        warnings.simplefilter("error", UserWarning)
        for gamma in (0.9, 0.1):
            eager, fast = (cartpole_learner(gamma=gamma, compile=choice) for choice in (False, True))
            torch.testing.assert_close(*(learner.update(random_batch(), 0.01) for learner in (eager, fast)))
            assert isinstance(fast.step, Compiled)
            assert fast.step.enabled


def test_only_long_runs_are_compiled() -> None:
    assert pays_off(None, DQNConfig(total_timesteps=100_000, train_frequency=2).num_gradient_steps)
    assert not pays_off(None, DQNConfig(total_timesteps=100_000, train_frequency=4).num_gradient_steps)
    assert pays_off(None, DQNConfig(total_timesteps=100_000, train_frequency=16, gradient_steps=8).num_gradient_steps)


def test_gradients_do_not_add_up_over_updates() -> None:
    learner = cartpole_learner(max_grad_norm=None)
    learner.update(random_batch(), 0.0)
    first = [parameter.grad.clone() for parameter in learner.online.parameters() if parameter.grad is not None]
    assert len(first) == 6
    learner.update(random_batch(), 0.0)
    for parameter, gradient in zip(learner.online.parameters(), first, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_norm_of_the_gradient_is_clipped() -> None:
    learner = cartpole_learner(max_grad_norm=0.25)
    learner.update(random_batch(), 0.01)
    gradient = torch.cat([p.grad.flatten() for p in learner.online.parameters() if p.grad is not None])
    assert gradient.norm().item() == pytest.approx(0.25, rel=1e-4)


def test_the_target_moves_by_tau() -> None:
    learner = cartpole_learner(tau=0.25)
    assert torch.equal(parameters(learner.target), parameters(learner.online)), "they start as the same"
    before = parameters(learner.target)
    learner.update(random_batch(), 0.01)
    online = parameters(learner.online)
    learner.target_step.update()
    torch.testing.assert_close(parameters(learner.target), 0.75 * before + 0.25 * online)
    assert torch.equal(parameters(learner.online), online)


def test_tau_1_copies() -> None:
    learner = cartpole_learner(tau=1.0)
    learner.update(random_batch(), 0.01)
    learner.target_step.update()
    assert torch.equal(parameters(learner.target), parameters(learner.online))


@pytest.mark.parametrize("tau", [0.25, 1.0])
def test_buffers_are_copied_whatever_tau_is(tau: float) -> None:
    """Running means of batch norm, say, which an own network may have."""
    online, target = (torch.nn.BatchNorm1d(2) for _ in range(2))
    online(torch.randn(8, 2) + 5)
    TargetUpdate(target, online, tau).update()
    assert online.running_mean is not None
    assert target.running_mean is not None
    assert torch.equal(target.running_mean, online.running_mean)
    assert target.num_batches_tracked == 1
    online(torch.randn(8, 2))
    assert not torch.equal(target.running_mean, online.running_mean), "a copy"


def test_a_buffer_that_a_layer_replaces_is_copied() -> None:
    online, target = (torch.nn.BatchNorm1d(2) for _ in range(2))
    step = TargetUpdate(target, online, 1.0)
    online.running_mean = torch.tensor([3.0, 4.0])
    step.update()
    assert target.running_mean is not None
    assert target.running_mean.tolist() == [3.0, 4.0]
    online.register_buffer("late", torch.ones(1))
    step.update()
    assert target.late == 1.0


def test_a_layer_that_is_replaced_is_followed_and_a_shared_one_moves_once() -> None:
    online, target = (torch.nn.ModuleList([torch.nn.Linear(1, 1, bias=False) for _ in "ab"]) for _ in range(2))
    for network in (online, target):
        network[1].register_parameter("weight", network[0].get_parameter("weight"))
    step = TargetUpdate(target, online, 0.5)
    for network, weight in ((online, 8.0), (target, 0.0)):
        torch.nn.init.constant_(network[0].get_parameter("weight"), weight)
    step.update()
    assert target[0].get_parameter("weight").item() == 4
    online[0] = torch.nn.Linear(1, 1, bias=False)
    online[1] = torch.nn.Linear(1, 1, bias=False)
    target[1] = torch.nn.Linear(1, 1, bias=False)
    for network, weights in ((online, (6.0, 10.0)), (target, (4.0, 2.0))):
        for layer, weight in zip(network, weights, strict=True):
            torch.nn.init.constant_(layer.get_parameter("weight"), weight)
    step.update()
    assert [layer.get_parameter("weight").item() for layer in target] == [5, 6]


def test_what_only_the_online_network_has_gets_no_copy_and_a_late_weight_moves() -> None:
    online, target = (torch.nn.Sequential(torch.nn.Identity(), torch.nn.BatchNorm1d(1)) for _ in range(2))
    step = TargetUpdate(target, online, 0.5)
    online.insert(0, torch.nn.Identity())
    online.insert(3, torch.nn.BatchNorm1d(1, affine=False))
    del online[0]
    for network, weight in ((online, 8.0), (target, 0.0)):
        network[0].register_parameter("late", torch.nn.Parameter(torch.tensor(weight)))
    online[1].get_buffer("running_mean").fill_(3.0)
    step.update()
    assert target[0].get_parameter("late") == 4
    assert target[1].get_buffer("running_mean") == 3
    assert len(target) == 2


def test_a_plain_convolution_learns_as_by_torchs_own_adam() -> None:
    """Images of the memory lie channels-last and its weights do not: a fused optimiser must not mix them up."""

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 49, 2)
            )

        def forward(self, obs: torch.Tensor) -> torch.Tensor:
            values: torch.Tensor = self.layers(obs)
            return values

    torch.manual_seed(0)
    obs, next_obs = torch.rand(2, 16, 3, 9, 9).unbind()
    layout = torch.channels_last
    batch = Batch(
        obs.contiguous(memory_format=layout),
        torch.randint(2, (16,)),
        torch.randn(16),
        next_obs.contiguous(memory_format=layout),
        torch.zeros(16).bool(),
    )
    online, target = Own(), Own()
    plain = copy.deepcopy(online)
    own, reference = (torch.optim.Adam(net.parameters(), lr=1e-3, fused=net is online) for net in (online, plain))
    for _ in range(30):
        bound = (online, target, own, DQNConfig(), torch.float32)
        loss = gradient_step(*bound, batch)["td_loss"]
        targets = double_dqn_target(batch.rewards, batch.terminated, plain(next_obs), target(next_obs), 0.99)
        expected = dqn_loss(plain(obs), batch.actions, targets)
        reference.zero_grad()
        expected.backward()
        reference.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_in_bfloat16_the_values_that_are_logged_and_the_weights_stay_float32(device: str) -> None:
    torch.manual_seed(0)
    space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    obs = torch.randint(256, (4, 4, 84, 84), dtype=torch.uint8)
    ends = torch.tensor([True, False, False, False])
    batch = Batch(obs, torch.tensor([0, 1, 2, 3]), torch.randn(4), obs.flip(0), ends)
    logged, gradients = [], []
    for precision, here in ((torch.float32, "cpu"), (torch.float32, device), (torch.bfloat16, device)):
        torch.manual_seed(1)
        online, target = QNetwork(space, 6).to(here), QNetwork(space, 6).to(here)
        optimizer = torch.optim.Adam(online.parameters(), lr=1e-3)
        numbers = gradient_step(online, target, optimizer, DQNConfig(), precision, batch.to(torch.device(here)))
        logged.append(torch.stack([*numbers.values()]).cpu())
        gradients.append(torch.cat([p.grad.flatten() for p in online.parameters() if p.grad is not None]).cpu())
        assert {parameter.dtype for parameter in online.parameters()} == {torch.float32}
    assert_close_elsewhere_and_in_bfloat16(logged, gradients, rtol=0.03)
