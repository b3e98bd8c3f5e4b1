"""From an id to an environment that the algorithms can train on."""

import copy
import functools
import math
from typing import Any

import gymnasium as gym

from minirl.envs.atari import make_atari_env
from minirl.envs.episode import EpisodeStatistics
from minirl.envs.ids import is_atari, registered_id, unmakable
from minirl.envs.vector import VectorEnv


def make_env(env_id: str, *, render_mode: str | None = None) -> gym.Env[Any, Any]:
    """Make an environment by its Gymnasium id, Atari games with all preprocessing; finished episodes are counted.

    `env_id` is whatever `gymnasium.make` takes: `my_module:MyEnv-v0` imports `my_module` first.

    Raises:
        ConfigError: if there is no such environment, or it can't be made.
    """
    if not is_atari(env_id):
        return EpisodeStatistics(make_plain_env(env_id, render_mode=render_mode))
    try:
        return make_atari_env(env_id, render_mode=render_mode)
    except (gym.error.Error, ImportError) as error:
        raise unmakable(error) from error


def make_plain_env(env_id: str, *, render_mode: str | None = None) -> gym.Env[Any, Any]:
    """Make an environment as it is, with nothing around it.

    Raises:
        ConfigError: if there is no such environment, or it can't be made.
    """
    # Not every environment has the argument: pass it only where it is wanted.
    options: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
    try:
        return gym.make(registered_id(env_id), **options)
    except (gym.error.Error, ImportError) as error:
        raise unmakable(error) from error


def make_bare_env(env_id: str) -> tuple[gym.Env[Any, Any], float]:
    """Make an environment without Gymnasium's own wrappers, which cost more than a step of a small environment.

    Returns:
        The environment, and its time limit in steps (infinity where it has none), which is the caller's to keep.

    Raises:
        ConfigError: if there is no such environment, or it can't be made.
    """
    try:
        spec = copy.deepcopy(gym.spec(registered_id(env_id)))
        limit = math.inf if spec.max_episode_steps is None else spec.max_episode_steps
        spec.order_enforce, spec.disable_env_checker, spec.max_episode_steps = False, True, None
        return gym.make(spec), limit
    except (gym.error.Error, ImportError) as error:
        raise unmakable(error) from error


def make_vector_env(env_id: str, num_envs: int, *, num_workers: int | None = None) -> VectorEnv:
    """Make `num_envs` copies of an environment, stepped together.

    Without `num_workers`, Atari games get one worker process per core, and everything else lives in this process:
    a step of CartPole takes 7 microseconds, a message to a worker 50.

    Raises:
        ConfigError: if there is no such environment, or it can't be made.
    """
    if num_workers is None and not is_atari(env_id):
        num_workers = 1
    return VectorEnv(functools.partial(make_env, env_id), num_envs, num_workers=num_workers)
