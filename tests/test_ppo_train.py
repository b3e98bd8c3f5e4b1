"""Training as a whole: what is collected, what an update does, and that it learns."""

import dataclasses
import functools
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from minirl.checkpoints import load_checkpoint
from minirl.config import ConfigError
from minirl.envs.make import make_vector_env
from minirl.envs.vector import VectorEnv
from minirl.evaluate import evaluate
from minirl.networks import RoundedCopy, set_precision, training_input
from minirl.ppo import (
    ActorCritic,
    PPOConfig,
    Rollout,
    collect_rollout,
    compute_gae,
    explained_variance,
    minibatch_loss,
    policy_of,
    ppo_loss,
    train,
    update_policy,
)
from minirl.runs import Run
from minirl.runtime import AdamStep
from tests.devices import DEVICES
from tests.fake_envs import counter
from tests.scalars import read_scalars

CPU = torch.device("cpu")
CARTPOLE = PPOConfig(
    env_id="CartPole-v1",
    total_timesteps=100_000,
    num_steps=32,
    update_epochs=10,
    learning_rate=1e-3,
    anneal_lr=True,
    gamma=0.98,
    gae_lambda=0.8,
    clip_coef=0.2,
    anneal_clip=True,
    ent_coef=0.0,
)
TINY = PPOConfig(env_id="tests.fake_envs:Counter-v0", total_timesteps=64, num_envs=2, num_steps=8, minibatch_size=8)
SMALL_PONG = PPOConfig(num_envs=4, num_steps=16, minibatch_size=32, total_timesteps=2 * 64)


def parameters(agent: ActorCritic) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in agent.parameters()])


# Collecting


@pytest.mark.parametrize(("num_workers", "in_halves"), [(1, False), (1, True), (2, True)])
def test_a_rollout_holds_what_was_seen_done_and_paid(num_workers: int, in_halves: bool) -> None:
    make = functools.partial(counter, 3)  # episodes of 3 steps
    with VectorEnv(make, 2, num_workers=num_workers, in_halves=in_halves) as envs:
        agent = ActorCritic(envs.observation_space, envs.action_space)
        rollout = Rollout(5, envs, CPU)
        with Run("ppo", TINY, None, total=64) as run:
            obs = collect_rollout(agent, policy_of(agent), envs, envs.reset(seed=0), rollout, run, 0)
            assert list(run.returns) == [6.0, 6.0]
    # (episode, step, seed, last action): the last action at t is the one that was chosen at t - 1
    assert rollout.observations[:, 0, :2].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]
    assert rollout.observations[:, 1, 2].tolist() == [1] * 5
    assert torch.equal(rollout.observations[1:, :, 3].long(), rollout.actions[:-1])
    assert obs[:, :2].tolist() == [[1, 2], [1, 2]]
    assert rollout.rewards[:, 0].tolist() == [1, 2, 3, 1, 2]
    assert rollout.terminated[:, 0].tolist() == [False, False, True, False, False]
    assert not rollout.truncated.any()
    distribution, values = agent(rollout.observations.flatten(0, 1))
    torch.testing.assert_close(rollout.values.flatten(), values.detach())
    torch.testing.assert_close(rollout.log_probs.flatten(), distribution.log_prob(rollout.actions.flatten()).detach())
    last_values = agent(torch.tensor(obs))[1].detach()
    torch.testing.assert_close(rollout.next_values[-1], last_values)
    torch.testing.assert_close(rollout.next_values[:-1], rollout.values[1:])


@pytest.mark.parametrize("in_halves", [False, True])
def test_a_cut_bootstraps_from_the_last_observation_and_not_from_the_next_episode(in_halves: bool) -> None:
    with VectorEnv(functools.partial(counter, None, 3), 2, num_workers=1, in_halves=in_halves) as envs:
        agent = ActorCritic(envs.observation_space, envs.action_space)
        rollout = Rollout(4, envs, CPU)
        with Run("ppo", TINY, None, total=64) as run:
            collect_rollout(agent, policy_of(agent), envs, envs.reset(seed=0), rollout, run, 0)
    assert rollout.truncated[:, 0].tolist() == [False, False, True, False]
    final_obs = torch.stack(
        [torch.tensor([0.0, 3.0, seed, action]) for seed, action in enumerate(rollout.actions[2].tolist())]
    )
    torch.testing.assert_close(rollout.next_values[2], agent(final_obs)[1].detach())
    assert not torch.isclose(rollout.next_values[2], rollout.values[3]).any()


