"""What an update of PPO does with a rollout."""

import dataclasses
import functools
import math
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from minirl.envs.make import make_vector_env
from minirl.fast.compiled import compiled, pays_off
from minirl.ppo import (
    ActorCritic,
    PPOConfig,
    act,
    gradient_step,
    normalized,
    ppo_loss,
    train,
    update_policy,
)
from minirl.rollout import Rollout
from minirl.runs.losses import explained_variance
from tests.weights import assert_close_elsewhere_and_in_bfloat16, parameters


def made_up_samples(config: PPOConfig, device: str = "cpu") -> tuple[ActorCritic, dict[str, Tensor]]:
    """A network and samples with random numbers; each observation's first number is its index."""
    torch.manual_seed(0)
    with make_vector_env("CartPole-v1", config.num_envs) as envs:
        agent = ActorCritic(envs.observation_space, envs.action_space)
    rollout = Rollout(config.num_steps, config.num_envs, torch.device("cpu"))
    for t in range(config.num_steps):
        obs = torch.randn(config.num_envs, 4)
        obs[:, 0] = t * config.num_envs + torch.arange(config.num_envs)
        actions = torch.randint(2, (config.num_envs,))
        with torch.no_grad():
            distribution, values = agent(obs)
        log_probs = distribution.log_prob(actions)
        rollout.put(t, slice(None), observations=obs, actions=actions, log_probs=log_probs, values=values)
    advantages, returns = torch.randn(2, config.num_steps, config.num_envs)
    samples = rollout.samples(advantages=advantages, returns=returns)
    return agent.to(device), {name: column.to(device) for name, column in samples.items()}


def adam(agent: ActorCritic, config: PPOConfig, *, enabled: bool = False, learning_rate: float = 1e-3) -> Any:
    optimizer = torch.optim.Adam(agent.parameters(), lr=learning_rate, eps=1e-5)
    return compiled(gradient_step, agent, optimizer, config, torch.float32, enabled=enabled)


def descent(agent: ActorCritic, config: PPOConfig, learning_rate: float = 0.1) -> Any:
    """Steps of plain gradient descent, which unlike Adam's reveal the size of a gradient."""
    optimizer = torch.optim.SGD(agent.parameters(), lr=learning_rate)
    return functools.partial(gradient_step, agent, optimizer, config, torch.float32)


