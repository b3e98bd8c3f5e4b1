"""Actions that are not one choice: their distributions, their way to the environment, and training with them."""

import dataclasses
import functools
import itertools
import math
import re
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from minirl.checks import ConfigError
from minirl.envs.guard import EnvError, Guard
from minirl.envs.make import make_env, make_vector_env
from minirl.evaluate import evaluate
from minirl.networks import (
    Bernoullis,
    Categoricals,
    Gaussian,
    action_distribution,
)
from minirl.normalize import NormalizeObservation, NormalizeReward, RunningMeanStd
from minirl.plots.of_run import draw_picture
from minirl.ppo import ActorCritic, PPOConfig, choose_actions, train
from minirl.results.play import play_games
from minirl.results.video import record_game
from minirl.runs.checkpoints import load_checkpoint
from tests.fake_envs import ACTIONS, REFUSED
from tests.reference import scaled_rewards
from tests.test_resume import assert_same, train_with_kills

TINY = PPOConfig(
    num_envs=2, num_steps=8, minibatch_size=8, update_epochs=2, total_timesteps=48, checkpoint_frequency=16
)
VECTOR = gym.spaces.Box(-9, 9, (3,), np.float32)
LOG_2_PI = math.log(2 * math.pi)


# Distributions


def test_a_gaussian_by_hand() -> None:
    mean = torch.tensor([[0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor([0.0, math.log(2)], dtype=torch.float64, requires_grad=True)
    policy = Gaussian(mean, log_std, (2,))
    # (2.5 - 0.5) / 1 = 2 and (1 + 1) / 2 = 1 standard deviations from the means
    log_prob = policy.log_prob(torch.tensor([[2.5, 1.0]], dtype=torch.float64))
    assert log_prob.tolist() == pytest.approx([-4 / 2 - 1 / 2 - math.log(2) - LOG_2_PI])
    slopes = torch.autograd.grad(log_prob.sum(), [mean, log_std])
    torch.testing.assert_close(slopes[0], torch.tensor([[2 / 1, 1 / 2]], dtype=torch.float64))  # z / sigma
    torch.testing.assert_close(slopes[1], torch.tensor([2.0**2 - 1, 1.0**2 - 1], dtype=torch.float64))  # z^2 - 1
    assert policy.entropy().tolist() == pytest.approx([math.log(2) + 1 + LOG_2_PI])
    assert torch.autograd.grad(policy.entropy().sum(), log_std)[0].tolist() == [1, 1]
    assert policy.mode.tolist() == [[0.5, -1.0]]


def test_a_gaussian_is_a_density_whose_entropy_is_that_of_the_integral() -> None:
    grid = torch.linspace(-12, 12, 40_001, dtype=torch.float64)[:, None]
    mean, log_std = torch.full((len(grid), 1), 0.3, dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    policy = Gaussian(mean, log_std, (1,))
    log_density = policy.log_prob(grid)
    density, width = log_density.exp(), float(grid[1] - grid[0])
    assert float(density.sum() * width) == pytest.approx(1, abs=1e-9)
    assert float(-(density * log_density).sum() * width) == pytest.approx(float(policy.entropy()[0]), abs=1e-9)
    assert float((density * grid[:, 0]).sum() * width) == pytest.approx(0.3, abs=1e-9)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("of_states", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3)])
def test_a_gaussian_of_any_shape_is_pytorchs(shape: tuple[int, ...], of_states: bool, batch: int) -> None:
    mean, log_std = torch.randn(batch, *shape), torch.randn(batch, *shape) if of_states else torch.randn(shape)
    policy = Gaussian(mean.reshape(batch, -1), log_std.reshape(batch, -1) if of_states else log_std, shape)
    theirs = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), len(shape))
    actions = policy.sample()
    assert actions.shape == policy.mode.shape == (batch, *shape)
    torch.testing.assert_close(policy.log_prob(actions), theirs.log_prob(actions))
    torch.testing.assert_close(policy.entropy(), theirs.entropy())
    assert policy.log_prob(actions).shape == policy.entropy().shape == (batch,)


def joint(kind: str, numbers: Tensor) -> tuple[Any, Tensor, Tensor]:
    """A distribution of numbers (n,), all actions that there are, and their log-probabilities as one big choice.

    The probability of all choices together is in proportion to e to the sum of their logits.
    """
    if kind == "choices":
        sizes = np.array([2, 4, 3])
        parts = numbers.split(sizes.tolist())
        policy: Any = Categoricals(numbers[None], sizes)
    else:
        parts = tuple(torch.stack([torch.zeros_like(number), number]) for number in numbers)
        policy = Bernoullis(numbers[None], (len(numbers),))
    actions = torch.tensor(list(itertools.product(*(range(len(part)) for part in parts))))
    sums = torch.stack([part[actions[:, i]] for i, part in enumerate(parts)]).sum(dim=0)
    return policy, actions, sums - sums.exp().sum().log()


