"""Counting what happened in an episode."""

from typing import Any

import gymnasium as gym

from minirl.envs.guard import plain_reward
from minirl.envs.state import layers_of


class PlaysInReset:
    """A layer that takes steps while it resets: `reset_reward` is their reward, and belongs to the episode."""

    reset_reward = 0.0


class EpisodeStatistics(gym.Wrapper[Any, Any, Any, Any]):
    """Put `info["episode"] = {"r", "l"}` on the last step of each episode.

    r is the sum of the rewards and l the number of steps, both as seen where this wrapper sits. On Atari it sits
    below EpisodicLife and ClipReward, so that an episode is a whole game and r its score, and above MaxAndSkip, so
    that l counts agent steps.

    Attributes:
        finished: (r, l) of the episodes that have ended; the reader takes them out. An info is open to every wrapper:
            its "episode" may be another one's number of an episode.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.episodic_return = 0.0
        self.length = 0
        self.finished: list[tuple[float, int]] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Restart the count, from the reward that a layer below got while it reset (`NoopReset`)."""
        obs, info = self.env.reset(seed=seed, options=options)
        below = (layer for layer in layers_of(self.env) if isinstance(layer, PlaysInReset))
        self.episodic_return = sum((layer.reset_reward for layer in below), 0.0)
        self.length = 0
        return obs, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Count the step; report at the end of the episode."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        if type(reward) is not float:
            reward = plain_reward(reward)
        self.episodic_return += reward
        self.length += 1
        if terminated or truncated:
            self.finished.append((self.episodic_return, self.length))
            if isinstance(info, dict):  # if not, `Guard` says so
                info = {**info, "episode": {"r": self.episodic_return, "l": self.length}}
        return obs, reward, terminated, truncated, info


def statistics_of(env: gym.Env[Any, Any]) -> EpisodeStatistics | None:
    """Return the layer of an environment that counts its episodes, if there is one."""
    return next((layer for layer in layers_of(env) if isinstance(layer, EpisodeStatistics)), None)
