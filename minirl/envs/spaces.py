"""Observations made fit for networks: vectors of 0 and 1, and which Gymnasium wrapper does the rest."""

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from minirl.checks import ConfigError
from minirl.envs.guard import UnusableError, plain_array, plain_state, states_of

SMALLEST_IMAGE = 36  # below this, nothing is left after the third convolution of the Nature CNN
CHOICES = (gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)


class OneHot(gym.ObservationWrapper[NDArray[Any], Any, Any]):
    """Show a number of a Discrete space as a one-hot vector; for MultiDiscrete and MultiBinary, show all their numbers.

    Like Gymnasium's `FlattenObservation`, which would take -1 for the last number.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        vectors: Any = gym.spaces.flatten_space(env.observation_space)
        self.observation_space = vectors

    def observation(self, observation: Any) -> NDArray[Any]:
        """Numbers of the space -> (n,)."""
        space: Any = self.env.observation_space
        if isinstance(space, gym.spaces.Discrete):
            observation = np.int64(plain_state(observation, states_of(space)))
        else:
            observation = plain_array(observation, space.shape, space.dtype)
            if not space.contains(observation):
                raise UnusableError(f"showed the observation {observation.tolist()}, which is not in {space}")
        return np.asarray(gym.spaces.flatten(space, observation))


def require_array(space: gym.Space[Any]) -> None:
    """Refuse observations that are not one array, or are an empty one.

    Raises:
        ConfigError: saying which wrapper helps.
    """
    if space.shape is None:
        raise ConfigError(f"--env-id must have observations that are one array, not {space}: {how_to_wrap(space)}")
    if 0 in space.shape:
        raise ConfigError(f"--env-id must have observations of at least one number, not of shape {space.shape}")


def require_actions(space: gym.Space[Any]) -> None:
    """Refuse actions that are not one array of choices or of floats.

    Raises:
        ConfigError: saying which are allowed.
    """
    floats = isinstance(space, gym.spaces.Box) and np.issubdtype(space.dtype, np.floating) and 0 not in space.shape
    if not (floats or isinstance(space, CHOICES)):
        raise ConfigError(
            f"--env-id must have actions that are Discrete, MultiDiscrete, MultiBinary or a Box of floats, not {space}"
        )


def how_to_wrap(space: gym.Space[Any]) -> str:
    """Return which Gymnasium wrapper turns observations into vectors or images (channels, height, width)."""
    wrapper, where = "FlattenObservation(env)", "around it"
    if isinstance(space, gym.spaces.Dict):
        where += ", over FilterObservation if some of its keys are enough"
    elif isinstance(space, gym.spaces.Box) and min(space.shape[:2], default=0) >= SMALLEST_IMAGE:
        height, width, *channels = space.shape
        if channels in ([], [1]):
            wrapper = f"ReshapeObservation(env, (1, {height}, {width}))"
        elif len(channels) == 1:
            shape = (*channels, height, width)
            box = f"Box({space.low.min():g}, {space.high.max():g}, {shape}, np.{space.dtype})"
            wrapper = f"TransformObservation(env, lambda obs: obs.transpose(2, 0, 1), {box})"
    elif not isinstance(space, gym.spaces.Box | gym.spaces.Tuple | gym.spaces.Text):
        return "write a wrapper that shows numbers"
    return f"put gymnasium.wrappers.{wrapper} {where} (docs/environments.md)"