@pytest.mark.parametrize("kind", ["choices", "bits"])
def test_choices_are_those_of_the_joint_distribution(kind: str) -> None:
    numbers = torch.randn(9 if kind == "choices" else 5, dtype=torch.float64, requires_grad=True)
    policy, actions, expected = joint(kind, numbers)
    found = torch.cat([policy.log_prob(action[None]) for action in actions])
    torch.testing.assert_close(found, expected)
    entropy = -(expected.exp() * expected).sum()
    torch.testing.assert_close(policy.entropy(), entropy[None])
    weights = torch.rand(len(actions), dtype=torch.float64)
    slopes = [
        torch.autograd.grad((weights * log_probs).sum() + 3 * entropies.sum(), numbers, retain_graph=True)[0]
        for log_probs, entropies in [(found, policy.entropy()), (expected, entropy)]
    ]
    torch.testing.assert_close(*slopes)
    assert torch.equal(policy.mode[0].long(), actions[expected.argmax()])


def test_bits_by_hand() -> None:
    # sigmoid(ln 3) = 3/4
    policy = Bernoullis(torch.tensor([[math.log(3), -math.log(3)]], dtype=torch.float64), (2,))
    assert policy.log_prob(torch.tensor([[1, 1]])).tolist() == pytest.approx([math.log(3 / 4) + math.log(1 / 4)])
    assert policy.entropy().tolist() == pytest.approx([-2 * (0.75 * math.log(0.75) + 0.25 * math.log(0.25))])
    assert policy.mode.tolist() == [[1, 0]]
    sure = Bernoullis(torch.tensor([[200.0, -200.0]], requires_grad=True), (2,))
    assert sure.entropy().tolist() == [0]
    assert sure.log_prob(torch.tensor([[1, 0], [0, 1]])).tolist() == [0, -400]


@pytest.mark.parametrize("name", ACTIONS)
def test_draws_are_as_likely_as_they_should_be(name: str) -> None:
    torch.manual_seed(0)
    space = ACTIONS[name]
    size, make = action_distribution(space)
    numbers, log_std = torch.randn(size) * 0.7, torch.randn(space.shape or ()) * 0.5
    many = numbers.expand(40_000, size)
    policy = make(many, log_std) if isinstance(space, gym.spaces.Box) else make(many)
    drawn = policy.sample().double()
    assert drawn.shape == policy.mode.shape == (40_000, *(space.shape or ()))
    if isinstance(space, gym.spaces.Box):
        torch.testing.assert_close(drawn.mean(dim=0).flatten(), numbers.double(), atol=0.03, rtol=0)
        torch.testing.assert_close(drawn.std(dim=0), log_std.exp().double(), rtol=0.02, atol=0)
        return
    kinds, counts = drawn.flatten(1).unique(dim=0, return_counts=True)
    expected = policy.log_prob(drawn.long()).exp()
    for kind, number in zip(kinds, counts, strict=True):
        place = int((drawn.flatten(1) == kind).all(dim=1).nonzero()[0])
        assert number / 40_000 == pytest.approx(float(expected[place]), abs=0.012)


@pytest.mark.parametrize("name", [*ACTIONS, *REFUSED])
def test_a_network_for_each_kind_of_actions(name: str) -> None:
    if name in REFUSED:
        with pytest.raises(ConfigError, match="--env-id must have actions that are Discrete, MultiDiscrete, "):
            ActorCritic(VECTOR, REFUSED[name])
        return
    agent = ActorCritic(VECTOR, ACTIONS[name])
    for batch in (0, 4):
        policy, values = agent(torch.randn(batch, 3))
        actions = policy.sample()
        assert policy.log_prob(actions).shape == policy.entropy().shape == values.shape == (batch,)
    assert choose_actions(agent, np.zeros((4, 3), np.float32)).shape == (4, *(ACTIONS[name].shape or ()))
    names = dict(agent.named_parameters())
    assert ("log_std" in names) == isinstance(ACTIONS[name], gym.spaces.Box)
    if "log_std" in names:
        assert not names["log_std"].any(), "it starts at 0"
        assert (names["log_std"].shape, names["log_std"].requires_grad) == (ACTIONS[name].shape, True)


# The way to the environment


