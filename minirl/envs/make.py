"""From an id to an environment that the algorithms can train on."""

import functools
import importlib
from typing import Any

import gymnasium as gym

from minirl.config import ConfigError
from minirl.envs.atari import is_atari, make_atari_env
from minirl.envs.episode import EpisodeStatistics
from minirl.envs.vector import VectorEnv


def make_env(env_id: str, *, render_mode: str | None = None) -> gym.Env[Any, Any]:
    """Make an environment by its Gymnasium id; Atari games come with all preprocessing.

    `env_id` is whatever `gymnasium.make` takes: `my_module:MyEnv-v0` imports `my_module` first.

    Raises:
        ConfigError: if there is no such environment, or it can't be made.
    """
    if is_atari(env_id):
        return make_atari_env(env_id, render_mode=render_mode)
    return EpisodeStatistics(make_plain_env(env_id, render_mode=render_mode))


def make_plain_env(env_id: str, *, render_mode: str | None = None) -> gym.Env[Any, Any]:
    """Make an environment as it is, with nothing around it.

    Raises:
        ConfigError: if there is no such environment, or it can't be made.
    """
    # Not every environment has the argument: pass it only where it is wanted.
    options: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return gym.make(name, **options)
    except (gym.error.Error, ModuleNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--env-id must be an environment that Gymnasium can make: {reason}") from error


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
