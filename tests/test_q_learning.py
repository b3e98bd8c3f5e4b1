"""Q-learning: the update by hand, exploration by counting, and whole runs against exact values."""

import dataclasses
import itertools
import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minirl import evaluate as evaluation
from minirl import q_learning
from minirl.checks import ConfigError
from minirl.envs.gridworld import GridWorld
from minirl.envs.guard import Guard
from minirl.envs.make import make_bare_env, time_limit
from minirl.evaluate import evaluate
from minirl.plots import read_curve
from minirl.q_learning import (
    LOG_EVERY,
    Played,
    QLearningConfig,
    QTable,
    epsilon_greedy,
    play_episode,
    q_update,
    train,
    value_iteration,
)
from minirl.results.tables import best_actions_grid, detailed_grid, summary
from minirl.runs.checkpoints import DivergedError, load_checkpoint
from minirl.runs.directory import save_config
from minirl.scripts.train import run_training
from minirl.streams import Stream, derived_seed
from tests.recipes import recipe
from tests.test_resume import assert_same

ROOT = Path(__file__).parent.parent
NOTEBOOK = QLearningConfig()
SHORT = QLearningConfig(num_episodes=250)


# The update


@pytest.mark.parametrize(
    ("terminated", "alpha", "td_error", "new"),
    [
        # Q(0, 1) = 2, r = 3, max Q(1, .) = 10, gamma 0.5: the target is 3 + 5, or 3 at an end
        (False, 0.25, 6.0, 3.5),
        (False, 1.0, 6.0, 8.0),  # alpha 1 replaces
        (False, 0.0, 6.0, 2.0),  # alpha 0 learns nothing
        (True, 0.25, 1.0, 2.25),
        (True, 1.0, 1.0, 3.0),
    ],
)
def test_the_update_by_hand(terminated: bool, alpha: float, td_error: float, new: float) -> None:
    table = np.array([[1.0, 2.0], [10.0, -4.0], [99.0, 99.0]])
    error = q_update(table, 0, 1, 3.0, 1, terminated, alpha=alpha, gamma=0.5)
    assert error == td_error
    assert isinstance(error, float)
    assert table.tolist() == [[1.0, new], [10.0, -4.0], [99.0, 99.0]]


def test_the_update_of_a_step_that_stays_uses_the_values_before_it() -> None:
    table = np.array([[4.0, 2.0]])
    assert q_update(table, 0, 0, -10.0, 0, False, alpha=0.5, gamma=0.5) == -10 + 0.5 * 4 - 4
    assert table.tolist() == [[-2.0, 2.0]]


# Choosing


def test_greedy_is_the_first_of_the_best() -> None:
    rng = np.random.default_rng(0)
    assert {epsilon_greedy(np.array([1.0, 5.0, 5.0]), 0.0, rng) for _ in range(100)} == {1}


@pytest.mark.parametrize(("epsilon", "num_actions"), [(0.3, 4), (1.0, 3), (0.05, 6), (0.3, 1)])
def test_actions_come_as_often_as_epsilon_says(epsilon: float, num_actions: int) -> None:
    rng = np.random.default_rng(1)
    draws = 40_000
    q_values = np.arange(num_actions, dtype=float)
    counts = np.bincount([epsilon_greedy(q_values, epsilon, rng) for _ in range(draws)], minlength=num_actions)
    expected = np.full(num_actions, epsilon / num_actions)
    expected[-1] += 1 - epsilon
    assert counts / draws == pytest.approx(expected, abs=5 * np.sqrt(0.25 / draws))


class LargestBelow:
    """Draws the largest number below epsilon, where u / epsilon * A could round up to A."""

    def __init__(self, epsilon: float) -> None:
        self.number = float(np.nextafter(epsilon, 0))

    def random(self) -> float:
        return self.number


@pytest.mark.parametrize("epsilon", [0.1, 0.3, 0.7, 1.0, 1e-300])
@pytest.mark.parametrize("num_actions", [1, 2, 3, 4, 5, 6, 7, 9, 17, 1000])
def test_exploring_never_leaves_the_range_of_actions(epsilon: float, num_actions: int) -> None:
    rng: Any = LargestBelow(epsilon)
    assert epsilon_greedy(np.zeros(num_actions), epsilon, rng) == num_actions - 1