def test_pixels_stay_bytes() -> None:
    with make_vector_env("PongNoFrameskip-v4", 2, num_workers=1) as envs:
        rollout = Rollout(3, envs, CPU)
    assert rollout.observations.dtype == torch.uint8
    assert rollout.observations.shape == (3, 2, 4 * 4 * 4, 21, 21)


def test_a_rollout_of_pixels_holds_what_the_network_saw_and_said() -> None:
    """Played in halves, with actions that are drawn in halves: each environment must get its own."""
    with make_vector_env("PongNoFrameskip-v4", 4, in_halves=True) as envs, Run("ppo", TINY, None, total=64) as run:
        torch.manual_seed(0)
        agent = ActorCritic(envs.observation_space, envs.action_space)
        rollout = Rollout(5, envs, CPU)
        obs = collect_rollout(agent, policy_of(agent), envs, envs.reset(seed=0), rollout, run, 0)
    with make_vector_env("PongNoFrameskip-v4", 4, num_workers=1) as envs:
        seen = envs.reset(seed=0)
        for t in range(5):
            assert torch.equal(rollout.observations[t], training_input(seen, CPU))
            distribution, values = agent(torch.from_numpy(seen))
            torch.testing.assert_close(rollout.values[t], values.detach(), rtol=1e-4, atol=1e-5)
            log_probs = distribution.log_prob(rollout.actions[t]).detach()
            torch.testing.assert_close(rollout.log_probs[t], log_probs, rtol=1e-4, atol=1e-5)
            step = envs.step(rollout.actions[t].numpy())
            assert rollout.rewards[t].tolist() == step.rewards.tolist()
            seen = step.observations
        np.testing.assert_array_equal(obs, seen)
        torch.testing.assert_close(rollout.last_values, agent(torch.from_numpy(seen))[1].detach(), rtol=1e-4, atol=1e-5)
    assert rollout.actions.unique().numel() > 2, "an agent that always does the same would hide a mix-up"


# Updating


def made_up_rollout(config: PPOConfig, device: str = "cpu") -> tuple[ActorCritic, Rollout, Tensor, Tensor]:
    """A network and a rollout with random numbers; each observation's first number is its index."""
    torch.manual_seed(0)
    with make_vector_env("CartPole-v1", config.num_envs) as envs:
        agent = ActorCritic(envs.observation_space, envs.action_space).to(device)
        rollout = Rollout(config.num_steps, envs, torch.device(device))
    rollout.observations = torch.randn_like(rollout.observations)
    rollout.observations[..., 0] = torch.arange(config.batch_size).reshape(config.num_steps, config.num_envs)
    rollout.actions = torch.randint_like(rollout.actions, 2)
    with torch.no_grad():
        distribution, values = agent(rollout.observations.flatten(0, 1))
        rollout.log_probs = distribution.log_prob(rollout.actions.flatten()).reshape(rollout.log_probs.shape)
        rollout.values = values.reshape(rollout.values.shape)
    advantages, returns = torch.randn(2, config.num_steps, config.num_envs, device=device)
    return agent, rollout, advantages, returns


def adam_step(agent: ActorCritic, config: PPOConfig, *, compiled: bool = False) -> AdamStep:
    rounded = RoundedCopy(agent)
    loss = functools.partial(minibatch_loss, rounded.network, config)
    return AdamStep(rounded, loss, eps=1e-5, max_grad_norm=config.max_grad_norm, compiled=compiled)


