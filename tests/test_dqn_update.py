"""What a gradient step of Double DQN does, and what moves the target network."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from minirl.dqn import DQNConfig, Learner, double_dqn_target, dqn_loss
from minirl.envs.make import make_vector_env
from minirl.replay import Batch
from tests.devices import DEVICES
from tests.weights import parameters

CPU = torch.device("cpu")


def random_batch(size: int = 16, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(
        rng.normal(size=(size, 4)).astype(np.float32),
        rng.integers(2, size=size),
        rng.normal(size=size).astype(np.float32),
        rng.normal(size=(size, 4)).astype(np.float32),
        rng.random(size) < 0.4,
    )


def cartpole_learner(device: str = "cpu", **settings: Any) -> Learner:
    torch.manual_seed(0)
    with make_vector_env("CartPole-v1", 1) as envs:
        return Learner(DQNConfig(**{"compile": False, **settings}), envs, torch.device(device))


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
    expected = [loss.item(), q_values[range(16), actions].mean().item(), gradient.norm().item()]
    assert logged.tolist() == pytest.approx(expected)
    assert not logged.requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("max_grad_norm", "huber"), [(None, False), (0.25, True)])
def test_compiled_updates_are_the_eager_ones_to_rounding(max_grad_norm: float | None, huber: bool, device: str) -> None:
    eager, compiled = (
        cartpole_learner(device, max_grad_norm=max_grad_norm, huber=huber, compile=choice) for choice in (False, True)
    )
    for i in range(6):
        if i == 3:  # Adam's state is then another one
            for learner in (eager, compiled):
                learner.load(copy.deepcopy(learner.state()))
        batch = random_batch(seed=i)
        logged = [learner.update(batch, 0.01 / (i + 1)) for learner in (eager, compiled)]
        torch.testing.assert_close(logged[0], logged[1])
        for learner in (eager, compiled):
            learner.update_target()
    assert compiled.adam_step.step.enabled, "it fell back"
    torch.testing.assert_close(parameters(eager.online), parameters(compiled.online))
    for old, new in zip(
        eager.state()["optimizer"]["state"].values(), compiled.state()["optimizer"]["state"].values(), strict=True
    ):
        torch.testing.assert_close(old, new)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_an_update_returns_stays_what_it_was(compiled: bool) -> None:
    """`train` keeps the numbers of many updates and takes their mean: each must have memory of its own."""
    learner = cartpole_learner(compile=compiled)
    kept = [learner.update(random_batch(seed=i), 0.01) for i in range(6)]
    other = cartpole_learner(compile=compiled)
    at_once = [other.update(random_batch(seed=i), 0.01).tolist() for i in range(6)]
    assert [numbers.tolist() for numbers in kept] == at_once
    assert len({numbers[0] for numbers in at_once}) == 6


@pytest.mark.parametrize("at", ["once", "the first call"])
def test_a_compilation_that_fails_is_one_warning_and_then_eager(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no C++ compiler here\nand a long trace")

    monkeypatch.setattr(torch, "compile", fail if at == "once" else lambda function, **options: fail)
    learner, eager = cartpole_learner(compile=True), cartpole_learner(compile=False)
    with pytest.warns(UserWarning, match="compilation failed, going on without: no C.. compiler here$"):
        learner.update(random_batch(), 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.update(random_batch(), 0.01)
    for _ in range(2):
        eager.update(random_batch(), 0.01)
    assert torch.equal(parameters(learner.online), parameters(eager.online))


def test_every_network_of_a_process_is_compiled() -> None:
    """Each has a function of its own: PyTorch would take the first one's for all, or give up after a few of them."""
    with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=1):
        warnings.simplefilter("error", UserWarning)
        for gamma in (0.9, 0.1):
            eager, compiled = (cartpole_learner(gamma=gamma, compile=choice) for choice in (False, True))
            torch.testing.assert_close(*(learner.update(random_batch(), 0.01) for learner in (eager, compiled)))
            assert compiled.adam_step.step.enabled


def test_only_long_runs_are_compiled() -> None:
    assert DQNConfig(total_timesteps=100_000, train_frequency=2).compiles
    assert not DQNConfig(total_timesteps=100_000, train_frequency=4).compiles
    assert DQNConfig(total_timesteps=2_000, compile=True).compiles
    assert not DQNConfig(compile=False).compiles


def test_gradients_do_not_add_up_over_updates() -> None:
    learner = cartpole_learner(max_grad_norm=None)
    learner.update(random_batch(), 0.01)
    first = [parameter.grad.clone() for parameter in learner.online.parameters() if parameter.grad is not None]
    assert len(first) == 6
    learner.load({**cartpole_learner().state(), "optimizer": learner.adam_step.state_dict()})
    learner.update(random_batch(), 0.01)
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
    learner.update_target()
    torch.testing.assert_close(parameters(learner.target), 0.75 * before + 0.25 * online)
    assert torch.equal(parameters(learner.online), online)


def test_tau_1_copies() -> None:
    learner = cartpole_learner(tau=1.0)
    learner.update(random_batch(), 0.01)
    learner.update_target()
    assert torch.equal(parameters(learner.target), parameters(learner.online))


def test_the_rounded_copies_follow_both_networks() -> None:
    torch.manual_seed(0)
    config = DQNConfig(env_id="PongNoFrameskip-v4", precision="bfloat16", tau=0.5, compile=False)
    with make_vector_env(config.env_id, 1) as envs:
        learner, other = Learner(config, envs, CPU), Learner(config, envs, CPU)
    images = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)

    def require_rounded() -> None:
        for rounded in (learner.rounded_online, learner.rounded_target):
            assert torch.equal(rounded.network(images), rounded.original(images))

    with torch.no_grad():
        before = learner.rounded_target.network(images)
        learner.load(other.state())
        require_rounded()
        for parameter in learner.online.parameters():
            parameter.mul_(1.5)
        learner.rounded_online.refresh()
        learner.update_target()
        require_rounded()
        assert not torch.equal(learner.rounded_target.network(images), before)
