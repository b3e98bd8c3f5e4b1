"""What an environment id stands for."""

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import ale_py
import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, find_highest_version, get_env_id, parse_env_id

from minirl.checks import ConfigError, described
from minirl.envs.guard import EnvError, culprit_of

gym.register_envs(ale_py)
gym.logger.colorize = lambda text, *style, **more: text  # type: ignore[attr-defined]  # warnings may go to a file
warn: Any = functools.cache(gym.logger.warn)


def warn_once(msg: str, *args: object, category: type[Warning] | None = None, stacklevel: int = 1) -> None:
    """Warn of each thing only once: Gymnasium's checker warns for each environment, those of evaluations included."""
    warn((msg % args).replace("%", "%%"), category=category, stacklevel=stacklevel + 1)


gym.logger.warn = warn_once


def registered_id(env_id: str) -> str:
    """Return the id under which `gymnasium.make` would find an environment.

    `my_module:MyEnv-v0` imports `my_module`, which registers `MyEnv-v0`; `MyEnv` alone is the newest version.

    Raises:
        ConfigError: if there is no such module, or the id is not valid.
        EnvError: if the module raises.
    """
    module, _, name = env_id.rpartition(":")
    with making(env_id):
        if module:
            importlib.import_module(module)
        namespace, base_name, version = parse_env_id(name)
    if version is None:
        version = find_highest_version(namespace, base_name)
    return get_env_id(namespace, base_name, version)


def spec_of(env_id: str) -> EnvSpec:
    """Return Gymnasium's specification of an environment.

    Raises:
        ConfigError, EnvError: see `registered_id`; also if it is not registered.
    """
    with making(env_id):
        return gym.spec(registered_id(env_id))


def is_atari(env_id: str) -> bool:
    """Whether `env_id` names a registered game of the Arcade Learning Environment that shows its screen in colour.

    Raises:
        ConfigError, EnvError: see `registered_id`, as in the functions below.
    """
    if not lies_in(env_id, "ale_py"):
        return False
    options = spec_of(env_id).kwargs
    return options.get("obs_type", "rgb") == "rgb" and not options.get("continuous", False)


def is_box2d(env_id: str) -> bool:
    """Whether it is one of Gymnasium's environments with Box2D physics."""
    return lies_in(env_id, "gymnasium.envs.box2d")


def extra_of(env_id: str) -> str | None:
    """Return the extra in setup.cfg that provides an environment's physics."""
    return "box2d" if is_box2d(env_id) else "mujoco" if lies_in(env_id, "gymnasium.envs.mujoco") else None


def is_slow(env_id: str, num_envs: int) -> bool:
    """Whether worker processes make steps faster: Atari and MuJoCo; from four environments on, Box2D and Acrobot.

    A step of HalfCheetah takes 140 microseconds, of CartPole 7, of LunarLander 30, of Acrobot 35; a message to a worker
    takes 50.
    """
    if lies_in(env_id, "ale_py") or extra_of(env_id) == "mujoco":
        return True
    return num_envs >= 4 and (is_box2d(env_id) or lies_in(env_id, "gymnasium.envs.classic_control.acrobot"))


def lies_in(env_id: str, module: str) -> bool:
    """Whether an environment's entry point is in a module or package."""
    spec = gym.registry.get(registered_id(env_id))
    return spec is not None and str(spec.entry_point).startswith(module)


@contextlib.contextmanager
def making(env_id: str) -> Iterator[None]:
    """Turn errors from an id, or from making its environment, into one line for the user.

    Raises:
        ConfigError: if Gymnasium can't make it.
        EnvError: if the environment's own code raises.
    """
    try:
        yield
    except (ConfigError, EnvError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, gym.error.DependencyNotInstalled) and (extra := extra_of(env_id)):
            missing = f"{env_id} needs the extra {extra}, pip install -e '.[{extra}]'"
            raise ConfigError(f"--env-id must be an environment whose packages are installed: {missing}") from error
        culprit, trace = culprit_of(error)
        if trace and not isinstance(culprit, gym.error.Error):
            message = f"environment {env_id} can't be made: it raised {described(culprit)}"
            raise EnvError(message, trace) from culprit
        wanted = "an environment that Gymnasium can make"
        raise ConfigError(f"--env-id must be {wanted}: {described(error)}") from error