def plain_descent(agent: ActorCritic, config: PPOConfig) -> Any:
    """Steps of plain gradient descent, which unlike Adam's tell the size of a gradient."""

    def step(learning_rate: float, *batch: Tensor) -> Tensor:
        loss, logged = minibatch_loss(agent, config, *batch)
        gradients = torch.autograd.grad(loss, list(agent.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(agent.parameters(), gradients, strict=True):
                parameter.sub_(gradient, alpha=learning_rate)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        return torch.cat([logged.detach(), norm[None]])

    return step


def test_each_epoch_goes_over_every_sample_once_in_a_new_order_across_environments() -> None:
    config = PPOConfig(env_id="CartPole-v1", num_envs=4, num_steps=8, minibatch_size=8, update_epochs=3)
    agent, rollout, advantages, returns = made_up_rollout(config)
    seen: list[int] = []
    agent.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0][:, 0].int().tolist()))
    update_policy(adam_step(agent, config), rollout, advantages, returns, config, 1e-3, 0.1)
    epochs = [seen[:32], seen[32:64], seen[64:]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(32))
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({index % 4 for index in epochs[0][:8]}) > 1, "a minibatch mixes environments"
    assert len({index // 8 for index in epochs[0][:8]}) > 1, "and times"


def test_logged_losses_are_means_over_all_minibatches() -> None:
    config = PPOConfig(env_id="CartPole-v1", num_envs=4, num_steps=8, minibatch_size=8, update_epochs=2, norm_adv=False)
    agent, rollout, advantages, returns = made_up_rollout(config)
    losses = update_policy(adam_step(agent, config), rollout, advantages, returns, config, 0.0, 0.1)
    # A network that stands still has the same loss in each epoch, and equal minibatches average to the whole.
    assert losses["losses/policy_loss"] == pytest.approx(-advantages.mean().item(), abs=1e-6)
    assert losses["losses/value_loss"] == pytest.approx((rollout.values - returns).square().mean().item(), rel=1e-5)
    assert losses["losses/approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert losses["losses/clipfrac"] == 0.0


def test_advantages_are_normalised_in_each_minibatch() -> None:
    config = PPOConfig(env_id="CartPole-v1", num_envs=4, num_steps=8, minibatch_size=32, update_epochs=1)
    agent, rollout, advantages, returns = made_up_rollout(config)
    before = parameters(agent)

    def updated(advantages: Tensor, config: PPOConfig) -> Tensor:
        twin, *_ = made_up_rollout(config)
        torch.manual_seed(1)
        update_policy(plain_descent(twin, config), rollout, advantages, returns, config, 0.1, 0.1)
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
    agent, rollout, advantages, returns = made_up_rollout(config)
    losses = update_policy(adam_step(agent, config), rollout, advantages, 100 * returns, config, 1e-3, 0.1)
    gradients = [parameter.grad for parameter in agent.parameters() if parameter.grad is not None]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert norm.item() == pytest.approx(max_grad_norm, rel=1e-3)
    assert losses["losses/grad_norm"] > 1.0, "logged as it was before"


@pytest.mark.parametrize(("target_kl", "epochs"), [(None, 5), (1e-9, 1), (1e9, 5)])
def test_target_kl_ends_the_update(target_kl: float | None, epochs: int) -> None:
    config = PPOConfig(
        env_id="CartPole-v1", num_envs=4, num_steps=8, minibatch_size=8, update_epochs=5, target_kl=target_kl
    )
    agent, rollout, advantages, returns = made_up_rollout(config)
    calls: list[int] = []
    agent.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    update_policy(adam_step(agent, config), rollout, advantages, returns, config, 0.01, 0.1)
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
    agent, rollout, advantages, _ = made_up_rollout(config)
    returns = rollout.values + 100
    rollout.values = rollout.values - 10  # as if the values had risen by 10 since, towards the returns
    before = agent.critic.weight.detach().clone()
    update_policy(plain_descent(agent, config), rollout, advantages, returns, config, 0.1, 0.1)
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
    agent, rollout, advantages, returns = made_up_rollout(config)
    rollout.log_probs -= 0.05  # ratios around 1.05: with a clip range of 0.03 they are outside
    losses = update_policy(plain_descent(agent, config), rollout, advantages, returns, config, 0.1, clip_coef=0.03)

    twin, *_ = made_up_rollout(config)
    logged = []
    for _ in range(2):
        distribution, values = twin(rollout.observations.flatten(0, 1))
        loss, stats = ppo_loss(
            distribution.log_prob(rollout.actions.flatten()),
            rollout.log_probs.flatten(),
            advantages.flatten(),
            values,
            returns.flatten(),
            distribution.entropy(),
            clip_coef=0.03,
            vf_coef=0.3,
            ent_coef=0.2,
            old_values=rollout.values.flatten(),
            value_clip_coef=0.4,
        )
        logged.append(stats)
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
                parameter.sub_(gradient, alpha=0.1)
    torch.testing.assert_close(parameters(agent), parameters(twin), rtol=1e-5, atol=1e-6)
    for name in logged[0]:
        expected = (logged[0][name] + logged[1][name]).item() / 2
        assert losses[f"losses/{name}"] == pytest.approx(expected, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("device", DEVICES)
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
    for compiled in (False, True):
        agent, rollout, advantages, returns = made_up_rollout(config, device)
        step = adam_step(agent, config, compiled=compiled)
        torch.manual_seed(1)
        for clip_coef in (0.2, 0.1):  # annealed: no reason to compile again
            logged.append(update_policy(step, rollout, advantages, returns, config, 0.01, clip_coef))
        assert step.step.enabled == compiled, "it fell back"
        results.append(parameters(agent))
    torch.testing.assert_close(results[0], results[1])
    assert logged[2:] == [pytest.approx(losses, rel=1e-4, abs=1e-6) for losses in logged[:2]]


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_policy_is_the_eager_one_to_rounding_and_follows_the_weights(device: str) -> None:
    torch.manual_seed(0)
    agent = ActorCritic(gym.spaces.Box(0, 255, (4, 40, 40), np.uint8), gym.spaces.Discrete(6)).to(device)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)  # or it fell back
        policies = [policy_of(agent, compiled=compiled) for compiled in (True, False)]
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
        "compilation failed, going on without: no C++ compiler here"
    ]
    assert len(asked_for) == 2, "acting, and the update"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
def test_in_bfloat16_the_loss_of_images_stays_close_and_float32(compiled: bool, device: str) -> None:
    config = PPOConfig(num_envs=2, num_steps=4, minibatch_size=8, update_epochs=1, norm_adv=False)
    space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    logged = []
    for precision in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        agent = ActorCritic(space, gym.spaces.Discrete(6)).to(device)
        set_precision(agent, precision)
        obs = torch.randint(0, 255, (8, 4, 84, 84), dtype=torch.uint8).to(device)
        distribution, values = agent(obs)
        assert distribution.logits.dtype == values.dtype == torch.float32
        columns = (torch.arange(8) % 6, torch.full((8,), -1.8), torch.randn(8), torch.randn(8), torch.zeros(8))
        batch = [tensor.to(device) for tensor in (torch.arange(8), obs, *columns, torch.tensor(0.1))]
        step = adam_step(agent, config, compiled=compiled and precision == torch.bfloat16)
        logged.append(step(1e-3, *batch))
        assert {parameter.dtype for parameter in agent.parameters()} == {torch.float32}
    assert logged[1].dtype == torch.float32
    torch.testing.assert_close(logged[1], logged[0], rtol=2e-2, atol=2e-3)
    assert not torch.equal(logged[0], logged[1])


def test_only_long_runs_are_compiled() -> None:
    assert PPOConfig().compiles(images=True)
    steps = 5_000 // (4 * 4) * 1024
    assert not PPOConfig(total_timesteps=steps).compiles(images=True)
    assert PPOConfig(total_timesteps=steps + 1).compiles(images=True)
    assert not PPOConfig(total_timesteps=1_000_000).compiles(images=False)
    assert PPOConfig().compiles(images=False)
    assert not PPOConfig(compile=False).compiles(images=True)
    assert PPOConfig(compile=True, total_timesteps=1).compiles(images=False)


@pytest.mark.parametrize(
    ("values", "expected"), [([1.0, 2.0, 6.0], 1.0), ([3.0, 3.0, 3.0], 0.0), ([-1.0, -2.0, -6.0], -3.0)]
)
def test_explained_variance(values: list[float], expected: float) -> None:
    returns = torch.tensor([1.0, 2.0, 6.0])
    assert explained_variance(torch.tensor(values), returns) == pytest.approx(expected)
    assert math.isnan(explained_variance(torch.tensor(values), torch.ones(3)))


# Whole runs


def test_the_rollout_goes_into_the_advantages_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    rollouts: list[Rollout] = []

    def spy_collect(*args: Any) -> Any:
        rollouts.append(args[4])
        return collect_rollout(*args)

    def spy_gae(*args: Any) -> Any:
        rollout = rollouts[-1]
        fields = ["rewards", "values", "next_values", "terminated", "truncated"]
        calls.append([torch.equal(arg, getattr(rollout, name)) for arg, name in zip(args, fields, strict=False)])
        assert args[5:] == (0.7, 0.3)
        return compute_gae(*args)

    variances = []

    def spy_variance(values: Tensor, returns: Tensor) -> float:
        variances.append(torch.equal(values, rollouts[-1].values) and not torch.equal(values, returns))
        return 0.0

    monkeypatch.setattr("minirl.ppo.collect_rollout", spy_collect)
    monkeypatch.setattr("minirl.ppo.compute_gae", spy_gae)
    monkeypatch.setattr("minirl.ppo.explained_variance", spy_variance)
    train(dataclasses.replace(TINY, gamma=0.7, gae_lambda=0.3), device="cpu")
    assert calls == [[True] * 5] * 4
    assert variances == [True] * 4


def test_the_optimiser_has_the_settings_of_the_paper_and_the_annealed_rate(tmp_path: Path) -> None:
    train(dataclasses.replace(TINY, anneal_lr=True, learning_rate=0.4), run_dir=tmp_path / "run", device="cpu")
    (group,) = load_checkpoint(tmp_path / "run", "ppo")["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(0.1), "a quarter is left in the last of four updates"
    assert (group["eps"], tuple(group["betas"]), group["weight_decay"]) == (1e-5, (0.9, 0.999), 0)


@pytest.mark.parametrize("device", DEVICES)
def test_two_updates_on_the_real_pong_change_the_network_and_log_finite_losses(tmp_path: Path, device: str) -> None:
    with make_vector_env(SMALL_PONG.env_id, 1) as envs:
        torch.manual_seed(SMALL_PONG.seed)
        before = ActorCritic(envs.observation_space, envs.action_space)
    after = train(SMALL_PONG, run_dir=tmp_path / "run", device=device).cpu()
    assert parameters(after).shape == (1_687_719,)
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert new.isfinite().all(), name
        assert not torch.equal(old, new), name
        # 16 steps of Adam at 2.5e-4: the network that was trained is the one that was made from this seed.
        assert (new - old).abs().max() < 16 * 3e-4, name
    scalars = read_scalars(tmp_path / "run")
    for tag in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"):
        points = scalars[f"losses/{tag}"]
        assert [step for step, _ in points] == [64, 128], tag
        assert all(math.isfinite(value) for _, value in points), tag
    assert scalars["losses/entropy"][0][1] == pytest.approx(math.log(6), rel=0.01)
    assert {"losses/explained_variance", "charts/learning_rate", "charts/SPS"} <= scalars.keys()


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(SMALL_PONG, total_timesteps=5 * 64),
        dataclasses.replace(CARTPOLE, total_timesteps=5 * 256, target_kl=0.02, value_clip_coef=0.2),
    ],
    ids=["Pong", "CartPole"],
)
def test_one_seed_gives_one_result(config: PPOConfig) -> None:
    first, second = parameters(train(config, device="cpu")), parameters(train(config, device="cpu"))
    assert torch.equal(first, second)
    other = parameters(train(dataclasses.replace(config, seed=43), device="cpu"))
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(TINY, num_envs=4, num_workers=1),
        PPOConfig(num_envs=5, num_steps=4, minibatch_size=20, update_epochs=1, total_timesteps=40, num_workers=1),
    ],
)
def test_workers_change_nothing_but_the_speed(config: PPOConfig) -> None:
    alone = parameters(train(config, device="cpu"))
    for num_workers in (2, 3):
        assert torch.equal(alone, parameters(train(dataclasses.replace(config, num_workers=num_workers), device="cpu")))