def test_each_epoch_goes_over_every_sample_once_in_a_new_order_across_environments() -> None:
    config = PPOConfig(env_id="CartPole-v1", num_envs=4, num_steps=8, minibatch_size=8, update_epochs=3)
    agent, samples = made_up_samples(config)
    seen: list[int] = []
    agent.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0][:, 0].int().tolist()))
    update_policy(adam(agent, config), samples, config, 0.1)
    epochs = [seen[:32], seen[32:64], seen[64:]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(32))
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({index % 4 for index in epochs[0][:8]}) > 1, "a minibatch mixes environments"
    assert len({index // 8 for index in epochs[0][:8]}) > 1, "and times"


def test_logged_losses_are_means_over_all_minibatches() -> None:
    config = PPOConfig(env_id="CartPole-v1", num_envs=4, num_steps=8, minibatch_size=8, update_epochs=2, norm_adv=False)
    agent, samples = made_up_samples(config)
    losses = update_policy(adam(agent, config, learning_rate=0.0), samples, config, 0.1)
    # A network that stands still has the same loss in each epoch, and equal minibatches average to the whole.
    assert losses["losses/policy_loss"] == pytest.approx(-samples["advantages"].mean().item(), abs=1e-6)
    assert losses["losses/value_loss"] == pytest.approx(
        (samples["values"] - samples["returns"]).square().mean().item(), rel=1e-5
    )
    assert losses["losses/approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert losses["losses/clipfrac"] == 0.0


def test_advantages_are_normalised_in_each_minibatch() -> None:
    config = PPOConfig(env_id="CartPole-v1", num_envs=4, num_steps=8, minibatch_size=32, update_epochs=1)
    agent, samples = made_up_samples(config)
    before, advantages = parameters(agent), samples["advantages"]

    def updated(advantages: Tensor, config: PPOConfig) -> Tensor:
        twin, samples = made_up_samples(config)
        torch.manual_seed(1)
        update_policy(descent(twin, config), {**samples, "advantages": advantages}, config, 0.1)
        return parameters(twin)

    assert not torch.equal(updated(advantages, config), before)
    torch.testing.assert_close(updated(advantages, config), updated(100 * advantages + 7, config), rtol=1e-4, atol=1e-6)
    raw = dataclasses.replace(config, norm_adv=False)
    assert not torch.allclose(updated(advantages, raw), updated(100 * advantages + 7, raw), atol=1e-3)


@pytest.mark.parametrize("max_grad_norm", [0.01, 0.5])
def test_the_norm_of_the_gradient_is_clipped(max_grad_norm: float) -> None:
    config = PPOConfig(
        env_id="CartPole-v1", num_envs=4, num_steps=8, minibatch_size=32, update_epochs=1, max_grad_norm=max_grad_norm
    )
    agent, samples = made_up_samples(config)
    losses = update_policy(adam(agent, config), {**samples, "returns": 100 * samples["returns"]}, config, 0.1)
    gradients = [parameter.grad for parameter in agent.parameters() if parameter.grad is not None]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert norm.item() == pytest.approx(max_grad_norm, rel=1e-3)
    assert losses["losses/grad_norm"] > 1.0, "logged as it was before"


@pytest.mark.parametrize(("target_kl", "epochs"), [(None, 5), (1e-9, 1), (1e9, 5)])
def test_target_kl_ends_the_update(target_kl: float | None, epochs: int) -> None:
    config = PPOConfig(
        env_id="CartPole-v1", num_envs=4, num_steps=8, minibatch_size=8, update_epochs=5, target_kl=target_kl
    )
    agent, samples = made_up_samples(config)
    calls: list[int] = []
    agent.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    update_policy(adam(agent, config, learning_rate=0.01), samples, config, 0.1)
    assert len(calls) == epochs * 4


@pytest.mark.parametrize(("value_clip_coef", "moves"), [(None, True), (20.0, True), (0.2, False)])
def test_value_clipping_holds_values_that_have_moved_far_enough(value_clip_coef: float | None, moves: bool) -> None:
    config = PPOConfig(
        env_id="CartPole-v1",
        num_envs=4,
        num_steps=8,
        minibatch_size=32,
        update_epochs=1,
        value_clip_coef=value_clip_coef,
    )
    agent, samples = made_up_samples(config)
    samples["returns"] = samples["values"] + 100
    samples["values"] = samples["values"] - 10  # as if the values had risen by 10 since, towards the returns
    before = agent.critic.weight.detach().clone()
    update_policy(descent(agent, config), samples, config, 0.1)
    assert torch.equal(agent.critic.weight, before) != moves


def test_an_update_is_gradient_descent_on_the_loss_with_the_configs_weights() -> None:
    """Two epochs of one minibatch, against two steps of plain descent on `ppo_loss` written out here."""
    config = PPOConfig(
        env_id="CartPole-v1",
        num_envs=4,
        num_steps=8,
        minibatch_size=32,
        update_epochs=2,
        clip_coef=0.9,  # not the one to use: it is annealed
        vf_coef=0.3,
        ent_coef=0.2,
        value_clip_coef=0.4,
        norm_adv=False,
        max_grad_norm=1e9,
    )
    agent, samples = made_up_samples(config)
    samples["log_probs"] -= 0.05  # ratios around 1.05: with a clip range of 0.03 they are outside
    losses = update_policy(descent(agent, config), samples, config, clip_coef=0.03)

    twin, _ = made_up_samples(config)
    logged = []
    for _ in range(2):
        distribution, values = twin(samples["observations"])
        loss, stats = ppo_loss(
            distribution.log_prob(samples["actions"]),
            samples["log_probs"],
            samples["advantages"],
            values,
            samples["returns"],
            distribution.entropy(),
            clip_coef=0.03,
            vf_coef=0.3,
            ent_coef=0.2,
            old_values=samples["values"],
            value_clip_coef=0.4,
        )
        logged.append(stats)
        gradients = torch.autograd.grad(loss, list(twin.parameters()), allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(gradient, alpha=0.1)
    torch.testing.assert_close(parameters(agent), parameters(twin), rtol=1e-5, atol=1e-6)
    for name in logged[0]:
        expected = (logged[0][name] + logged[1][name]).item() / 2
        assert losses[f"losses/{name}"] == pytest.approx(expected, rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("norm_adv", [True, False])
def test_compiled_updates_are_the_eager_ones_to_rounding(norm_adv: bool, device: str) -> None:
    config = PPOConfig(
        env_id="CartPole-v1",
        num_envs=4,
        num_steps=8,
        minibatch_size=16,
        update_epochs=2,
        norm_adv=norm_adv,
        value_clip_coef=0.3,
        max_grad_norm=0.05,
    )
    logged, results = [], []
    for enabled in (False, True):
        agent, samples = made_up_samples(config, device)
        step = adam(agent, config, enabled=enabled, learning_rate=0.01)
        torch.manual_seed(1)
        for clip_coef in (0.2, 0.1):  # annealed: no reason to compile again
            logged.append(update_policy(step, samples, config, clip_coef))
        assert not enabled or step.enabled, "it fell back"
        results.append(parameters(agent))
    torch.testing.assert_close(results[0], results[1])
    assert logged[2:] == [pytest.approx(losses, rel=1e-4, abs=1e-6) for losses in logged[:2]]


@pytest.mark.slow
def test_a_compiled_policy_is_the_eager_one_to_rounding_and_follows_the_weights(device: str) -> None:
    torch.manual_seed(0)
    agent = ActorCritic(gym.spaces.Box(0, 255, (4, 40, 40), np.uint8), gym.spaces.Discrete(6)).to(device)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)  # or it fell back
        policies = [compiled(act, agent, torch.float32, enabled=enabled) for enabled in (True, False)]
        for batch_size in (2, 3, 3):  # halves of five environments
            obs = torch.randint(0, 255, (batch_size, 4, 40, 40), dtype=torch.uint8, device=device)
            results = []
            for policy in policies:
                torch.manual_seed(1)
                results.append(policy(obs))
            torch.testing.assert_close(results[0], results[1])
            assert results[0][0].shape == results[0][2].shape == (batch_size,)
            for parameter in agent.parameters():
                parameter.mul_(1.3)


def test_a_training_without_a_compiler_warns_once_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = []

    def fail(function: Any, **options: Any) -> Any:
        asked_for.append(function)
        raise RuntimeError("no C++ compiler here")

    monkeypatch.setattr(torch, "compile", fail)
    config = PPOConfig(num_envs=1, num_steps=4, minibatch_size=4, update_epochs=1, total_timesteps=8, compile=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        train(config, run_dir=tmp_path / "run", device="cpu")
    assert [str(warning.message) for warning in caught if "compil" in str(warning.message)] == [
        "not compiled: no C++ compiler here"
    ]
    assert len(asked_for) == 2, "acting, and the update"


@pytest.mark.parametrize("enabled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_in_bfloat16_the_loss_of_images_stays_close_and_float32(enabled: bool, device: str) -> None:
    config = PPOConfig(num_envs=2, num_steps=4, minibatch_size=8, update_epochs=1, norm_adv=False)
    space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    logged, gradients = [], []
    for precision, here in ((torch.float32, "cpu"), (torch.float32, device), (torch.bfloat16, device)):
        torch.manual_seed(0)
        agent = ActorCritic(space, gym.spaces.Discrete(6)).to(here)
        samples = {
            "observations": torch.randint(0, 255, (8, 4, 84, 84), dtype=torch.uint8),
            "actions": torch.arange(8) % 6,
            "log_probs": torch.full((8,), -1.8),
            "advantages": torch.randn(8),
            "returns": torch.randn(8),
            "values": torch.zeros(8),
        }
        columns = {name: column.to(here) for name, column in samples.items()}
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
        compile_it = enabled and precision == torch.bfloat16
        step: Any = compiled(gradient_step, agent, optimizer, config, precision, enabled=compile_it)
        numbers = step(columns, torch.arange(8, device=here), torch.tensor(0.1, device=here))
        logged.append(torch.stack([*numbers.values()]).cpu())
        gradients.append(torch.cat([p.grad.flatten() for p in agent.parameters() if p.grad is not None]).cpu())
        assert {parameter.dtype for parameter in agent.parameters()} == {torch.float32}
        assert not compile_it or step.enabled
    assert_close_elsewhere_and_in_bfloat16(logged, gradients, rtol=0.02)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 100.1, -20.7])
def test_equal_advantages_are_normalised_to_nothing(value: float) -> None:
    assert not normalized(torch.full((256,), value)).any()
    ones = normalized(torch.tensor([1.0, 2.0, 3.0]))
    assert ones.tolist() == pytest.approx([-1.0, 0.0, 1.0])


def test_only_long_runs_are_compiled() -> None:
    steps = 5_000 // (4 * 4) * 1024
    assert not pays_off(None, PPOConfig(total_timesteps=steps).num_gradient_steps, images=True)
    assert pays_off(None, PPOConfig(total_timesteps=steps + 1).num_gradient_steps, images=True)
    assert not pays_off(None, PPOConfig(total_timesteps=1_000_000).num_gradient_steps)
    assert pays_off(None, PPOConfig().num_gradient_steps)
    assert not pays_off(False, 1_000_000, images=True)
    assert pays_off(True, 1)


@pytest.mark.parametrize(
    ("values", "expected"), [([1.0, 2.0, 6.0], 1.0), ([3.0, 3.0, 3.0], 0.0), ([-1.0, -2.0, -6.0], -3.0)]
)
def test_explained_variance(values: list[float], expected: float) -> None:
    returns = torch.tensor([1.0, 2.0, 6.0])
    assert explained_variance(torch.tensor(values), returns) == pytest.approx(expected)
    assert math.isnan(explained_variance(torch.tensor(values), torch.ones(3)))
