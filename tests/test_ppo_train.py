"""Training PPO as a whole: what is collected, and that it learns."""

import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from minirl.checks import ConfigError
from minirl.envs.make import make_vector_env
from minirl.envs.vector import VectorEnv
from minirl.evaluate import evaluate
from minirl.networks import observation_tensor
from minirl.ppo import (
    ActorCritic,
    PPOConfig,
    act,
    collect_rollout,
    compute_gae,
    train,
    update_policy,
)
from minirl.rollout import Rollout
from minirl.runs.checkpoints import load_checkpoint
from tests.fake_envs import counter
from tests.scalars import read_scalars
from tests.weights import parameters

CPU = torch.device("cpu")


def collect(agent: ActorCritic, envs: VectorEnv, num_steps: int) -> tuple[Rollout, NDArray[Any], list[tuple[int, Any]]]:
    """Play as `train` does; return the rollout, the next observations and the finished episodes."""
    rollout = Rollout(num_steps, envs.num_envs, CPU)
    policy = functools.partial(act, agent, torch.float32)
    return rollout, *collect_rollout(agent, torch.float32, policy, envs, envs.reset(seed=0), rollout)


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
SMALL_PONG = PPOConfig(num_envs=4, num_steps=16, minibatch_size=32, total_timesteps=2 * 64, num_workers=1)


# Collecting


@pytest.mark.parametrize(("num_workers", "in_halves"), [(1, False), (1, True), (2, True)])
def test_a_rollout_holds_what_was_seen_done_and_paid(num_workers: int, in_halves: bool) -> None:
    make = functools.partial(counter, 3)  # episodes of 3 steps
    with VectorEnv(make, 2, num_workers=num_workers, in_halves=in_halves) as envs:
        agent = ActorCritic(envs.observation_space, envs.action_space)
        rollout, obs, episodes = collect(agent, envs, 5)
    assert [(t, episode.episodic_return, episode.length) for t, episode in episodes] == [(2, 6.0, 3)] * 2
    # (episode, step, seed, last action): the last action at t is the one that was chosen at t - 1
    assert rollout["observations"][:, 0, :2].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]
    assert rollout["observations"][:, 1, 2].tolist() == [1] * 5
    assert torch.equal(rollout["observations"][1:, :, 3].long(), rollout["actions"][:-1])
    assert obs[:, :2].tolist() == [[1, 2], [1, 2]]
    assert rollout["rewards"][:, 0].tolist() == [1, 2, 3, 1, 2]
    assert rollout["terminated"][:, 0].tolist() == [False, False, True, False, False]
    assert not rollout["truncated"].any()
    distribution, values = agent(rollout["observations"].flatten(0, 1))
    torch.testing.assert_close(rollout["values"].flatten(), values.detach())
    torch.testing.assert_close(
        rollout["log_probs"].flatten(), distribution.log_prob(rollout["actions"].flatten()).detach()
    )
    last_values = agent(torch.tensor(obs))[1].detach()
    torch.testing.assert_close(rollout["next_values"][-1], last_values)
    torch.testing.assert_close(rollout["next_values"][:-1], rollout["values"][1:])


@pytest.mark.parametrize("in_halves", [False, True])
def test_a_cut_bootstraps_from_the_last_observation_and_not_from_the_next_episode(in_halves: bool) -> None:
    with VectorEnv(functools.partial(counter, None, 3), 2, num_workers=1, in_halves=in_halves) as envs:
        agent = ActorCritic(envs.observation_space, envs.action_space)
        rollout, _, _ = collect(agent, envs, 4)
    assert rollout["truncated"][:, 0].tolist() == [False, False, True, False]
    final_obs = torch.stack(
        [torch.tensor([0.0, 3.0, seed, action]) for seed, action in enumerate(rollout["actions"][2].tolist())]
    )
    torch.testing.assert_close(rollout["next_values"][2], agent(final_obs)[1].detach())
    assert not torch.isclose(rollout["next_values"][2], rollout["values"][3]).any()