def wild(space: gym.Space[Any], number: int) -> tuple[Any, Any]:
    """Actions (number, ...) as a policy draws them, from 0 on, and what the environment should get."""
    rng = np.random.default_rng(0)
    drawn: Any
    shape = (number, *(space.shape or ()))
    if isinstance(space, gym.spaces.Box):
        drawn = rng.normal(0, 9, shape).astype(np.float32)
        low, high = np.broadcast_to(space.low, shape), np.broadcast_to(space.high, shape)
        expected = [min(max(float(x), a), b) for x, a, b in zip(drawn.flat, low.flat, high.flat, strict=True)]
        return drawn, np.array(expected).reshape(number, -1)
    sizes = space.nvec if isinstance(space, gym.spaces.MultiDiscrete) else 2
    drawn = rng.integers(0, sizes, shape)
    start = space.start if isinstance(space, gym.spaces.MultiDiscrete) else 0
    return drawn, (drawn + start).reshape(number, -1).astype(float)


@pytest.mark.parametrize(("name", "num_workers"), [*((name, 1) for name in ACTIONS), ("Table", 2), ("Started", 2)])
def test_environments_take_actions_of_any_shape_within_their_bounds(name: str, num_workers: int) -> None:
    with make_vector_env(f"tests.fake_envs:{name}Actions-v0", 3, num_workers=num_workers) as envs:
        envs.reset(seed=0)
        for _ in range(3):
            actions, expected = wild(ACTIONS[name], 3)
            before = actions.copy()
            np.testing.assert_allclose(envs.step(actions).observations, expected, rtol=1e-6)
            np.testing.assert_array_equal(actions, before)


def test_an_action_that_is_not_a_number_is_the_environments_to_answer() -> None:
    with make_vector_env("tests.fake_envs:SixActions-v0", 2) as envs:
        envs.reset(seed=0)
        actions = np.zeros((2, 6), np.float32)
        actions[1, 2] = np.nan
        with pytest.raises(EnvError, match=r"environment 1 \(SixActions-v0\), at its step 1, gave an .* not finite"):
            envs.step(actions)


def test_a_video_takes_the_actions_that_training_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    taken = []
    guard_step = Guard.step

    def spy(guard: Guard, action: Any) -> Any:
        step = guard_step(guard, action)
        taken.append((action.item(), float(guard.env.unwrapped.last_u)))  # type: ignore[attr-defined]
        return step

    monkeypatch.setattr(Guard, "step", spy)
    assert record_game(lambda obs: 5 * obs[:, 2:], "Pendulum-v1", 0, tmp_path / "game.mp4")
    assert len(taken) == 200
    assert any(abs(drawn) > 2 for drawn, _ in taken)
    assert all(given == pytest.approx(min(max(drawn, -2), 2)) for drawn, given in taken)


# Normalisation


def test_moments_are_those_of_the_whole_history() -> None:
    rng = np.random.default_rng(0)
    history = rng.normal([3, -1e6, 0, 1e-4], [0.5, 2, 1e4, 1e-6], (500, 4))
    moments = RunningMeanStd((4,))
    for piece in np.split(history, [1, 2, 50, 333]):
        moments.update(torch.from_numpy(piece))
        seen = history[: int(moments.count)]
        np.testing.assert_allclose(moments.mean, seen.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(moments.variance, seen.var(axis=0), rtol=1e-7, atol=1e-20)
    assert int(moments.count) == 500


def test_observations_are_scaled_clipped_and_nothing_else_changes_the_statistics() -> None:
    normalize = NormalizeObservation((3,))
    obs = torch.tensor([[1.0, 5.0, 100.0], [3.0, 5.0, -100.0]])
    assert normalize(obs).tolist() == [[1, 5, 10], [3, 5, -10]], "nothing taken in: clipped only"
    normalize.update(obs)  # means 2, 5 and 0, variances 1, 0 and 10,000
    scaled = normalize(torch.tensor([[4.0, 5.0, 50.0], [2.0, 6.0, -5000.0]]))
    torch.testing.assert_close(scaled, torch.tensor([[2.0, 0.0, 0.5], [0.0, 10.0, -10.0]]))
    assert scaled.dtype == torch.float32
    assert normalize.count == 2


def test_rewards_by_hand() -> None:
    norm = NormalizeReward(2, 0.5)
    # Returns: 1 and 3, of variance 1; then 2 + 0.5 and, anew, 4.
    found = norm(np.float32([[1, 3], [2, 4]]), np.array([[False, True], [False, False]]))  # type: ignore[arg-type]
    deviation = np.array([1, 3, 2.5, 4]).std()
    np.testing.assert_allclose(found, [[1, 3], [2 / deviation, 4 / deviation]], rtol=1e-6)
    assert norm.discounted.tolist() == [2.5, 4]
    assert float(norm.mean) == pytest.approx(10.5 / 4)
    assert norm.count == 4


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_rewards_are_divided_by_the_deviation_of_all_returns_so_far(offset: float) -> None:
    rng = np.random.default_rng(0)
    rewards, ended = (rng.normal(offset, 1, (60, 3))).astype(np.float32), rng.random((60, 3)) < 0.1
    norm, found = NormalizeReward(3, 0.9), []
    for piece in range(3):  # the returns go on from one rollout to the next, and from one process to the next
        rows = slice(20 * piece, 20 * piece + 20)
        found.append(norm(rewards[rows], ended[rows]))
        loaded = NormalizeReward(3, 0.9)
        loaded.load_state_dict(norm.state_dict())
        norm = loaded
    expected = scaled_rewards(torch.from_numpy(rewards).double(), torch.from_numpy(ended), 0.9)
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=2e-6)