def own_generator(seed: int) -> random.Random:
    return random.Random(derived_seed(seed, Stream.EXPLORATION))


def test_exploration_does_not_follow_the_environments_noise_nor_anybody_elses() -> None:
    env = gym.make("FrozenLake-v1")
    env.reset(seed=7)
    noise = {*env.unwrapped.np_random.random(1000).tolist(), *(random.Random(7).random() for _ in range(1))}
    assert not noise & {own_generator(7).random() for _ in range(1)}
    rng = own_generator(7)
    assert not noise & {rng.random() for _ in range(2000)}


@pytest.mark.parametrize("generator", [np.random.default_rng(0), random.Random(0)])
def test_any_generator_will_do(generator: Any) -> None:
    drawn = {epsilon_greedy(np.zeros(3), 1.0, generator) for _ in range(100)}
    assert drawn == {0, 1, 2}


# Value iteration


def test_value_iteration_finds_the_notebooks_table() -> None:
    q_star = value_iteration(GridWorld(), 0.99)
    # From (2, 1), right is the goal; from (2, 0), right and then right; up from (2, 0) goes the long way.
    assert q_star[7] == pytest.approx([-10 + 0.99 * 100, 100, -10 + 0.99 * 100, -1 + 0.99 * 98])
    assert q_star[0].max() == pytest.approx(-1 + 0.99 * (-1 + 0.99 * (-1 + 0.99 * 100)))
    assert not q_star[8].any()
    assert not q_star[4].any()


def test_value_iteration_weighs_outcomes_by_their_probability() -> None:
    class Coin(gym.Env[Any, Any]):
        P = {0: {0: [(0.25, 0, 1.0, False), (0.75, 0, 5.0, True)], 1: [(1.0, 0, 2.0, True)]}}  # noqa: RUF012

    # Q(0, 0) = 0.25 (1 + 0.5 max Q) + 0.75 * 5, and it is the larger: Q = 4 / (1 - 0.125)
    assert value_iteration(Coin(), 0.5) == pytest.approx(np.array([[4 / 0.875, 2.0]]))


def test_value_iteration_needs_a_model() -> None:
    with pytest.raises(ValueError, match="has no model P"):
        value_iteration(gym.make("CartPole-v1"), 0.9)


def test_value_iteration_notices_values_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mint(gym.Env[Any, Any]):
        P = {0: {0: [(1.0, 0, 1.0, False)]}}  # noqa: RUF012

    monkeypatch.setattr(q_learning, "MAX_SWEEPS", 1000)
    with pytest.raises(ValueError, match="did not converge"):
        value_iteration(Mint(), 1.0)


# Whole runs


@pytest.mark.parametrize(
    ("env_id", "num_episodes", "epsilon"),
    [("minirl/GridWorld-v0", 200, 0.3), ("FrozenLake-v1", 1500, 1.0), ("Taxi-v4", 100, 0.3)],
)
def test_training_is_the_public_functions_number_for_number(env_id: str, num_episodes: int, epsilon: float) -> None:
    env = gym.make(env_id)
    config = QLearningConfig(
        env_id=env_id, num_episodes=num_episodes, epsilon=epsilon, alpha=0.37, anneal_alpha=True, anneal_epsilon=True
    )
    rng = own_generator(config.seed)
    shape = env.observation_space.n, env.action_space.n  # type: ignore[attr-defined]
    table = np.full(shape, config.initial_value)
    env.reset(seed=config.seed)
    for episode in range(config.num_episodes):
        remaining = 1 - episode / config.num_episodes
        state, _ = env.reset()
        ended = False
        while not ended:
            action = epsilon_greedy(table[state], config.epsilon * remaining, rng)
            next_state, reward, terminated, truncated, _ = env.step(action)
            alpha = config.alpha * remaining
            q_update(table, state, action, float(reward), next_state, terminated, alpha=alpha, gamma=config.gamma)
            state, ended = next_state, terminated or truncated
    assert (table != config.initial_value).sum() >= 8
    np.testing.assert_array_equal(train(config), table)