def test_a_column_is_made_as_its_quantity_first_comes() -> None:
    rollout = Rollout(3, 2, CPU)
    images = torch.randint(256, (2, 4, 5, 6), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    for t in range(3):
        for env in range(2):
            rollout.put(
                t, slice(env, env + 1), observations=images[env : env + 1] + t, mine=torch.tensor([10 * t + env])
            )
    assert rollout["observations"].dtype == torch.uint8
    assert torch.equal(rollout["observations"], torch.stack([images + t for t in range(3)]))
    samples = rollout.samples(more=torch.zeros(3, 2))
    assert samples["observations"].is_contiguous(memory_format=torch.channels_last)
    assert samples["mine"].tolist() == [0, 1, 10, 11, 20, 21]
    assert samples["more"].shape == (6,)
    rollout.put(0, slice(0, 2), next_observations=np.array([[0.5], [1.5]]))
    assert rollout["next_observations"][0].tolist() == [[0.5], [1.5]]
    assert rollout["next_observations"].dtype == torch.float32, "as networks see observations"


def test_values_that_are_not_one_a_sample_are_named_where_the_policy_acts() -> None:
    agent = ActorCritic(gym.spaces.Box(-1, 1, (3,), np.float32), gym.spaces.Discrete(2))
    plain = agent.forward

    def without_squeeze(obs: Tensor) -> Any:
        distribution, values = plain(obs)
        return distribution, values[:, None]

    agent.forward = without_squeeze  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"log_probs \(4,\), values \(4, 1\)"):
        act(agent, torch.float32, torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            torch.tensor(1.0),
            r"^mine must be rows of shape \(\) and torch.float32, as at first, not \(\) and",
        ),
        (torch.ones(2, 1), r"not \(2, 1\) and torch.float32"),
        (torch.ones(2).long(), r"not \(2,\) and torch.int64"),
        (np.ones(2, np.float32), r"not \(2,\) and float32"),
    ],
)
def test_a_column_keeps_its_shape_and_dtype(values: Any, message: str) -> None:
    rollout = Rollout(3, 2, CPU)
    rollout.put(0, slice(None), mine=torch.ones(2))
    with pytest.raises(ValueError, match=message):
        rollout.put(1, slice(None), mine=values)


def test_a_column_is_whole_before_it_is_learned_from() -> None:
    rollout = Rollout(2, 2, CPU)
    for t in range(2):
        rollout.put(t, slice(None), mine=torch.ones(2))
    rollout.samples()
    rollout.put(0, slice(None), mine=torch.ones(2))
    rollout.put(1, slice(0, 2), mine=torch.ones(1))  # what the other has is of the rollout before, or the same
    with pytest.raises(ValueError, match="mine must be put at every step: 3 of 4 places are new"):
        rollout.samples()


def test_what_is_computed_later_can_not_be_put() -> None:
    rollout = Rollout(1, 2, CPU)
    rollout.put(0, slice(None), returns=torch.ones(2), mine=torch.ones(2))
    with pytest.raises(ValueError, match="returns is computed from the rollout: what is put needs another name"):
        rollout.samples(advantages=torch.zeros(1, 2), returns=torch.zeros(1, 2))


