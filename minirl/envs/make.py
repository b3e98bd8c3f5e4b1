"""From an id to an environment that the algorithms can train on."""

import contextlib
import copy
import functools
import importlib
import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from minirl.checks import ConfigError
from minirl.envs.again import PlayedAgain, played_again
from minirl.envs.atari import make_atari_env
from minirl.envs.episode import EpisodeStatistics
from minirl.envs.ids import extra_of, is_atari, is_box2d, is_slow, making, spec_of
from minirl.envs.spaces import CHOICES, OneHot, require_array
from minirl.envs.state import layers_of
from minirl.envs.vector import VectorEnv

# Steps after which an episode is truncated if the environment sets no limit: a greedy policy can walk in circles.
LONGEST_EPISODE = 100_000

# Wrappers that change neither observations nor actions.
PASSING_ON = (
    gym.wrappers.OrderEnforcing,
    gym.wrappers.PassiveEnvChecker,
    gym.wrappers.TimeLimit,
    EpisodeStatistics,
    PlayedAgain,
)


def make_env(
    env_id: str, *, render_mode: str | None = None, one_hot: bool = True, frame_size: int = 84
) -> gym.Env[Any, Any]:
    """Make an environment by its Gymnasium id, Atari games with all preprocessing; finished episodes are counted.

    `env_id` is whatever `gymnasium.make` takes: `my_module:MyEnv-v0` imports `my_module` first. An environment without
    a time limit gets one of `LONGEST_EPISODE` steps.

    Args:
        env_id: the id.
        render_mode: Gymnasium's.
        one_hot: show Discrete, MultiDiscrete and MultiBinary observations as vectors of 0 and 1, for networks.
        frame_size: rows and columns of an Atari game's frames.

    Raises:
        ConfigError: if there is no such environment, its observations are not arrays, or it has no such frames.
        EnvError: if its own code raises while it is made.
    """
    with making(env_id):
        if is_atari(env_id):
            return make_atari_env(env_id, render_mode=render_mode, size=frame_size, fast=True)
        if frame_size != 84:
            raise ConfigError(f"--frame-size must be left out, for {env_id} is no Atari game")
        spec = spec_of(env_id)
        if extra_of(env_id) == "mujoco":
            quiet_mujoco()
        # Not every environment has the argument: pass it only if it is wanted.
        options: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
        env: gym.Env[Any, Any] = gym.make(spec, max_episode_steps=time_limit(spec), **options)
        if is_box2d(env_id):
            env = played_again(env)
        env = EpisodeStatistics(env)
        if any(isinstance(layer, gym.wrappers.NormalizeObservation) for layer in layers_of(env)):
            starts = "which evaluation starts anew; with PPO, --norm-obs saves them with the network"
            gym.logger.warn(f"{env_id} normalises observations by statistics of its own, {starts}")
        if any(isinstance(layer, gym.wrappers.NormalizeReward) for layer in layers_of(env)):
            starts = "so that returns are no scores, and evaluation starts anew; PPO's --norm-reward leaves them raw"
            gym.logger.warn(f"{env_id} normalises rewards by statistics of its own, {starts}")
        require_array(env.observation_space)
        if one_hot and isinstance(env.observation_space, CHOICES):
            env = OneHot(env)
        return env


def as_it_is(env: gym.Env[Any, Any]) -> bool:
    """Whether agents see what an environment's core shows, and act in it: no wrapper changes either."""
    *wrappers, _ = layers_of(env)
    return all(type(wrapper) in PASSING_ON for wrapper in wrappers)


def quiet_mujoco() -> None:
    """Send MuJoCo's warnings to Python's: by itself it writes MUJOCO_LOG.TXT into the working directory.

    What is deprecated is a matter between Gymnasium's models and MuJoCo.
    """
    with contextlib.suppress(ImportError):  # to make the environment says which package is missing
        mujoco = importlib.import_module("mujoco")
        mujoco.set_mju_user_warning(
            lambda message: None if "deprecated" in message else warnings.warn(f"MuJoCo: {message}", stacklevel=2)
        )


def make_bare_env(env_id: str) -> gym.Env[Any, Any]:
    """Make an environment without Gymnasium's own wrappers, which cost more than a step of a small environment.

    The caller must apply its time limit; one that is registered with wrappers keeps it, too.

    Raises:
        ConfigError: if there is no such environment.
        EnvError: if its own code raises while it is made.
    """
    with making(env_id):
        spec = copy.deepcopy(spec_of(env_id))
        spec.order_enforce, spec.disable_env_checker = False, True
        if not spec.additional_wrappers:  # they may repeat actions: the caller counts theirs, the limit those below
            spec.max_episode_steps = None
        return gym.make(spec)


def time_limit(spec: EnvSpec) -> int:
    """Return after how many steps an episode is truncated."""
    limit = spec.max_episode_steps
    return LONGEST_EPISODE if limit is None or limit == -1 else limit  # Gymnasium's -1: none


def env_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `make_env` for the environments of a run with these settings."""
    one_hot = settings.get("algorithm") != "q_learning"
    return {"one_hot": one_hot, **({"frame_size": settings["frame_size"]} if "frame_size" in settings else {})}


def make_envs_of(config: Any, num_envs: int | slice, *, in_halves: bool = False) -> VectorEnv:
    """Make environments as a run with these settings has them: see `make_vector_env`."""
    shown = env_options(vars(config))
    return make_vector_env(config.env_id, num_envs, num_workers=config.num_workers, in_halves=in_halves, **shown)


def make_vector_env(
    env_id: str, num_envs: int | slice, *, num_workers: int | None = None, in_halves: bool = False, **shown: Any
) -> VectorEnv:
    """Make `num_envs` copies of an environment, stepped together; Atari games in two halves, if asked for.

    `shown` is for `make_env`: `one_hot`, `frame_size`.

    If several processes share the environments, a slice says which ones to make.

    Without `num_workers`, slow environments (`is_slow`) are played by one process per core, others by this process.

    Raises:
        ConfigError, EnvError: see `make_env`.
    """
    count = num_envs if isinstance(num_envs, int) else num_envs.stop - num_envs.start
    if num_workers is None and not is_slow(env_id, count):
        num_workers = 1
    in_halves = in_halves and is_atari(env_id)
    make = functools.partial(make_env, env_id, **shown)
    return VectorEnv(make, num_envs, num_workers=num_workers, in_halves=in_halves)