@pytest.mark.parametrize(
    ("terminated", "truncated", "max_steps", "value"),
    [
        (False, True, 10**9, 2.0),  # cut by the environment: 1 + 0.5 + 0.25 + ...
        (False, False, 1, 2.0),  # cut by the time limit
        (True, False, 10**9, 1.0),  # over: nothing follows, though the same state has a value
        (True, True, 1, 1.0),
    ],
)
def test_a_cut_is_not_an_end(terminated: bool, truncated: bool, max_steps: int, value: float) -> None:
    class Corridor(gym.Env[Any, Any]):
        """Pays 1 a step; its episodes have one step."""

        observation_space = gym.spaces.Discrete(1)
        action_space = gym.spaces.Discrete(1)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
            return 0, {}

        def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
            return 0, 1.0, terminated, truncated, {}

    table = np.zeros((1, 1))
    for _ in range(200):
        result = play_episode(Guard(Corridor()), table, random.Random(0), 0.5, 0.5, 0.0, max_steps)
    assert table[0, 0] == pytest.approx(value)
    assert result[:2] == (1.0, 1)
    assert result[2] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 20))])
def test_the_notebooks_settings_reach_q_star(seed: int) -> None:
    learned = train(dataclasses.replace(NOTEBOOK, seed=seed))
    expected = value_iteration(GridWorld(), NOTEBOOK.gamma)
    on_the_way = [0, 1, 2, 3, 5, 6, 7]  # neither the obstacle nor the goal
    assert np.abs(learned - expected)[on_the_way].max() < 1e-6


def test_the_notebooks_settings_are_the_defaults() -> None:
    assert (NOTEBOOK.alpha, NOTEBOOK.gamma, NOTEBOOK.epsilon, NOTEBOOK.num_episodes) == (0.3, 0.99, 0.3, 10_000)
    assert not NOTEBOOK.anneal_alpha
    assert not NOTEBOOK.anneal_epsilon
    assert NOTEBOOK.env_id == "minirl/GridWorld-v0"


def random_layout(seed: int) -> dict[str, Any]:
    """A 4x4 grid with 4 obstacles and a way through."""
    rng = np.random.default_rng(seed)
    while True:
        cells = [divmod(int(cell), 4) for cell in rng.permutation(np.arange(1, 15))[:4]]
        layout: dict[str, Any] = {"size": 4, "goal": (3, 3), "obstacles": tuple(cells)}
        try:
            GridWorld(**layout)
        except ValueError:
            continue
        return layout


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_random_grids_reach_q_star(seed: int) -> None:
    layout = random_layout(seed)
    gym.register(f"RandomGrid{seed}-v0", "minirl.envs.gridworld:GridWorld", kwargs=layout, max_episode_steps=1000)
    config = QLearningConfig(env_id=f"RandomGrid{seed}-v0", epsilon=0.7, num_episodes=20_000)
    learned = train(config)
    grid = GridWorld(**layout)
    expected = value_iteration(grid, config.gamma)
    reachable = sorted(grid.reachable() - {grid.goal_state})
    assert len(reachable) >= 6
    np.testing.assert_allclose(learned[reachable], expected[reachable], atol=0.01)


def success_within_the_limit(env: gym.Env[Any, Any], q_table: QTable) -> float:
    """The exact expected return of the greedy policy from state 0 within the time limit, step by step backwards."""
    model: Any = env.unwrapped.P  # type: ignore[attr-defined]
    assert env.spec is not None
    assert env.spec.max_episode_steps is not None
    values = np.zeros(len(model))
    for _ in range(env.spec.max_episode_steps):
        values = np.array(
            [
                sum(p * (r + (0.0 if end else values[s2])) for p, s2, r, end in model[s][int(q_table[s].argmax())])
                for s in range(len(model))
            ]
        )
    return float(values[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [42, 0, 1])
def test_frozen_lake_reaches_the_best_policy_there_is(seed: int) -> None:
    env = gym.make("FrozenLake-v1")
    learned = success_within_the_limit(env, train(dataclasses.replace(recipe("q-frozenlake"), seed=seed)))
    best = success_within_the_limit(env, value_iteration(env, 0.99))
    assert best == pytest.approx(0.7402, abs=1e-4)
    assert learned >= 0.74


@pytest.mark.parametrize("seed", [42, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 1))])
@pytest.mark.parametrize(
    ("name", "least"), [("q-cliffwalking", -13.0), pytest.param("q-taxi", 7.5, marks=pytest.mark.slow)]
)
def test_recipes(name: str, least: float, seed: int, tmp_path: Path) -> None:
    train(dataclasses.replace(recipe(name), seed=seed), run_dir=tmp_path / "run")
    result = evaluate(tmp_path / "run", episodes=200)
    assert result["mean_return"] >= least
    if name == "q-cliffwalking":
        assert set(result["returns"]) == {-13.0}