def test_a_rollout_of_pixels_holds_what_the_network_saw_and_said() -> None:
    """Played in halves, with actions that are drawn in halves: each environment must get its own."""
    with make_vector_env("PongNoFrameskip-v4", 3, in_halves=True) as envs:
        torch.manual_seed(0)
        agent = ActorCritic(envs.observation_space, envs.action_space)
        rollout, obs, _ = collect(agent, envs, 5)
    with make_vector_env("PongNoFrameskip-v4", 3, num_workers=1) as envs:
        seen = envs.reset(seed=0)
        for t in range(5):
            assert torch.equal(rollout["observations"][t], observation_tensor(seen, CPU))
            distribution, values = agent(torch.from_numpy(seen))
            torch.testing.assert_close(rollout["values"][t], values.detach(), rtol=1e-4, atol=1e-5)
            log_probs = distribution.log_prob(rollout["actions"][t]).detach()
            torch.testing.assert_close(rollout["log_probs"][t], log_probs, rtol=1e-4, atol=1e-5)
            step = envs.step(rollout["actions"][t].numpy())
            assert rollout["rewards"][t].tolist() == step.rewards.tolist()
            seen = step.observations
        np.testing.assert_array_equal(obs, seen)
        torch.testing.assert_close(
            rollout["next_values"][-1], agent(torch.from_numpy(seen))[1].detach(), rtol=1e-4, atol=1e-5
        )
    assert rollout["actions"].unique().numel() > 2, "an agent that always does the same would hide a mix-up"


# Whole runs


def test_the_rollout_goes_into_the_advantages_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    rollouts: list[Rollout] = []

    def spy_collect(*args: Any) -> Any:
        rollouts.append(args[5])
        return collect_rollout(*args)

    def spy_gae(*args: Any) -> Any:
        rollout = rollouts[-1]
        fields = ["rewards", "values", "next_values", "terminated", "truncated"]
        calls.append([torch.equal(arg, rollout[name]) for arg, name in zip(args, fields, strict=False)])
        assert args[5:] == (0.7, 0.3)
        return compute_gae(*args)

    variances = []

    def spy_variance(values: Tensor, returns: Tensor) -> float:
        variances.append(torch.equal(values, rollouts[-1]["values"]) and not torch.equal(values, returns))
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
        pytest.param(SMALL_PONG, marks=pytest.mark.slow),
        dataclasses.replace(CARTPOLE, total_timesteps=5 * 256, target_kl=0.02, value_clip_coef=0.2),
        pytest.param(dataclasses.replace(SMALL_PONG, total_timesteps=5 * 64, compile=True), marks=pytest.mark.slow),
    ],
    ids=["Pong", "CartPole", "Pong, compiled"],
)
def test_one_seed_gives_one_result(config: PPOConfig, device: str) -> None:
    first, second = parameters(train(config, device=device)), parameters(train(config, device=device))
    assert torch.equal(first, second)
    if config.compile:
        return
    other = parameters(train(dataclasses.replace(config, seed=43), device=device))
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(TINY, num_envs=4, num_workers=1),
        pytest.param(
            PPOConfig(num_envs=5, num_steps=4, minibatch_size=20, update_epochs=1, total_timesteps=40, num_workers=1),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_workers_change_nothing_but_the_speed(config: PPOConfig) -> None:
    alone = parameters(train(config, device="cpu"))
    for num_workers in (2, 3):
        assert torch.equal(alone, parameters(train(dataclasses.replace(config, num_workers=num_workers), device="cpu")))


def test_begins_to_learn_cartpole(tmp_path: Path) -> None:
    config = dataclasses.replace(CARTPOLE, seed=3, total_timesteps=15_000)
    train(config, run_dir=tmp_path / "run", device="cpu")
    returns = [value for _, value in read_scalars(tmp_path / "run")["charts/episodic_return"]]
    assert np.mean(returns[:20]) < 40
    assert np.mean(returns[-20:]) > 60  # 82 at the time of writing


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "compiled"), [(3, False), (2, True)])
def test_learns_cartpole(tmp_path: Path, seed: int, compiled: bool) -> None:
    train(dataclasses.replace(CARTPOLE, seed=seed, compile=compiled), run_dir=tmp_path / "run", device="cpu")
    result = evaluate(tmp_path / "run", episodes=40)
    assert result["mean_return"] >= 475, result


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


