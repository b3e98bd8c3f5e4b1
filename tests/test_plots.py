"""Learning curves and pictures of runs: what the artists on them say."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver

from minirl import plots
from minirl.checkpoints import load_checkpoint
from minirl.config import ConfigError
from minirl.dqn import DQNConfig, QNetwork
from minirl.dqn import train as train_dqn
from minirl.envs.gridworld import GridWorld
from minirl.envs.make import make_env
from minirl.envs.vector import Episode
from minirl.plots import Curve, curves_figure, read_curve
from minirl.plots.curves import group_by_seed, labels, mean_and_range
from minirl.plots.of_run import draw_picture, grid_of, preprocessing
from minirl.plots.pictures import Moment, action_probabilities_figure, policy_map_figure, q_values_figure
from minirl.ppo import ActorCritic, PPOConfig
from minirl.ppo import train as train_ppo
from minirl.q_learning import QLearningConfig, value_iteration
from minirl.q_learning import train as train_q
from minirl.runs import Run, load_settings, save_config
from tests.test_runs import Bomb

PICTURES = ("q-values", "policy-map", "action-probabilities", "preprocessing")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of small runs: `grid`, `dqn`, `ppo` (both on CartPole) and `breakout`."""
    path = tmp_path_factory.mktemp("runs")
    train_q(QLearningConfig(num_episodes=300), run_dir=path / "grid")
    steps = {"total_timesteps": 1500, "learning_starts": 200, "eval_frequency": 500, "eval_episodes": 2}
    train_dqn(DQNConfig(**steps, compile=False), run_dir=path / "dqn", device="cpu")
    train_ppo(
        PPOConfig(env_id="CartPole-v1", num_steps=32, total_timesteps=4096, learning_rate=3e-3),
        run_dir=path / "ppo",
        device="cpu",
    )
    tiny: dict[str, Any] = {"num_envs": 1, "num_steps": 8, "minibatch_size": 8, "update_epochs": 4}
    config = PPOConfig(env_id="BreakoutNoFrameskip-v4", total_timesteps=8, learning_rate=0.003, **tiny)
    train_ppo(config, run_dir=path / "breakout", device="cpu")
    return path


# Curves


def test_a_curve_joins_the_sessions_of_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("minirl.runs.time.monotonic", lambda: now[0])
    config = PPOConfig(checkpoint_frequency=20)

    def play(run: Run, steps: list[int], value: float) -> None:
        for step in steps:
            now[0] += 60
            run.log_episodes(step - 5, [Episode(0, value, 5)])
            run.log(step, {})
            run.checkpoint(step, dict)

    with Run("ppo", config, tmp_path / "run", total=100) as run:
        play(run, [10, 20, 30], -20.0)  # saved at 20, killed after 30
    now[0] += 10_000
    time.sleep(1.1)  # TensorBoard names its files by the second
    saved = load_checkpoint(tmp_path / "run", "ppo")
    assert saved["global_step"] == 20
    with Run("ppo", config, tmp_path / "run", total=100, done=20, resumed=saved) as run:
        play(run, [30, 40], -10.0)
    curve = read_curve(tmp_path / "run")
    assert labels([[curve]]) == ["ppo PongNoFrameskip-v4, seed 42"]
    assert curve.steps.tolist() == [5, 15, 25, 35]
    assert curve.returns.tolist() == [-20, -20, -10, -10]
    assert curve.minutes.tolist() == pytest.approx([0.5, 1.5, 2.5, 3.5])


def test_the_mean_of_the_last_episodes() -> None:
    returns = np.array([1.0, 3.0, 8.0, 4.0])
    curve = Curve({}, np.arange(4), np.arange(4.0), returns)
    assert curve.mean_of_last(2).tolist() == [1.0, 2.0, 5.5, 6.0]
    assert curve.mean_of_last(100).tolist() == [1.0, 2.0, 4.0, 4.0]


def curve_of(seed: int, returns: list[float], steps: list[int], **settings: Any) -> Curve:
    """Ten steps a minute."""
    common = {"algorithm": "ppo", "env_id": "CartPole-v1", "seed": seed, "gamma": 0.9, "num_workers": 1, **settings}
    return Curve(common, np.array(steps), np.array(steps) / 10, np.array(returns))