def test_a_policy_that_walks_in_circles_comes_to_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minirl.envs.make.LONGEST_EPISODE", 300)
    config = QLearningConfig(env_id="CliffWalking-v1", num_episodes=1, initial_value=0)
    train(config, run_dir=tmp_path / "run")
    assert max(evaluate(tmp_path / "run", episodes=2)["returns"]) <= -300, "a reward of -1 or less a step"
    assert gym.spec("minirl/GridWorld-v0").max_episode_steps == 1000
    assert time_limit(EnvSpec("Endless-v0", max_episode_steps=-1)) == 300, "Gymnasium's way to say that there is none"


# Run directory, resume, logs


def test_a_run_is_saved_logged_and_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    episodes: list[Played] = []

    def spy(*args: Any) -> Played:
        episodes.append(play_episode(*args))
        return episodes[-1]

    monkeypatch.setattr("minirl.q_learning.play_episode", spy)
    run_dir = tmp_path / "run"
    table = train(SHORT, run_dir=run_dir)
    saved = load_checkpoint(run_dir, "q_learning")
    assert torch.equal(saved["q_table"], torch.from_numpy(table))
    assert saved["episode"] == len(episodes) == 250
    assert saved["returns"] == [played.episodic_return for played in episodes[-100:]]
    events = EventAccumulator(str(run_dir))
    events.Reload()
    parts = [(episodes[end - 100 : end], end) for end in (100, 200, 250)]
    for i, (part, end) in enumerate(parts):
        returns, lengths, errors = (np.array(column) for column in zip(*part, strict=True))
        for tag, expected in [
            ("charts/episodic_return", returns.mean()),
            ("charts/episodic_length", lengths.mean()),
            ("losses/td_error", errors.sum() / lengths.sum()),
        ]:
            event = events.Scalars(tag)[i]
            assert event.value == pytest.approx(expected, rel=1e-6), tag
            assert event.step == sum(played.length for played in episodes[:end])
    evaluation.main([str(run_dir), "--episodes", "3", "--json"])
    assert json.loads(capsys.readouterr().out)["returns"] == [97.0, 97.0, 97.0]
    assert read_curve(run_dir, LOG_EVERY).mean_of_last().tolist() == pytest.approx(
        [np.mean([played.episodic_return for played in part]) for part, _ in parts]
    )


def test_the_td_errors_of_an_episode_are_summed_without_their_signs() -> None:
    class RightAndDown(random.Random):
        numbers = itertools.cycle([0.26, 0.51])

        def random(self) -> float:
            return next(self.numbers)

    played = play_episode(Guard(GridWorld()), np.zeros((9, 4)), RightAndDown(), 0.5, 0.99, 1.0, 10**9)
    # Right, down, right, down, ...: 1, blocked, 2, 5, blocked, goal
    # Right to 1 (-1), blocked below (-10), right to 2 (-1), down to 5 (-1), blocked at the edge (-10), the goal (100)
    assert played == Played(77.0, 6, 1 + 10 + 1 + 1 + 10 + 100)