def test_a_checkpoint_holds_what_is_normalised_by_and_evaluation_leaves_it(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, env_id="Pendulum-v1", norm_obs=True, norm_reward=True)
    agent = train(config, run_dir=tmp_path / "run", device="cpu")
    assert agent.normalize is not None
    assert int(agent.normalize.count) == config.total_timesteps
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert int(saved["norm_reward"]["count"]) == config.total_timesteps
    with make_vector_env("Pendulum-v1", 2) as envs:
        mine = ActorCritic(envs.observation_space, envs.action_space, PPOConfig(norm_obs=True))
        mine.load_state_dict(saved["model"])
        with pytest.raises(RuntimeError, match=r"normalize\.mean"):
            ActorCritic(envs.observation_space, envs.action_space).load_state_dict(saved["model"])
        before = agent(torch.from_numpy(envs.reset(seed=0)))[0].mean
        assert torch.equal(mine(torch.from_numpy(envs.reset(seed=0)))[0].mean, before)
        returns = play_games(functools.partial(choose_actions, mine), envs, 2, seed=7)
    assert evaluate(tmp_path / "run", episodes=2, seed=7, device="cpu")["returns"] == returns
    assert_same(mine.state_dict(), agent.state_dict())


# Training


@pytest.mark.parametrize("name", ACTIONS)
def test_all_kinds_of_actions_train_evaluate_and_resume_exactly(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(TINY, env_id=f"tests.fake_envs:{name}Actions-v0")
    agent = train(config, run_dir=tmp_path / "alone", device="cpu")
    torch.manual_seed(config.seed)
    with make_vector_env(config.env_id, 2) as envs:
        before = ActorCritic(envs.observation_space, envs.action_space)
    for weight, (weight_name, now) in zip(before.parameters(), agent.named_parameters(), strict=True):
        assert not torch.equal(weight, now), weight_name
    train_with_kills(train, config, tmp_path / "killed", [2], monkeypatch)
    assert_same(load_checkpoint(tmp_path / "alone", "ppo"), load_checkpoint(tmp_path / "killed", "ppo"))
    greedy = evaluate(tmp_path / "alone", episodes=3, device="cpu")["returns"]
    drawn = [evaluate(tmp_path / "alone", episodes=3, seed=s, stochastic=True, device="cpu")["returns"] for s in (1, 2)]
    assert greedy == pytest.approx([greedy[0]] * 3, rel=1e-6), "its games are all alike; sums may round by the row"
    assert drawn[0] != drawn[1] or name == "Single"


def test_the_mean_plays_and_stochastic_games_draw() -> None:
    with make_vector_env("Pendulum-v1", 2) as envs:
        agent = ActorCritic(envs.observation_space, envs.action_space)
        obs = envs.reset(seed=0)
    policy, _ = agent(torch.from_numpy(obs))
    np.testing.assert_allclose(choose_actions(agent, obs), policy.mean.detach().numpy(), rtol=1e-5, atol=1e-7)
    torch.manual_seed(0)
    draws = choose_actions(agent, np.repeat(obs, 5_000, axis=0), sample=True)
    assert draws.std() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    ("module", "env_id", "extra"), [("mujoco", "Hopper-v5", "mujoco"), ("Box2D", "LunarLander-v3", "box2d")]
)
def test_where_physics_is_missing_a_line_says_how_to_install_it(
    module: str, env_id: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(f"gymnasium.envs.{extra}")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    wanted = f"--env-id must be an environment whose packages are installed: {env_id} needs the extra {extra}, "
    with pytest.raises(ConfigError, match=f"^{re.escape(wanted)}pip install -e '.\\[{extra}\\]'$"):
        make_env(env_id)


def test_pictures_that_do_not_fit_a_gaussian_are_refused_in_one_line(tmp_path: Path) -> None:
    train(dataclasses.replace(TINY, env_id="Pendulum-v1"), run_dir=tmp_path / "run", device="cpu")
    with pytest.raises(ConfigError, match=r"--kind action-probabilities needs a run of ppo on an Atari game, and .*"):
        draw_picture("action-probabilities", tmp_path / "run", "cpu")