def test_runs_that_differ_in_the_seed_only_are_a_group() -> None:
    one, two = curve_of(1, [0], [1]), curve_of(2, [0], [1], num_workers=7)
    other_gamma, other_algorithm = curve_of(3, [0], [1], gamma=0.5), curve_of(4, [0], [1], algorithm="dqn")
    groups = group_by_seed([one, other_gamma, two, other_algorithm])
    assert groups == [[one, two], [other_gamma], [other_algorithm]]
    assert labels(groups) == [
        "ppo CartPole-v1, gamma 0.9, 2 seeds",
        "ppo CartPole-v1, gamma 0.5, seed 3",
        "dqn CartPole-v1, seed 4",
    ]
    assert labels([[one, one, two]]) == ["ppo CartPole-v1, 3 runs"], "they are no three seeds"


def test_the_mean_goes_as_far_as_all_curves() -> None:
    xs = [np.array([0, 10, 20]), np.array([5, 15, 35])]
    ys = [np.array([0.0, 10.0, 0.0]), np.array([3.0, 13.0, 33.0])]
    # At 5, 10, 15, 20: 5, 10, 5, 0 and 3, 8, 13, 18
    for result, expected in zip(
        mean_and_range(xs, ys, points=4),
        [[5, 10, 15, 20], [4, 9, 9, 9], [3, 8, 5, 0], [5, 10, 13, 18]],
        strict=True,
    ):
        assert result.tolist() == pytest.approx(expected)


def test_the_figure_shows_each_group_and_its_band() -> None:
    figure = curves_figure(
        [
            curve_of(1, [0.0, 20.0], [10, 30]),
            curve_of(7, [5.0, 5.0, 8.0], [10, 20, 30], algorithm="dqn"),
            curve_of(2, [8.0, 8.0], [10, 30]),
        ]
    )
    by_steps, by_minutes = figure.axes
    assert (by_steps.get_xlabel(), by_minutes.get_xlabel()) == ("agent steps", "minutes of training")
    assert by_steps.get_ylabel() == "return, mean of the last 100 games"
    for axes, ends in [(by_steps, (10, 30)), (by_minutes, (1, 3))]:
        mean, single = (np.asarray(line.get_data(), float) for line in axes.lines)
        assert (mean[0, 0], mean[0, -1]) == pytest.approx(ends)
        assert (mean[1, 0], mean[1, -1]) == pytest.approx((4.0, 9.0))  # of 0 and 8; of 10 and 8
        assert single[1].tolist() == [5.0, 5.0, 6.0]
        (band,) = axes.collections
        assert isinstance(band, PolyCollection)
        corners = band.get_paths()[0].vertices
        assert isinstance(corners, np.ndarray)
        for end, low_and_high in zip(ends, ((0.0, 8.0), (8.0, 10.0)), strict=True):
            at_end = corners[np.isclose(corners[:, 0], end), 1]
            assert (at_end.min(), at_end.max()) == pytest.approx(low_and_high)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ppo CartPole-v1, 2 seeds", "dqn CartPole-v1, seed 7"]
    assert "minimum to maximum" in figure.get_suptitle()
    assert len({str(line.get_color()) for line in by_steps.lines}) == 2


def test_one_axis_may_be_chosen_and_a_single_run_has_no_band() -> None:
    figure = curves_figure([curve_of(1, [0.0, 20.0], [10, 30])], "minutes")
    (axes,) = figure.axes
    assert axes.get_xlabel() == "minutes of training"
    assert list(axes.collections) == []
    assert figure.get_suptitle() == "Return in training, CartPole-v1"


