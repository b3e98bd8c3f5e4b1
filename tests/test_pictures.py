"""Pictures of what was learned and of observations: their matplotlib artists agree with the tables and networks."""

from pathlib import Path
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver

from minirl.dqn import QNetwork
from minirl.envs.gridworld import GridWorld
from minirl.envs.make import make_env
from minirl.plots.of_run import draw_picture, fitting_kinds, grid_of, preprocessing
from minirl.ppo import ActorCritic
from minirl.q_learning import value_iteration
from minirl.results.pictures import Moment, action_probabilities_figure, policy_map_figure, q_values_figure
from minirl.results.tables import describe
from minirl.runs.checkpoints import load_checkpoint
from minirl.runs.directory import load_settings

# Q-values


@pytest.mark.parametrize("env_id", ["minirl/GridWorld-v0", "CliffWalking-v1", "FrozenLake-v1", "FrozenLake8x8-v1"])
def test_a_grid_lies_as_the_environment_moves(env_id: str) -> None:
    options = {"is_slippery": False} if "Frozen" in env_id else {}
    env: Any = gym.make(env_id, **options).unwrapped
    grid = grid_of(env)
    assert grid is not None
    goals = set()
    for state, actions in env.P.items():
        for action, ((_, next_state, reward, terminated),) in actions.items():
            goes_back = reward == -100 or grid.names.get(state) == "CLIFF"
            if next_state != state and not goes_back:
                step = np.subtract(divmod(next_state, grid.columns), divmod(state, grid.columns))
                assert tuple(step) == grid.moves[action]
            if next_state != state and terminated and grid.names.get(next_state) != "HOLE":
                goals.add(next_state)
    assert [state for state, name in grid.names.items() if name == "GOAL"] == list(goals)
    assert grid.names[env.reset()[0]] == "START"


def test_the_arrows_of_a_q_table_lead_to_the_goal() -> None:
    env = GridWorld(size=4, goal=(0, 3), obstacles=((0, 1), (1, 1), (1, 3), (2, 3)))
    grid = grid_of(env)
    assert grid is not None
    figure = q_values_figure(value_iteration(env, 0.9), grid, "title")
    policy = figure.axes[1]
    (arrows,) = (artist for artist in policy.collections if isinstance(artist, Quiver))
    assert policy.yaxis_inverted(), "row 0 is at the top, and so a positive V points down"
    x, y, u, v = (np.asarray(part) for part in (arrows.X, arrows.Y, arrows.U, arrows.V))
    rows, columns = np.rint(y + v / 2).astype(int).tolist(), np.rint(x + u / 2).astype(int).tolist()
    moves = dict(zip(zip(rows, columns, strict=True), zip(np.sign(v), np.sign(u), strict=True), strict=True))
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


def test_a_run_on_the_grid_shows_its_own_table(small_runs: Path) -> None:
    figure = draw_picture("q-values", small_runs / "grid")
    table = load_checkpoint(small_runs / "grid", "q_learning")["q_table"].numpy()
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
    mesh, dots = axes.collections
    assert isinstance(mesh, QuadMesh)
    assert np.asarray(mesh.get_array()).tolist() == actions.tolist()
    first, *_, last = np.asarray(mesh.get_coordinates()).reshape(-1, 2).tolist()
    assert (first, last) == ([-1.5, -10], [1.5, 10]), "the first row is the lowest velocity"
    blue, red = (mesh.to_rgba(np.array([action]))[0] for action in (0, 1))
    assert blue[2] > blue[0] + 0.3
    assert red[0] > red[2] + 0.3
    assert np.asarray(dots.get_offsets()).tolist() == game[:, :2].tolist()
    assert np.asarray(dots.get_facecolor()).tolist() == [list(blue), list(red)]
    assert "degrees" in axes.get_xlabel()
    assert "degrees per second" in axes.get_ylabel()


@pytest.mark.parametrize("algorithm", ["dqn", "ppo"])
def test_the_map_of_a_run_shows_what_its_network_prefers(algorithm: str, small_runs: Path, device: str) -> None:
    figure = draw_picture("policy-map", small_runs / algorithm, device)
    (axes,) = figure.axes
    shown = np.asarray(axes.collections[0].get_array())
    env = gym.make("CartPole-v1")
    network: Any
    if algorithm == "dqn":
        network = QNetwork(env.observation_space, 2)
        network.load_state_dict(load_checkpoint(small_runs / "dqn", "dqn", file="best.pt")["model"])
    else:
        network = ActorCritic(env.observation_space, env.action_space)
        network.load_state_dict(load_checkpoint(small_runs / "ppo", "ppo")["model"])
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
    assert len(np.asarray(axes.collections[1].get_offsets())) >= 8, "a whole game"


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