@pytest.mark.parametrize(("seed", "compiled"), [(1, False), (2, True)])
def test_learns_cartpole(tmp_path: Path, seed: int, compiled: bool) -> None:
    started = time.monotonic()
    train(dataclasses.replace(CARTPOLE, seed=seed, compile=compiled), run_dir=tmp_path / "run", device="cpu")
    result = evaluate(tmp_path / "run", episodes=40)
    assert result["mean_return"] >= 475, result
    assert time.monotonic() - started < 120


def test_annealing_is_linear_and_ends_above_zero(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, anneal_lr=True, learning_rate=0.4)
    train(config, run_dir=tmp_path / "on", device="cpu")
    logged = read_scalars(tmp_path / "on")["charts/learning_rate"]
    assert [step for step, _ in logged] == [16, 32, 48, 64]
    assert [rate for _, rate in logged] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    train(dataclasses.replace(config, anneal_lr=False), run_dir=tmp_path / "off", device="cpu")
    assert [rate for _, rate in read_scalars(tmp_path / "off")["charts/learning_rate"]] == [pytest.approx(0.4)] * 4


def test_annealing_reaches_the_clip_range(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*args: Any) -> dict[str, float]:
        seen.append(args[-1])
        return update_policy(*args)

    monkeypatch.setattr("minirl.ppo.update_policy", spy)
    train(dataclasses.replace(TINY, anneal_clip=True, clip_coef=0.4), device="cpu")
    assert seen == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_the_last_update_may_go_past_the_total(tmp_path: Path) -> None:
    train(dataclasses.replace(TINY, total_timesteps=17), run_dir=tmp_path / "run", device="cpu")
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["global_step"] == 32