def test_a_resumed_run_goes_on_where_it_stopped(tmp_path: Path, device: str) -> None:
    run_dir = tmp_path / "run"
    half = train(TINY, run_dir=run_dir, device=device)
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert saved["global_step"] == 64
    assert torch.equal(saved["model"]["actor.weight"], half.state_dict()["actor.weight"])

    train(dataclasses.replace(TINY, total_timesteps=96), run_dir=run_dir, resume=True, device=device)
    resumed = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert resumed["global_step"] == 96
    assert json.loads((run_dir / "config.json").read_text())["total_timesteps"] == 96
    # 4 epochs of 2 minibatches per update: Adam has continued its count from 32, not restarted
    assert {int(state["step"]) for state in resumed["optimizer"]["state"].values()} == {6 * 8}
    assert len(resumed["returns"]) == 8 + 4
    assert [step for step, _ in read_scalars(run_dir)["losses/entropy"]] == [16, 32, 48, 64, 80, 96]


def test_a_run_may_go_on_on_another_device(tmp_path: Path, device: str) -> None:
    for number, here in enumerate((device, "cpu", device, "cpu"), start=1):
        config = dataclasses.replace(TINY, total_timesteps=32 * number, compile=here != "cpu")
        train(config, run_dir=tmp_path / "run", resume=number > 1, device=here)
    saved = load_checkpoint(tmp_path / "run", "ppo")
    assert {int(state["step"]) for state in saved["optimizer"]["state"].values()} == {8 * 8}
    assert evaluate(tmp_path / "run", episodes=1, device=device)["returns"] == [28.0]


def test_what_was_logged_after_the_last_checkpoint_is_logged_anew(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, total_timesteps=160, checkpoint_frequency=32)
    rollouts = itertools.count(1)

    def killed(*args: Any) -> Any:
        if next(rollouts) > 5:
            raise InterruptedError
        return collect_rollout(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr("minirl.ppo.collect_rollout", killed)
        train(config, run_dir=tmp_path / "run", device="cpu")
    assert [step for step, _ in read_scalars(tmp_path / "run")["losses/entropy"]] == [16, 32, 48, 64, 80]
    assert load_checkpoint(tmp_path / "run", "ppo")["global_step"] == 64
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


def test_other_settings_than_the_runs_own_are_refused(tmp_path: Path) -> None:
    train(TINY, run_dir=tmp_path / "run", device="cpu")
    saved = (tmp_path / "run" / "config.json").read_text()
    other = dataclasses.replace(TINY, total_timesteps=128, gamma=0.5, hidden_sizes=(64, 64))
    with pytest.raises(ConfigError, match=r"--gamma 0\.5 can't go with --resume: the run has 0\.\d+; leave it out"):
        train(other, run_dir=tmp_path / "run", resume=True, device="cpu")
    assert (tmp_path / "run" / "config.json").read_text() == saved
    settings = json.loads(saved)
    del settings["vf_coef"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    newer = dataclasses.replace(TINY, total_timesteps=128, vf_coef=0.1)
    with pytest.raises(ConfigError, match=r"--vf-coef 0\.1 can't go with --resume: the run has 0\.5"):
        train(newer, run_dir=tmp_path / "run", resume=True, device="cpu")
    longer = dataclasses.replace(TINY, total_timesteps=128, num_workers=1, compile=False)
    train(longer, run_dir=tmp_path / "run", resume=True, device="cpu")


def test_a_total_below_what_is_done_is_refused(tmp_path: Path) -> None:
    train(TINY, run_dir=tmp_path / "run", device="cpu")
    with pytest.raises(ConfigError, match="--total-timesteps must be at least the 64 steps"):
        train(dataclasses.replace(TINY, total_timesteps=32), run_dir=tmp_path / "run", resume=True, device="cpu")


@pytest.mark.parametrize("env_id", ["Acrobot-v1", "MountainCar-v0", "tests.fake_envs:Endless-v0"])
def test_any_vector_environment_trains(env_id: str) -> None:
    config = dataclasses.replace(TINY, env_id=env_id)
    assert parameters(train(config, device="cpu")).isfinite().all()