def test_the_bars_of_a_run_are_the_softmax_of_its_network(small_runs: Path, device: str) -> None:
    figure = draw_picture("action-probabilities", small_runs / "breakout", device)
    env = make_env("BreakoutNoFrameskip-v4", render_mode="rgb_array", frame_size=42)
    agent = ActorCritic(env.observation_space, env.action_space)
    agent.load_state_dict(load_checkpoint(small_runs / "breakout", "ppo")["model"])
    game: Any = env.unwrapped
    obs, info = env.reset(seed=42)
    seen: list[tuple[Any, Any]] = []
    while len(seen) < 300 and "episode" not in info:
        with torch.no_grad():
            logits = agent.actor(agent.actor_body(torch.from_numpy(obs)[None]))[0].double().numpy()
        odds = np.exp(logits - logits.max())
        seen.append((game.render(), odds / odds.sum()))
        obs, _, terminated, truncated, info = env.step(int(logits.argmax()))
        if (terminated or truncated) and "episode" not in info:
            obs, info = env.reset()
    rounding = 1e-6 if device == "cpu" else 1e-4
    entropies = [float(-(p * np.log(p)).sum()) for _, p in seen]
    for column, rank in enumerate([0, len(seen) // 2, -1]):
        widths, _, screen = bars_of(figure, column, 3)
        step = int(figure.axes[3 + column].get_xlabel().split()[2])
        frame, probabilities = seen[step]
        assert widths == pytest.approx(probabilities, abs=rounding)
        np.testing.assert_array_equal(screen, frame)
        assert entropies[step] == pytest.approx(sorted(entropies)[rank], abs=rounding)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["NOOP", "FIRE", "RIGHT", "LEFT"]


# Preprocessing


def test_the_stages_of_the_preprocessing_follow_from_each_other(small_runs: Path) -> None:
    stages = preprocessing(load_settings(small_runs / "breakout"))
    assert (stages.raw.shape, stages.stack.shape) == ((210, 160, 3), (4, 42, 42))
    np.testing.assert_allclose(stages.gray, stages.raw @ [0.299, 0.587, 0.114], atol=0.6)
    area = cv2.resize(stages.raw @ np.array([0.299, 0.587, 0.114]), (42, 42), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(stages.resized, area, atol=1.1)
    np.testing.assert_array_equal(stages.resized, stages.stack[-1])
    for earlier, later in zip(stages.stack, stages.stack[1:], strict=False):
        assert (earlier != later).any(), "something moves in each step"

    figure = draw_picture("preprocessing", small_runs / "breakout")
    pictures = [axes.images[0].get_array() for axes in figure.axes]
    for shown, expected in zip(pictures, [stages.raw, stages.gray, stages.resized, *stages.stack], strict=True):
        np.testing.assert_array_equal(np.asarray(shown), expected)
    assert [axes.get_xlabel() for axes in figure.axes[:3]] == [
        "210 x 160 pixels, 3 colours",
        "210 x 160 pixels",
        "42 x 42 pixels",
    ]


@pytest.mark.parametrize("kind", ["q-values", "policy-map"])
def test_what_wrappers_change_is_not_drawn_as_if_it_were_the_environment(kind: str) -> None:
    settings: dict[str, Any] = {"algorithm": "q_learning", "env_id": "minirl/GridWorld-v0", "seed": 0}
    if kind == "policy-map":
        settings |= {"algorithm": "ppo", "env_id": "CartPole-v1"}
    assert fitting_kinds(settings) == [kind]
    turned = gym.wrappers.TransformAction.wrapper_spec(func=lambda action: 1 - action, action_space=None)
    gym.register("Turned-v0", gym.spec(settings["env_id"]).entry_point, additional_wrappers=(turned,))
    settings["env_id"] = "Turned-v0"
    assert fitting_kinds(settings) == []
    if kind == "q-values":
        assert describe(np.zeros((9, 4)), "minirl/GridWorld-v0").startswith("\nDetailed Q-table Grid")
        assert describe(np.zeros((9, 4)), "Turned-v0").startswith("Q-table: 9 states x 4 actions")
