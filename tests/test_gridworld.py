"""The grid: moves, rewards and model as in the source notebook; layouts that make no sense are refused."""

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import minirl
from minirl.envs.gridworld import GridWorld

UP, RIGHT, DOWN, LEFT = range(4)


def test_gymnasiums_checker_has_nothing_to_say() -> None:
    assert minirl.__version__, "importing minirl registers the id"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make("minirl/GridWorld-v0").unwrapped)
        check_env(gym.make("minirl/GridWorld-v0", size=5, goal=(4, 4), render_mode="ansi").unwrapped)


@pytest.mark.parametrize(
    ("state", "action", "next_state", "reward", "terminated"),
    [
        # S 1 2
        # 3 # 5
        # 6 7 G
        (0, UP, 0, -10, False),
        (0, LEFT, 0, -10, False),
        (0, RIGHT, 1, -1, False),
        (0, DOWN, 3, -1, False),
        (1, DOWN, 1, -10, False),  # the obstacle
        (3, RIGHT, 3, -10, False),
        (5, LEFT, 5, -10, False),
        (7, UP, 7, -10, False),
        (2, RIGHT, 2, -10, False),
        (2, DOWN, 5, -1, False),
        (5, UP, 2, -1, False),
        (6, DOWN, 6, -10, False),
        (6, UP, 3, -1, False),
        (7, LEFT, 6, -1, False),
        (5, DOWN, 8, 100, True),
        (7, RIGHT, 8, 100, True),
    ],
)
def test_a_step_and_its_model(state: int, action: int, next_state: int, reward: int, terminated: bool) -> None:
    env = GridWorld()
    env.reset()
    env.state = state
    assert env.step(action) == (next_state, reward, terminated, False, {})
    assert env.state == next_state
    assert env.P[state][action] == [(1.0, next_state, reward, terminated)]


def test_nothing_follows_the_goal() -> None:
    model = GridWorld().P
    assert all(model[8][action] == [(1.0, 8, 0.0, True)] for action in range(4))


def test_an_episode_starts_at_the_start() -> None:
    env = GridWorld(size=4, start=(1, 2), goal=(3, 3), obstacles=())
    assert env.reset() == (6, {})
    env.step(DOWN)
    assert env.reset() == (6, {})


def test_rendering() -> None:
    env = GridWorld(render_mode="ansi")
    env.reset()
    assert env.render() == "A . .\n. # .\n. . G\n"
    env.step(RIGHT)
    assert env.render() == "S A .\n. # .\n. . G\n"
    picture = GridWorld(render_mode="rgb_array").render()
    assert isinstance(picture, np.ndarray)
    assert picture.shape == (192, 192, 3)
    assert picture.dtype == np.uint8
    agent, free, obstacle, goal = (tuple(picture[y, x]) for y, x in [(32, 32), (32, 96), (96, 96), (160, 160)])
    assert len({agent, free, obstacle, goal}) == 4
    assert GridWorld().render() is None


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"size": 1, "goal": (0, 0)}, "size must be a whole number of at least 2, not 1"),
        ({"size": 3.0}, "size must be a whole number of at least 2, not 3.0"),
        ({"obstacles": (1, 1)}, "the obstacle 1 must be a cell"),
        ({"obstacles": [(1, 1)]}, "obstacles must be a tuple of cells"),
        ({"start": 0}, "the start 0 must be a cell"),
        ({"start": (0.5, 0)}, r"the start \(0.5, 0\) must be a cell"),
        ({"start": (3, 0)}, r"the start \(3, 0\) must be a cell \(row, column\) inside the 3x3 grid"),
        ({"goal": (0, -1)}, r"the goal \(0, -1\) must be"),
        ({"obstacles": ((1, 3),)}, r"the obstacle \(1, 3\) must be"),
        ({"obstacles": ((1,),)}, r"the obstacle \(1,\) must be"),
        ({"goal": (0, 0)}, "start and goal must be two cells"),
        ({"obstacles": ((0, 0),)}, r"the start \(0, 0\) must not be an obstacle"),
        ({"obstacles": ((2, 2),)}, r"the goal \(2, 2\) must not be an obstacle"),
        ({"obstacles": ((0, 1), (1, 0))}, r"the goal \(2, 2\) can't be reached from the start \(0, 0\)"),
        ({"obstacles": ((0, 2), (1, 1), (2, 0))}, "can't be reached"),
    ],
)
def test_a_bad_layout_is_refused(layout: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GridWorld(**layout)
