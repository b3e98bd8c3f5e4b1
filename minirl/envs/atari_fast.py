"""Three steps of the Atari preprocessing as one, for training: the same frames, rewards and ends, in less time.

`MaxAndSkip`, `Grayscale` and `Resize` say what is done; a test holds this to them, bit for bit, on real games. Time is
won by reading the screen only of the two frames that are used, by reading it as the emulator's colour numbers, a byte
a pixel, and by working only on what has changed since the step before: of Pong, a hundredth of the pixels is turned
gray and a fifth of the lines shrunk.
"""

from typing import Any

import cv2
import gymnasium as gym
import numpy as np
from ale_py.env import AtariEnv
from numpy.typing import NDArray

Screen = NDArray[np.uint8]
Words = NDArray[np.uint64]
Indices = NDArray[np.intp]
Info = dict[str, Any]

NO_FRAME = 1  # a colour number that no screen has (they are even), for frames that were never read: black


class SkipAndShrink(gym.Wrapper[Screen, int, Screen, int]):
    """Repeat each action for four frames; return the maximum over the last two, gray and small: (84, 84).

    Steps go straight to the emulator of the game at the bottom; resets go through the wrappers between.

    Screens are compared in words of eight pixels. Lines of 210 shrink in bands: five become two, whatever is above and
    below. Where another height makes the weights of a line depend on where it is, the picture is a single band.

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
        height, width, _ = env.observation_space.shape
        self.ale = game.ale
        self.buttons = [button.value for button in game._action_set]  # the emulator's number of each action
        self.num_bands = 42 if height == 210 else 1
        self.screen = np.zeros((height, width), np.uint8)
        self.last_two = np.full((2, height, width), NO_FRAME, np.uint8)
        self.gray = np.zeros((height, width), np.uint8)  # the brighter of the last two, by channel
        self.small = np.zeros((self.size, self.size), np.uint8)  # `gray`, shrunk
        self.colours = np.zeros((256, 3), np.uint8)
        self.unknown = np.arange(256) != NO_FRAME  # the colours not seen yet
        self.gray_of_two = np.zeros((256, 256), np.uint8)  # what `gray` is, by the colour numbers of both frames
        self.observation_space = gym.spaces.Box(0, 255, (self.size, self.size), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Screen, Info]:
        """Reset, and shrink the frame that is there."""
        frame, info = self.env.reset(seed=seed, options=options)
        gray = np.empty_like(self.gray)
        cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY, dst=gray)
        return self._shrink(gray), info

    def step(self, action: int) -> tuple[Screen, float, bool, bool, Info]:
        """Take four frames, fewer where the episode ends before."""
        ale, button = self.ale, self.buttons[action]
        total_reward = 0.0
        changed = []
        for frame_number in range(self.skip):
            total_reward += ale.act(button)
            terminated, truncated = ale.game_over(with_truncation=False), ale.game_truncated()
            if frame_number >= self.skip - 2:
                changed.append(self._look(self.last_two[frame_number - self.skip]))
            if terminated or truncated:
                break
        if any(map(len, changed)):
            self._redraw(np.concatenate(changed))
        info = {
            "lives": ale.lives(),
            "episode_frame_number": ale.getEpisodeFrameNumber(),
            "frame_number": ale.getFrameNumber(),
        }
        return self.small.copy(), total_reward, terminated, truncated, info

    def _look(self, frame: Screen) -> Indices:
        """Read the screen into `frame`; return which of its words changed."""
        self.ale.getScreen(self.screen)
        now, before = _words(self.screen), _words(frame)
        changed = np.flatnonzero(now != before)
        words = now.take(changed)
        if self.unknown.take(words.view(np.uint8)).any():
            self._learn_colours()
        before[changed] = words
        return changed

    def _learn_colours(self) -> None:
        """Look up the colours of the screen. The emulator has one palette a game, and shows no more of it at once."""
        self.colours[self.screen] = self.ale.getScreenRGB()
        self.unknown[self.screen] = False
        brighter = np.maximum(self.colours[:, None], self.colours[None, :])
        cv2.cvtColor(brighter, cv2.COLOR_RGB2GRAY, dst=self.gray_of_two)

    def _redraw(self, changed: Indices) -> None:
        """Bring `gray` and `small` up to date where words of the last two frames changed."""
        older, newer = (_words(frame).take(changed).view(np.uint8) for frame in self.last_two)
        _words(self.gray)[changed] = self.gray_of_two.take(older.astype(np.intp) * 256 + newer).view(np.uint64)
        height, width = self.gray.shape
        words_per_band = height * width // 8 // self.num_bands
        bands = np.flatnonzero(np.bincount(changed // words_per_band))
        lines = self.gray.reshape(self.num_bands, -1).take(bands, axis=0).reshape(-1, width)
        self.small.reshape(self.num_bands, -1)[bands] = self._shrink(lines).reshape(len(bands), -1)

    def _shrink(self, lines: Screen) -> Screen:
        """(some bands, width) -> (as many bands, 84)."""
        num_bands = len(lines) * self.num_bands // len(self.screen)
        small = np.empty((self.size // self.num_bands * num_bands, self.size), np.uint8)
        cv2.resize(lines, small.shape[::-1], dst=small, interpolation=cv2.INTER_AREA)
        return small


def _words(screen: Screen) -> Words:
    """The same memory, eight pixels a number: (height, width) -> (height * width / 8,)."""
    return screen.reshape(-1).view(np.uint64)