def test_plots_writes_a_picture(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plots.main([str(runs / "ppo"), str(runs / "ppo"), str(runs / "dqn"), "--output", str(tmp_path / "curve")])
    output = capsys.readouterr()
    assert output.out == f"{tmp_path / 'curve.png'}\n"
    assert "2 of 2 runs" in output.err, "a run that is named twice is one"
    picture = cv2.imread(str(tmp_path / "curve.png"))
    assert picture is not None
    assert picture.shape[1] == 1800
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10, "not empty"


# Q-values


@pytest.mark.parametrize("env_id", ["minirl/GridWorld-v0", "CliffWalking-v1", "FrozenLake-v1", "FrozenLake8x8-v1"])
def test_a_grid_lies_as_the_environment_moves(env_id: str) -> None:
    options = {"is_slippery": False} if "Frozen" in env_id else {}
    env: Any = gym.make(env_id, **options).unwrapped
    grid = grid_of(env)
    assert grid is not None
    goals = set()
    for state, actions in env.P.items():
        for action, ((_, next_state, _, terminated),) in actions.items():
            step = np.subtract(divmod(next_state, grid.columns), divmod(state, grid.columns))
            if next_state != state and "CLIFF" not in (grid.names.get(state), _below(grid.names, state, grid.columns)):
                assert tuple(step) == grid.moves[action]
            if terminated and next_state != state and grid.names.get(next_state) != "HOLE":
                goals.add(next_state)
    assert [state for state, name in grid.names.items() if name == "GOAL"] == list(goals)
    assert grid.names[env.reset()[0]] == "START"


def _below(names: dict[int, str], state: int, columns: int) -> str | None:
    """What is below a state or, at the start of CliffWalking, to its right: a step there goes back to the start."""
    return names.get(state + columns) or names.get(state + 1)


def test_the_arrows_of_a_q_table_lead_to_the_goal() -> None:
    env = GridWorld(size=4, goal=(0, 3), obstacles=((0, 1), (1, 1), (1, 3), (2, 3)))
    grid = grid_of(env)
    assert grid is not None
    figure = q_values_figure(value_iteration(env, 0.9), grid, "title")
    policy = figure.axes[1]
    (arrows,) = (artist for artist in policy.collections if isinstance(artist, Quiver))
    assert policy.yaxis_inverted(), "row 0 is at the top, and so a positive V points down"
    middles = np.stack([arrows.Y + np.asarray(arrows.V) / 2, arrows.X + np.asarray(arrows.U) / 2]).T
    moves = {
        (round(float(row)), round(float(column))): (np.sign(v), np.sign(u))
        for (row, column), u, v in zip(middles, np.asarray(arrows.U), np.asarray(arrows.V), strict=True)
    }
    assert len(moves) == 16 - 5, "none on obstacles or the goal"
    cell, path = (0, 0), []
    while cell != (0, 3):
        path.append(cell)
        cell = (cell[0] + int(moves[cell][0]), cell[1] + int(moves[cell][1]))
    # Down the left side, right below the obstacles, up the column between them
    assert path == [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (1, 2), (0, 2)]


def test_each_value_stands_on_the_side_that_its_action_goes_to() -> None:
    q_table = np.zeros((4, 4))
    q_table[1] = [1.25, -2.5, 30.0, 4.0]
    grid = grid_of(GridWorld(size=2, goal=(1, 1), obstacles=()))
    assert grid is not None
    values, policy, bar = q_values_figure(q_table, grid, "title").axes
    texts = {text.get_text(): (text, *text.get_position()) for text in values.texts}
    assert set(texts) == {"1.25", "-2.50", "30.00", "4.00", "goal"}, "what is not learned stays empty"
    for name, side in [("1.25", (0, -1)), ("-2.50", (1, 0)), ("30.00", (0, 1)), ("4.00", (-1, 0))]:
        text, x, y = texts[name]
        assert (np.sign(x - 1), np.sign(y)) == side  # state 1 is in column 1, row 0
        assert abs(x - 1) + abs(y) < 0.5
        assert (text.get_fontweight() == "bold") == (name == "30.00")
    assert [text.get_text() for text in policy.texts] == ["goal", "30.00"]
    assert bar.get_ylabel() == "Q(s, a), discounted return"


def test_a_run_on_the_grid_shows_its_own_table(runs: Path) -> None:
    figure = draw_picture("q-values", runs / "grid")
    table = load_checkpoint(runs / "grid", "q_learning")["q_table"].numpy()
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(texts) == sorted(
        [*(f"{q:.2f}" for state in (0, 1, 2, 3, 5, 6, 7) for q in table[state]), "obstacle", "goal"]
    )
    assert figure.get_suptitle() == "Q-table of q_learning on minirl/GridWorld-v0, seed 42"


# Policy map


def test_the_map_is_blue_where_the_policy_pushes_left() -> None:
    actions = np.array([[0, 0, 1], [0, 1, 1]])
    game = np.array([[0.5, 2.0, 0], [1.0, 3.0, 1]])
    figure = policy_map_figure(np.array([-1.0, 0.0, 1.0]), np.array([-5.0, 5.0]), actions, game, "title")
    (axes,) = figure.axes
    (image,) = axes.images
    assert np.asarray(image.get_array()).tolist() == actions.tolist()
    assert image.origin == "lower", "the first row is the lowest velocity"
    assert image.get_extent() == pytest.approx((-1.5, 1.5, -10, 10))
    blue, red = (image.cmap(image.norm(action)) for action in (0, 1))
    assert blue[2] > blue[0] + 0.3
    assert red[0] > red[2] + 0.3
    (dots,) = axes.collections
    assert np.asarray(dots.get_offsets()).tolist() == game[:, :2].tolist()
    assert np.asarray(dots.get_facecolor()).tolist() == [list(blue), list(red)]
    assert "degrees" in axes.get_xlabel()
    assert "degrees per second" in axes.get_ylabel()


@pytest.mark.parametrize("algorithm", ["dqn", "ppo"])
def test_the_map_of_a_run_shows_what_its_network_prefers(algorithm: str, runs: Path) -> None:
    figure = draw_picture("policy-map", runs / algorithm, "cpu")
    (axes,) = figure.axes
    shown = np.asarray(axes.images[0].get_array())
    env = gym.make("CartPole-v1")
    network: Any
    if algorithm == "dqn":
        network = QNetwork(env.observation_space, 2)
        network.load_state_dict(load_checkpoint(runs / "dqn", "dqn", file="best.pt")["model"])
    else:
        network = ActorCritic(env.observation_space, env.action_space)
        network.load_state_dict(load_checkpoint(runs / "ppo", "ppo")["model"])
    rng = np.random.default_rng(0)
    rows, columns = rng.integers(0, 401, (2, 500))
    degrees = np.stack([-12 + 24 * columns / 400, -100 + 200 * rows / 400])
    states = torch.zeros(500, 4)
    states[:, 2:] = torch.from_numpy(np.deg2rad(degrees).T)
    with torch.no_grad():
        output = network(states)
    scores = output if algorithm == "dqn" else output[0].logits
    clear = (scores[:, 0] - scores[:, 1]).abs() > 1e-4
    assert clear.sum() > 400
    assert shown[rows, columns][clear].tolist() == scores.argmax(dim=1)[clear].tolist()
    assert 0 < shown.mean() < 1, "both actions"
    assert len(axes.collections[0].get_offsets()) >= 8, "a whole game"


# Action probabilities


def bars_of(figure: Figure, column: int, columns: int) -> tuple[list[float], list[str], Any]:
    axes, screen = figure.axes[column], figure.axes[columns + column]
    (bars,) = (container for container in axes.containers if isinstance(container, BarContainer))
    return [bar.get_width() for bar in bars], [text.get_text() for text in axes.texts], screen.images[0].get_array()


def test_bars_stand_over_their_frame_with_the_actions_names() -> None:
    frame = np.arange(4 * 3 * 3, dtype=np.uint8).reshape(4, 3, 3)
    figure = action_probabilities_figure(
        [Moment(3, frame, np.array([0.125, 0.75, 0.125]), "sure"), Moment(9, frame + 1, np.full(3, 1 / 3), "not")],
        ["NOOP", "FIRE", "RIGHT"],
        "title",
    )
    widths, texts, screen = bars_of(figure, 0, 2)
    assert widths == [0.125, 0.75, 0.125]
    assert texts == ["12.5%", "75.0%", "12.5%"]
    assert screen.tolist() == frame.tolist()
    assert bars_of(figure, 1, 2)[2].tolist() == (frame + 1).tolist()
    bars, bars_2, below, below_2 = figure.axes
    assert [label.get_text() for label in bars.get_yticklabels()] == ["NOOP", "FIRE", "RIGHT"]
    assert bars.yaxis_inverted(), "the first action is at the top"
    assert (bars.get_title(), bars_2.get_title()) == ("sure", "not")
    assert (below.get_xlabel(), below_2.get_xlabel()) == ("agent step 3 of the game", "agent step 9 of the game")
    colours = [to_rgb(bar.get_facecolor()) for bar in bars.patches]
    assert colours[0] == colours[2] != colours[1], "the likeliest stands out"


def test_the_bars_of_a_run_are_the_softmax_of_its_network(runs: Path) -> None:
    figure = draw_picture("action-probabilities", runs / "breakout", "cpu")
    env = make_env("BreakoutNoFrameskip-v4", render_mode="rgb_array")
    agent = ActorCritic(env.observation_space, env.action_space)
    agent.load_state_dict(load_checkpoint(runs / "breakout", "ppo")["model"])
    game: Any = env.unwrapped
    obs, _ = env.reset(seed=42)
    seen = []
    for _ in range(300):
        with torch.no_grad():
            logits = agent.actor(agent.actor_body(torch.from_numpy(obs)[None]))[0].double().numpy()
        odds = np.exp(logits - logits.max())
        seen.append((game.render(), odds / odds.sum()))
        obs, _, terminated, truncated, info = env.step(int(logits.argmax()))
        if terminated or truncated:
            assert "episode" not in info, "300 steps are within a game of a network that does nothing"
            obs, _ = env.reset()
    entropies = [float(-(p * np.log(p)).sum()) for _, p in seen]
    for column, rank in enumerate([0, 150, 299]):
        widths, _, screen = bars_of(figure, column, 3)
        step = int(figure.axes[3 + column].get_xlabel().split()[2])
        frame, probabilities = seen[step]
        assert widths == pytest.approx(probabilities, abs=1e-6)
        np.testing.assert_array_equal(screen, frame)
        assert entropies[step] == pytest.approx(sorted(entropies)[rank], abs=1e-6)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["NOOP", "FIRE", "RIGHT", "LEFT"]


# Preprocessing


def test_the_stages_of_the_preprocessing_follow_from_each_other(runs: Path) -> None:
    stages = preprocessing(load_settings(runs / "breakout"))
    assert (stages.raw.shape, stages.stack.shape) == ((210, 160, 3), (4, 84, 84))
    np.testing.assert_allclose(stages.gray, stages.raw @ [0.299, 0.587, 0.114], atol=0.6)
    area = cv2.resize(stages.raw @ np.array([0.299, 0.587, 0.114]), (84, 84), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(stages.resized, area, atol=1.1)
    np.testing.assert_array_equal(stages.resized, stages.stack[-1])
    for earlier, later in zip(stages.stack, stages.stack[1:], strict=False):
        assert (earlier != later).any(), "something moves in each step"

    figure = draw_picture("preprocessing", runs / "breakout")
    pictures = [axes.images[0].get_array() for axes in figure.axes]
    for shown, expected in zip(pictures, [stages.raw, stages.gray, stages.resized, *stages.stack], strict=True):
        np.testing.assert_array_equal(np.asarray(shown), expected)
    assert [axes.get_xlabel() for axes in figure.axes[:3]] == [
        "210 x 160 pixels, 3 colours",
        "210 x 160 pixels",
        "84 x 84 pixels",
    ]


# The command


@pytest.mark.parametrize(
    ("run", "kind"), [("grid", "q-values"), ("dqn", "policy-map"), ("breakout", "preprocessing"), ("ppo", "curves")]
)
def test_the_command_writes_into_the_run_unless_told_otherwise(
    run: str, kind: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / run, tmp_path / "run")
    plots.main([str(tmp_path / "run"), "--kind", kind])
    written = tmp_path / "run" / ("curve.png" if kind == "curves" else f"{kind}.png")
    assert capsys.readouterr().out == f"{written}\n"
    picture = cv2.imread(str(written))
    assert picture is not None
    assert picture.std() > 50
    assert picture.shape[1] >= 1200, "200 dots per inch"


@pytest.mark.parametrize("kind", ["curves", *PICTURES])
def test_plots_without_matplotlib_say_how_to_get_it(
    kind: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    fitting = dict(zip(PICTURES, ["grid", "dqn", "breakout", "breakout"], strict=True)).get(kind, "ppo")
    with pytest.raises(SystemExit) as stop:
        plots.main([str(runs / fitting), "--kind", kind])
    message = "error: plots need matplotlib, the extra `plot`: pip install -e '.[plot]'\n"
    assert (stop.value.code, capsys.readouterr().err) == (2, message)


@pytest.mark.parametrize("kind", ["curves", *PICTURES])
def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(
    kind: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitting = dict(zip(PICTURES, ["grid", "dqn", "breakout", "breakout"], strict=True)).get(kind, "ppo")
    shutil.copytree(runs / fitting, tmp_path / "run")
    for file in ("checkpoint.pt", "best.pt"):
        torch.save({"algorithm": "ppo", "bomb": Bomb(tmp_path / "exploded")}, tmp_path / "run" / file)
    arguments = [str(tmp_path / "run"), "--kind", kind]
    if kind in ("curves", "preprocessing"):  # which read no checkpoint
        plots.main(arguments)
    else:
        with pytest.raises(SystemExit) as stop:
            plots.main(arguments)
        assert stop.value.code == 2
        assert "must be a checkpoint that minirl wrote" in capsys.readouterr().err
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nowhere", "nowhere must be a run directory"),
        ("nowhere --kind q-values", "nowhere must be a run directory"),
        ("empty", "empty must hold TensorBoard events of at least one finished episode"),
        ("empty --kind policy-map", "there is no checkpoint here"),
        ("{runs}/ppo --output no/such/dir.png", "--output must be a picture that can be written"),
        ("{runs}/ppo --output curve.xyz", "--output must be a picture that can be written"),
        ("{runs}/ppo --kind pie", "--kind: invalid choice: 'pie'"),
        ("{runs}/ppo --x hours", "--x: invalid choice: 'hours'"),
        ("{runs}/ppo {runs}/dqn --kind policy-map", "--kind policy-map must go with one RUN_DIR, not 2"),
        (
            "{runs}/ppo --kind q-values",
            "needs a run of q_learning on a grid (GridWorld, FrozenLake, CliffWalking), and ",
        ),
        ("taxi --kind q-values", "--kind q-values needs a run of q_learning on a grid"),
        ("{runs}/breakout --kind policy-map", "is one of ppo on BreakoutNoFrameskip-v4"),
        ("{runs}/grid --kind policy-map", "needs a run of dqn or ppo on CartPole, and"),
        ("{runs}/grid --kind action-probabilities", "needs a run of ppo on an Atari game, and"),
        ("{runs}/dqn --kind action-probabilities", "is one of dqn on CartPole-v1"),
        ("{runs}/ppo --kind preprocessing", "needs a run of dqn or ppo on an Atari game, and"),
        ("gone --kind preprocessing", "--env-id must be an environment that Gymnasium can make"),
    ],
)
def test_plots_mistakes(
    line: str,
    message: str,
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, algorithm, config in [
        ("empty", "ppo", PPOConfig(env_id="CartPole-v1")),
        ("taxi", "q_learning", QLearningConfig(env_id="Taxi-v4")),
        ("gone", "ppo", PPOConfig(env_id="Gone-v1")),
    ]:
        (tmp_path / name).mkdir()
        save_config(tmp_path / name, algorithm, config)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        plots.main(line.format(runs=runs).split())
    output = capsys.readouterr()
    assert (stop.value.code, output.out) == (2, "")
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert message in output.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_picture_that_cannot_be_drawn_is_an_error_and_not_a_default(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"algorithm": "ppo", "env_id": "CartPole-v1", "seed": 1}))
    with pytest.raises(ConfigError, match="--kind q-values needs a run of q_learning"):
        draw_picture("q-values", tmp_path / "run")