def test_nothing_is_written_without_a_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(TINY, device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_episodes_are_logged_at_the_step_of_their_end(tmp_path: Path) -> None:
    train(TINY, run_dir=tmp_path / "run", device="cpu")  # 2 environments, episodes of 7 steps: they end at 14, 28, ...
    scalars = read_scalars(tmp_path / "run")
    assert scalars["charts/episodic_length"] == [(step, 7.0) for step in (14, 14, 28, 28, 42, 42, 56, 56)]
    assert {value for _, value in scalars["charts/episodic_return"]} == {28.0}


@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_run_goes_on_where_it_stopped(tmp_path: Path, device: str) -> None:
    run_dir = tmp_path / "run"
    half = train(TINY, run_dir=run_dir, device=device)
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert saved["global_step"] == 64
    assert torch.equal(saved["model"]["actor.weight"], half.state_dict()["actor.weight"])

    time.sleep(1.1)  # TensorBoard names its files by the second
    train(dataclasses.replace(TINY, total_timesteps=96), run_dir=run_dir, resume=True, device=device)
    resumed = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert resumed["global_step"] == 96
    assert json.loads((run_dir / "config.json").read_text())["total_timesteps"] == 96
    # 4 epochs of 2 minibatches an update: Adam has counted on from 32, it has not started anew
    assert {int(state["step"]) for state in resumed["optimizer"]["state"].values()} == {6 * 8}
    assert len(resumed["returns"]) == 8 + 4
    assert [step for step, _ in read_scalars(run_dir)["losses/entropy"]] == [16, 32, 48, 64, 80, 96]


def test_what_was_logged_after_the_last_checkpoint_is_logged_anew(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, total_timesteps=160, checkpoint_frequency=32)
    stop_after = 80

    def killed(*args: Any) -> Any:
        if args[-1] >= stop_after:
            raise InterruptedError
        return collect_rollout(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr("minirl.ppo.collect_rollout", killed)
        train(config, run_dir=tmp_path / "run", device="cpu")
    assert [step for step, _ in read_scalars(tmp_path / "run")["losses/entropy"]] == [16, 32, 48, 64, 80]
    assert load_checkpoint(tmp_path / "run", "ppo")["global_step"] == 64
    time.sleep(1.1)  # TensorBoard names its files by the second
    train(config, run_dir=tmp_path / "run", resume=True, device="cpu")
    scalars = read_scalars(tmp_path / "run")
    assert [step for step, _ in scalars["losses/entropy"]] == list(range(16, 161, 16))
    minutes = [value for _, value in scalars["charts/minutes"]]
    assert minutes == sorted(minutes)
    assert minutes[0] > 0


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first = parameters(train(TINY, run_dir=tmp_path / "run", device="cpu"))
    again = parameters(train(TINY, run_dir=tmp_path / "run", resume=True, device="cpu"))
    assert torch.equal(first, again)


def test_a_total_below_what_is_done_is_refused(tmp_path: Path) -> None:
    train(TINY, run_dir=tmp_path / "run", device="cpu")
    with pytest.raises(ConfigError, match="--total-timesteps must be at least the 64 steps"):
        train(dataclasses.replace(TINY, total_timesteps=32), run_dir=tmp_path / "run", resume=True, device="cpu")


@pytest.mark.parametrize("env_id", ["Acrobot-v1", "MountainCar-v0", "tests.fake_envs:Endless-v0"])
def test_any_vector_environment_trains(env_id: str) -> None:
    config = dataclasses.replace(TINY, env_id=env_id)
    assert parameters(train(config, device="cpu")).isfinite().all()
