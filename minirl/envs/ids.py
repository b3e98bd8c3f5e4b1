"""What an environment's id stands for."""

import contextlib
import importlib
from collections.abc import Iterator

import ale_py
import gymnasium as gym
from gymnasium.envs.registration import find_highest_version, get_env_id, parse_env_id

from minirl.checks import ConfigError

gym.register_envs(ale_py)
gym.logger.colorize = lambda text, *style, **more: text  # type: ignore[attr-defined]  # warnings may go to a file


def registered_id(env_id: str) -> str:
    """Return the id under which `gymnasium.make` would find an environment.

    `my_module:MyEnv-v0` imports `my_module`, which registers `MyEnv-v0`; `MyEnv` alone is the newest version.

    Raises:
        ConfigError: if the module can't be imported or the id is no id.
    """
    module, _, name = env_id.rpartition(":")
    with user_errors():
        if module:
            importlib.import_module(module)
        namespace, base_name, version = parse_env_id(name)
    if version is None:
        version = find_highest_version(namespace, base_name)
    return get_env_id(namespace, base_name, version)


def is_atari(env_id: str) -> bool:
    """Whether `env_id` names a registered game of the Arcade Learning Environment.

    Raises:
        ConfigError: see `registered_id`.
    """
    spec = gym.registry.get(registered_id(env_id))
    return spec is not None and str(spec.entry_point).startswith("ale_py")


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn what goes wrong with an id or in making its environment into one line for the user."""
    try:
        yield
    except ConfigError:
        raise
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--env-id must be an environment that Gymnasium can make: {reason}") from error
