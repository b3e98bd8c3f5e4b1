"""Counting what happened in an episode."""

from typing import Any, SupportsFloat

import gymnasium as gym


class EpisodeStatistics(gym.Wrapper[Any, Any, Any, Any]):
    """Put `info["episode"] = {"r", "l"}` on the last step of each episode.

    r is the sum of the rewards and l the number of steps, both as seen where this wrapper sits. On Atari it sits
    below EpisodicLife and ClipReward, so that an episode is a whole game and r its score, and above MaxAndSkip, so
    that l counts agent steps.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.episodic_return = 0.0
        self.length = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start counting anew, from what a wrapper below was paid while it reset (`NoopReset`)."""
        obs, info = self.env.reset(seed=seed, options=options)
        self.episodic_return = info.get("reset_reward", 0.0)
        self.length = 0
        return obs, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Count the step; at an end of the episode, report."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.episodic_return += float(reward)
        self.length += 1
        if terminated or truncated:
            info = {**info, "episode": {"r": self.episodic_return, "l": self.length}}
        return obs, reward, terminated, truncated, info
