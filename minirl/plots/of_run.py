"""The data of the pictures, taken from a run: its table or network, and a few steps of its environment."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.envs.toy_text.cliffwalking import CliffWalkingEnv
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv
from numpy.typing import NDArray

from minirl.checks import ConfigError
from minirl.envs.atari import FrameStack, Grayscale, MaxAndSkip, Resize
from minirl.envs.gridworld import MOVES, GridWorld
from minirl.envs.ids import is_atari
from minirl.envs.make import as_it_is, env_options, make_env, make_vector_env
from minirl.envs.state import layers_of
from minirl.evaluate import load_policy, ppo_agent
from minirl.fast.machine import select_device
from minirl.q_learning import load_table
from minirl.results.figure import require_matplotlib
from minirl.results.pictures import (
    Grid,
    Image,
    Moment,
    Stages,
    action_probabilities_figure,
    policy_map_figure,
    preprocessing_figure,
    q_values_figure,
)
from minirl.runs.checkpoints import load_checkpoint
from minirl.runs.directory import load_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Each kind of picture, and the runs that it can be drawn from.
KINDS = {
    "q-values": "a run of q_learning on a grid (GridWorld, FrozenLake, CliffWalking) without wrappers",
    "policy-map": "a run of dqn or ppo on CartPole without wrappers",
    "action-probabilities": "a run of ppo on an Atari game",
    "preprocessing": "a run of dqn or ppo on an Atari game",
}
MAX_ANGLE, MAX_VELOCITY = 12.0, 100.0  # degrees at which CartPole's game is over, and degrees a second
MAP_POINTS = 401  # along each side of the policy map
WATCHED_STEPS = 300  # agent steps of an Atari game, 20 seconds of it


def draw_picture(kind: str, run_dir: Path, device: str = "auto") -> "Figure":
    """Draw a picture, one of `KINDS`, of a run.

    Raises:
        ConfigError: if the directory holds no run that this can be drawn from, or matplotlib is missing.
    """
    settings = load_settings(run_dir)
    algorithm, env_id = settings["algorithm"], settings.get("env_id", "texts")
    if kind not in fitting_kinds(settings):
        raise ConfigError(f"--kind {kind} needs {KINDS[kind]}, and {run_dir} is one of {algorithm} on {env_id}")
    require_matplotlib()  # before games are played
    of_run = f"{algorithm} on {env_id}, seed {settings['seed']}"
    torch_device = select_device(device)
    if kind == "q-values":
        return q_values_figure(*learned_grid(run_dir, settings), f"Q-table of {of_run}")
    if kind == "policy-map":
        title = f"Policy of {of_run}\n(cart at the centre, standing still)"
        return policy_map_figure(*policy_map(run_dir, settings, torch_device), title)
    if kind == "action-probabilities":
        title = f"Action probabilities of {of_run}\n(orange: the likeliest action)"
        return action_probabilities_figure(*telling_moments(run_dir, settings, torch_device), title)
    return preprocessing_figure(preprocessing(settings), f"What the network sees of {env_id}")


def fitting_kinds(settings: dict[str, Any]) -> list[str]:
    """Return the kinds of pictures that can be drawn from a run with these settings.

    Raises:
        ConfigError: if its environment can't be made.
    """
    algorithm = settings["algorithm"]
    if "env_id" not in settings:
        return []
    with made(settings) as env:
        on_cartpole = as_it_is(env) and isinstance(env.unwrapped, CartPoleEnv) and env.observation_space.shape == (4,)
        fits = {
            "q-values": algorithm == "q_learning" and as_it_is(env) and grid_of(env.unwrapped) is not None,
            "policy-map": algorithm in ("dqn", "ppo") and on_cartpole,
            "action-probabilities": algorithm == "ppo" and is_atari(settings["env_id"]),
            "preprocessing": algorithm in ("dqn", "ppo") and is_atari(settings["env_id"]),
        }
    return [kind for kind, fit in fits.items() if fit]


def made(settings: dict[str, Any], render_mode: str | None = None) -> contextlib.closing[gym.Env[Any, Any]]:
    """Make a run's environment, for a `with` block, which closes it."""
    return contextlib.closing(make_env(settings["env_id"], render_mode=render_mode, **env_options(settings)))


def learned_grid(run_dir: Path, settings: dict[str, Any]) -> tuple[NDArray[np.float64], Grid]:
    """Return the Q-table of a run, and how its states and actions are laid out in the plane."""
    with made(settings) as env:
        grid = grid_of(env.unwrapped)
        assert grid is not None
        return load_table(load_checkpoint(run_dir, "q_learning", "q_table"), env), grid