@pytest.mark.parametrize("change", ["q_update", "epsilon_greedy"])
def test_who_changes_a_function_trains_with_the_changed_one(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def sarsa_like(*arguments: Any, **rates: Any) -> float:
        return 0.0  # learns nothing

    monkeypatch.setattr(q_learning, change, sarsa_like if change == "q_update" else lambda *_: 1)
    if change == "q_update":
        assert (train(SHORT) == SHORT.initial_value).all()
    else:
        learned = train(dataclasses.replace(SHORT, num_episodes=2))
        assert set(np.argwhere(learned != SHORT.initial_value)[:, 1]) == {1}, "only to the right"


def test_a_reward_that_is_no_number_ends_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    step = GridWorld.step
    monkeypatch.setattr(GridWorld, "step", lambda env, action: (step(env, action)[0], np.nan, *step(env, action)[2:]))
    with pytest.raises(DivergedError, match="losses/td_error is nan in episode 1;"):
        train(SHORT)


@pytest.mark.parametrize("env_id", ["minirl/GridWorld-v0", "FrozenLake-v1"])
def test_a_stopped_and_resumed_run_is_the_run_that_was_left_alone(env_id: str, tmp_path: Path) -> None:
    config = QLearningConfig(
        env_id=env_id, num_episodes=1500, epsilon=1.0, anneal_alpha=True, anneal_epsilon=True, checkpoint_frequency=3000
    )
    expected = train(config, run_dir=tmp_path / "whole")
    assert (expected != config.initial_value).sum() >= 8

    count = itertools.count()

    def interrupted(*args: Any) -> Played:
        if next(count) == 950:
            signal.raise_signal(signal.SIGINT)
        return play_episode(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("minirl.q_learning.play_episode", interrupted)
        train(config, run_dir=tmp_path / "stopped")
    assert load_checkpoint(tmp_path / "stopped", "q_learning")["episode"] == 951
    resumed = train(config, run_dir=tmp_path / "stopped", resume=True)
    np.testing.assert_array_equal(resumed, expected)
    whole, stopped = (load_checkpoint(tmp_path / name, "q_learning") for name in ("whole", "stopped"))
    assert_same(whole, stopped)
    curves = [read_curve(tmp_path / name, LOG_EVERY) for name in ("whole", "stopped")]
    assert curves[0].returns.tolist() == curves[1].returns.tolist()
    assert len(curves[0].returns) == 15


def test_checkpoints_come_every_so_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves: list[int] = []

    def spy(path: Path, state: dict[str, Any]) -> None:
        saves.append(state["global_step"])

    monkeypatch.setattr("minirl.runs.run.save_checkpoint", spy)
    train(dataclasses.replace(SHORT, checkpoint_frequency=400), run_dir=tmp_path / "run")
    assert saves[0] == 0
    assert len(saves) >= 4
    assert all(400 <= later - earlier < 600 for earlier, later in itertools.pairwise(saves[:-1]))


@pytest.mark.slow
def test_the_script_prints_the_tables_and_goes_on_with_more_episodes(tmp_path: Path) -> None:
    def script(*arguments: str) -> str:
        command = [sys.executable, str(ROOT / "train_q.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    printed = script()
    assert printed == f"\n{DETAILED}\n\n{BEST}\n"
    (run_dir,) = (tmp_path / "runs" / "q_learning" / "minirl-GridWorld-v0").iterdir()
    assert script("--resume", str(run_dir), "--num-episodes", "10100") == printed
    assert load_checkpoint(run_dir, "q_learning")["episode"] == 10_100
    assert script("--env-id", "Taxi-v4", "--num-episodes", "50").startswith("Q-table: 500 states x 6 actions; ")


def test_a_wrapper_that_an_environment_is_registered_with_is_below_no_other_time_limit() -> None:
    env, steps, ended = make_bare_env("tests.own_envs:RepeatsTable-v0"), 0, False
    env.reset(seed=0)
    while not ended and steps < 10:
        ended, steps = env.step(0)[3], steps + 1
    assert steps == 2, "eight steps of the environment, four at a time"


def test_fewer_episodes_than_are_done_are_refused(tmp_path: Path) -> None:
    train(SHORT, run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="--num-episodes must be at least the 250 episodes already done"):
        train(dataclasses.replace(SHORT, num_episodes=100), run_dir=tmp_path / "run", resume=True)


def test_another_environments_table_is_refused(tmp_path: Path) -> None:
    train(SHORT, run_dir=tmp_path / "run")
    save_config(tmp_path / "run", "q_learning", dataclasses.replace(SHORT, env_id="Taxi-v4"))
    with pytest.raises(ConfigError, match=r"checkpoint\.pt must .*the environment has \(500, 6\)"):
        evaluate(tmp_path / "run", episodes=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--alpha 0", "--alpha must be a number above 0 and of at most 1, not 0.0"),
        ("--alpha 2", "--alpha must be a number above 0 and of at most 1, not 2.0"),
        ("--alpha nan", "--alpha must be"),
        ("--epsilon 1.2", "--epsilon must be a number from 0 to 1, not 1.2"),
        ("--epsilon -0.1", "--epsilon must be a number from 0 to 1, not -0.1"),
        ("--gamma 1.01", "--gamma must be"),
        ("--num-episodes 0", "--num-episodes must be a whole number of at least 1, not 0"),
        ("--env-id CartPole-v1", "--env-id must have Discrete observations that count from 0 for a Q-table"),
        ("--env-id Pendulum-v1", "--env-id must have Discrete observations"),
        ("--env-id NChain-v0", "--env-id must be an environment that Gymnasium can make"),
        ("--env-id tests.fake_envs:SixActions-v0", "--env-id must have Discrete observations"),
        ("--device tpu", "--device must be"),
        ("--resume nowhere", "nowhere must be a run directory"),
        ("--resume ppo", "ppo is one of ppo"),
    ],
)
def test_mistakes(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ppo").mkdir()
    save_config(tmp_path / "ppo", "ppo", SHORT)
    with pytest.raises(SystemExit) as stop:
        run_training("q_learning", QLearningConfig, train, "", line.split())
    output = capsys.readouterr()
    assert (stop.value.code, output.out) == (2, "")
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert message in output.err
    assert not (tmp_path / "runs").exists()


# What is printed

DETAILED = """\
Detailed Q-table Grid:
   |   (0,0)   |   (0,1)   |   (0,2)   |   (1,0)   |   (1,1)   |   (1,2)   |   (2,0)   |   (2,1)   |   (2,2)   |
----------------------------------------------------------------------------------------------------------------
 ^ |     83.12 |     85.06 |     87.02 |     92.12 | OBSTACLE  |     96.02 |     94.06 |     89.00 |   GOAL    |
----------------------------------------------------------------------------------------------------------------
 > |     94.06 |     96.02 |     87.02 |     85.06 | OBSTACLE  |     89.00 |     98.00 |    100.00 |   GOAL    |
----------------------------------------------------------------------------------------------------------------
 v |     94.06 |     85.06 |     98.00 |     96.02 | OBSTACLE  |    100.00 |     87.02 |     89.00 |   GOAL    |
----------------------------------------------------------------------------------------------------------------
 < |     83.12 |     92.12 |     94.06 |     85.06 | OBSTACLE  |     89.00 |     87.02 |     96.02 |   GOAL    |
----------------------------------------------------------------------------------------------------------------"""

BEST = """\
Best Actions Grid:
-------------------------------------------
| >:  94.06   | >:  96.02   | v:  98.00   |\x20
-------------------------------------------
| v:  96.02   |  OBSTACLE   | v: 100.00   |\x20
-------------------------------------------
| >:  98.00   | >: 100.00   |    GOAL     |\x20
-------------------------------------------"""


def test_the_tables_are_the_notebooks() -> None:
    """The first as the notebook's output shows it; the second as its code prints it."""
    q_star = value_iteration(GridWorld(), 0.99)
    assert detailed_grid(q_star, GridWorld()) == DETAILED
    assert best_actions_grid(q_star, GridWorld()) == BEST


def test_other_environments_get_a_summary() -> None:
    table = np.full((500, 3), 100.0)
    table[:4] = [[1, 2, 0], [3, -1, 0], [0, 4, 1], [0, 9, 0]]
    assert summary(table).splitlines() == [
        "Q-table: 500 states x 3 actions; 4 states have learned values.",
        "",
        "action   best in states   mean value there   highest   lowest",
        "     0                1              3.00      3.00     3.00",
        "     1                3              5.00      9.00     2.00",
        "     2                0",
    ]
