"""Games in a window, at the speed of the game."""

import os
import sys
import time
import warnings
from typing import Any

import gymnasium as gym
from numpy.typing import NDArray

from minirl.checks import ConfigError, described
from minirl.envs.guard import EnvError, Guard
from minirl.envs.make import make_env
from minirl.results.play import Policy
from minirl.results.video import require_render_mode

DISPLAY_VARIABLES = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER", "SDL_VIDEO_DRIVER")


def open_window(env_id: str, **shown: Any) -> gym.Env[Any, Any]:
    """Make an environment that shows itself in a window at each step; `shown` is for `make_env`.

    Raises:
        ConfigError: if there is no display, the environment can't be drawn, or a package for that is missing.
        EnvError: if the environment raises.
    """
    require_render_mode(env_id, "--render", "human", "rgb_array")
    # Without a display, SDL shows the games nowhere and does not say so.
    if sys.platform == "linux" and not any(map(os.environ.get, DISPLAY_VARIABLES)):
        raise ConfigError("--render needs a display, and there is none: DISPLAY is not set; --video FILE needs none")
    try:
        with warnings.catch_warnings():
            # Without a "human" mode, Gymnasium shows the pictures in its own window, with a warning.
            warnings.simplefilter("ignore", UserWarning)
            env = make_env(env_id, render_mode="human", **shown)
        Guard(env).reset()
    except (gym.error.Error, RuntimeError) as error:  # RuntimeErrors are from ALE and pygame
        cause = error.__cause__ if isinstance(error, EnvError) else error
        if not isinstance(cause, gym.error.Error | RuntimeError):
            raise
        raise ConfigError(f"--render can't open a window: {described(cause)}") from error
    return env


def at_game_speed(policy: Policy, steps_per_second: float) -> Policy:
    """Return a policy that waits if the game would run too fast: without a sound card, ALE plays at double speed."""
    next_time = time.monotonic()

    def waiting_policy(observations: NDArray[Any]) -> NDArray[Any]:
        nonlocal next_time
        time.sleep(max(0.0, next_time - time.monotonic()))
        next_time = time.monotonic() + 1 / steps_per_second
        return policy(observations)

    return waiting_policy
