"""Three steps of the Atari preprocessing as one, for training: the same frames, rewards and ends, in less time.

`MaxAndSkip`, `Grayscale` and `Resize` say what is done; a test holds this to them, bit for bit, on real games. Time is
won by reading the screen only of the two frames that are used, into memory that is there already, and by no call
through a chain of wrappers for each of the four frames.
"""

from typing import Any

import cv2
import gymnasium as gym
import numpy as np
from ale_py.env import AtariEnv
from numpy.typing import NDArray

Screen = NDArray[np.uint8]
Info = dict[str, Any]


class SkipAndShrink(gym.Wrapper[Screen, int, Screen, int]):
    """Repeat each action for four frames; return the maximum over the last two, gray and small: (84, 84).

    Steps go straight to the emulator of the game at the bottom; resets go through the wrappers between.

    Raises:
        ValueError: if there is no Atari game at the bottom.
    """

    skip = 4
    size = 84

    def __init__(self, env: gym.Env[Screen, int]) -> None:
        super().__init__(env)
        game = self.unwrapped
        if not isinstance(game, AtariEnv):
            raise ValueError(f"SkipAndShrink needs a game of the Arcade Learning Environment, not {game}")
        assert env.observation_space.shape is not None
        self.ale = game.ale
        self.buttons = [button.value for button in game._action_set]  # the emulator's number of each action
        self.last_two = np.zeros((2, *env.observation_space.shape), np.uint8)
        self.brightest = np.zeros_like(self.last_two[0])
        self.gray = np.zeros(self.brightest.shape[:2], np.uint8)
        self.observation_space = gym.spaces.Box(0, 255, (self.size, self.size), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Screen, Info]:
        """Reset, and shrink the frame that is there."""
        frame, info = self.env.reset(seed=seed, options=options)
        return self._shrink(frame), info

    def step(self, action: int) -> tuple[Screen, float, bool, bool, Info]:
        """Take four frames, fewer where the episode ends before."""
        ale, button = self.ale, self.buttons[action]
        total_reward = 0.0
        for frame_number in range(self.skip):
            total_reward += ale.act(button)
            terminated, truncated = ale.game_over(with_truncation=False), ale.game_truncated()
            if frame_number >= self.skip - 2:
                ale.getScreenRGB(self.last_two[frame_number - self.skip])
            if terminated or truncated:
                break
        np.maximum(self.last_two[0], self.last_two[1], out=self.brightest)
        info = {
            "lives": ale.lives(),
            "episode_frame_number": ale.getEpisodeFrameNumber(),
            "frame_number": ale.getFrameNumber(),
        }
        return self._shrink(self.brightest), total_reward, terminated, truncated, info

    def _shrink(self, frame: Screen) -> Screen:
        cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY, dst=self.gray)
        small = np.empty((self.size, self.size), np.uint8)
        cv2.resize(self.gray, small.shape, dst=small, interpolation=cv2.INTER_AREA)
        return small