def grid_of(env: gym.Env[Any, Any]) -> Grid | None:
    """Return how the states and actions of an environment are laid out in the plane; None if they are not."""
    if isinstance(env, GridWorld):
        names = {row * env.size + column: "OBSTACLE" for row, column in env.obstacles}
        return Grid(env.size, env.size, MOVES, {**names, env.start_state: "START", env.goal_state: "GOAL"})
    if isinstance(env, FrozenLakeEnv):
        words = {b"S": "START", b"H": "HOLE", b"G": "GOAL"}
        letters = np.asarray(env.desc)
        rows, columns = letters.shape
        names = {state: words[letter] for state, letter in enumerate(letters.flat) if letter in words}
        return Grid(rows, columns, ((0, -1), (1, 0), (0, 1), (-1, 0)), names)
    if isinstance(env, CliffWalkingEnv):
        names = dict.fromkeys(np.flatnonzero(env._cliff).tolist(), "CLIFF")
        rows, columns = env.shape
        ends = {int(env.start_state_index): "START", rows * columns - 1: "GOAL"}
        return Grid(rows, columns, MOVES, {**names, **ends})
    return None


def policy_map(
    run_dir: Path, settings: dict[str, Any], device: torch.device
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Ask a run's policy what it does with CartPole's pole at each angle and angular velocity.

    The cart is at the centre and stands still, as in the source notebook.

    Returns:
        Angles (n,) in degrees, velocities (m,) in degrees a second, actions (m, n), and (angle, velocity, action) of
        each step of one greedy game.
    """
    angles = np.linspace(-MAX_ANGLE, MAX_ANGLE, MAP_POINTS)
    velocities = np.linspace(-MAX_VELOCITY, MAX_VELOCITY, MAP_POINTS)
    states = np.zeros((MAP_POINTS, MAP_POINTS, 4), np.float32)  # position, velocity, angle, angular velocity
    states[..., 2] = np.radians(angles)
    states[..., 3] = np.radians(velocities)[:, None]
    game = []
    with make_vector_env(settings["env_id"], 1, **env_options(settings)) as envs:
        policy = load_policy(run_dir, settings, envs, device)
        actions = policy(states.reshape(-1, 4)).reshape(MAP_POINTS, MAP_POINTS)
        obs, ended = envs.reset(seed=settings["seed"]), False
        while not ended:
            action = policy(obs)
            game.append([*np.degrees(obs[0, 2:]), action[0]])
            step = envs.step(action)
            obs, ended = step.observations, bool(step.episodes)
    return angles, velocities, actions, np.array(game)


def telling_moments(run_dir: Path, settings: dict[str, Any], device: torch.device) -> tuple[list[Moment], list[str]]:
    """Play the start of a game with PPO's most likely actions; return three moments of it, and the actions' names.

    They are the moments of lowest, median and highest entropy: at which the policy is surest, halfway and least sure.
    """
    seen: list[tuple[float, int, Image, NDArray[np.float64]]] = []  # entropy, agent step, frame, pi(a|s)
    with made(settings, render_mode="rgb_array") as env:
        agent = ppo_agent(run_dir, env.observation_space, env.action_space, device)
        game: Any = env.unwrapped
        obs, info = env.reset(seed=settings["seed"])
        while len(seen) < WATCHED_STEPS and "episode" not in info:
            with torch.no_grad():
                distribution, _ = agent(torch.as_tensor(obs[None], device=device))
            probabilities = distribution.probs[0].double().cpu().numpy()
            seen.append((distribution.entropy().item(), len(seen), game.render(), probabilities))
            obs, _, terminated, truncated, info = env.step(int(probabilities.argmax()))
            if (terminated or truncated) and "episode" not in info:
                obs, info = env.reset()  # a life was lost; the game goes on
        actions = list(game.get_action_meanings())
    seen.sort(key=lambda moment: moment[0])
    names = ("where the policy is surest", "halfway between", "where it is least sure")
    chosen = zip((seen[0], seen[len(seen) // 2], seen[-1]), names, strict=True)
    return [Moment(step, frame, probabilities, name) for (_, step, frame, probabilities), name in chosen], actions


def preprocessing(settings: dict[str, Any]) -> Stages:
    """Play the start of a game at random; return the preprocessing stages at the step with most motion in its stack."""
    best: Stages | None = None
    most = -1.0
    with made(settings, render_mode="rgb_array") as env:
        assert isinstance(env.action_space, gym.spaces.Discrete)
        wrappers: dict[type, Any] = {type(layer): layer for layer in layers_of(env)}
        rng = np.random.default_rng(settings["seed"])
        env.reset(seed=settings["seed"])
        for _ in range(WATCHED_STEPS):
            _, _, terminated, truncated, _ = env.step(int(rng.integers(env.action_space.n)))
            stack = wrappers[FrameStack].frames
            moved = float(np.abs(np.diff(stack.astype(float), axis=0)).mean(axis=(1, 2)).min())
            if moved > most:
                most = moved
                raw = wrappers[MaxAndSkip].last_two.max(axis=0)
                gray = wrappers[Grayscale].observation(raw)
                best = Stages(raw, gray, wrappers[Resize].observation(gray), stack.copy())
            if terminated or truncated:
                env.reset()
    assert best is not None
    return best
