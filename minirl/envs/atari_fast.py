"""Three steps of the Atari preprocessing as one, for training: the same frames, rewards and ends, in less time.

`MaxAndSkip`, `Grayscale` and `Resize` define the result; a test compares it with theirs, bit for bit, on real games.
Time is saved by reading the screen only for the two frames that are used, as the emulator's colour numbers, one byte
per pixel, and by working only on what has changed since the last step: in Pong, a hundredth of the pixels is turned
gray and a sixteenth of the screen shrunk.
"""

import math
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
from ale_py.env import AtariEnv
from numpy.typing import NDArray

Screen = NDArray[np.uint8]
Info = dict[str, Any]

NO_FRAME = 1  # a colour number on no screen (those are even), for frames that were never read: black


class SkipAndShrink(gym.Wrapper[Screen, int, Screen, int]):
    """Repeat each action for four frames; return the maximum over the last two, gray and small: (size, size).

    Steps go straight to the emulator of the game at the bottom; resets go through the wrappers in between.

    Screens are compared in words of eight pixels, and shrunk in tiles: for a size of 84, 210 x 160 pixels are 42 x 4
    tiles of 5 x 40, each of which becomes 2 x 21 pixels that depend on nothing around it.

    Raises:
        ValueError: if there is no Atari game at the bottom.
    """

    skip = 4

    def __init__(self, env: gym.Env[Screen, int], size: int) -> None:
        super().__init__(env)
        self.size = size
        game = self.unwrapped
        if not isinstance(game, AtariEnv):
            raise ValueError(f"SkipAndShrink needs a game of the Arcade Learning Environment, not {game}")
        assert env.observation_space.shape is not None
        height, width, _ = env.observation_space.shape
        self.ale = game.ale
        self.buttons = [button.value for button in game._action_set]  # the emulator's number for each action
        # The last two frames, in colour numbers: of this step, and of the previous one.
        self.now, self.before = (np.full((2, height, width), NO_FRAME, np.uint8) for _ in range(2))
        self.gray = np.zeros((height, width), np.uint8)  # the maximum of the last two, by channel
        self.small = np.zeros((self.size, self.size), np.uint8)  # `gray`, shrunk
        self.colours = np.zeros((256, 3), np.uint8)
        self.known = bytes([NO_FRAME])  # the colours seen so far
        self.gray_of_two = np.zeros((256, 256), np.uint8)  # the value of `gray` for the colour numbers of both frames
        rows, columns = self.grid = math.gcd(height, self.size), math.gcd(width, self.size)
        tiles = np.arange(rows * columns).reshape(self.grid)
        self.tile_of_word = tiles.repeat(height // rows, axis=0).repeat(width // columns // 8, axis=1)
        self.observation_space = gym.spaces.Box(0, 255, (self.size, self.size), np.uint8)

    @classmethod
    def fits(cls, skipping: Any, resizing: Any) -> bool:
        """Whether it can replace a `MaxAndSkip` and a `Resize`, by their frame sizes and the frames skipped.

        A tile must become whole pixels, and no word of eight pixels may lie in two tiles. A picture that grows is
        interpolated, also across the edges of tiles.
        """
        height, width, *colours = skipping.observation_space.shape
        whole_words = width // math.gcd(width, resizing.size) % 8 == 0
        shrinks = resizing.size <= min(height, width)
        return bool(skipping.skip == cls.skip and colours == [3] and whole_words and shrinks)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Screen, Info]:
        """Reset, and shrink the current frame."""
        frame, info = self.env.reset(seed=seed, options=options)
        gray = np.empty_like(self.gray)
        cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY, dst=gray)
        return _shrink(gray, self.size, self.size), info

    def step(self, action: int) -> tuple[Screen, float, bool, bool, Info]:
        """Take four frames, or fewer if the episode ends before."""
        ale, button = self.ale, self.buttons[action]
        total_reward = 0.0
        self.now, self.before = self.before, self.now
        changed = []
        for frame_number in range(self.skip):
            total_reward += ale.act(button)
            if frame_number >= self.skip - 2:
                changed.append(self._look(frame_number - self.skip))
            if ale.game_over():
                self.now[len(changed) :] = self.before[len(changed) :]
                break
        if changed:
            self._redraw((changed[0] | changed[-1]).reshape(-1).nonzero()[0])
        info = {
            "lives": ale.lives(),
            "episode_frame_number": ale.getEpisodeFrameNumber(),
            "frame_number": ale.getFrameNumber(),
        }
        return self.small.copy(), total_reward, ale.game_over(with_truncation=False), ale.game_truncated(), info

    def _look(self, frame: int) -> NDArray[np.bool_]:
        """Read one of the last two frames; return which of its words changed: (height, width / 8)."""
        screen = self.now[frame]
        self.ale.getScreen(screen)
        words = _words(screen)
        changed: NDArray[np.bool_] = words != _words(self.before[frame])
        if words[changed].tobytes().translate(None, self.known):  # there are unknown colours
            self._learn_colours(screen)
        return changed

    def _learn_colours(self, screen: Screen) -> None:
        """Look up the colours of the screen. The emulator has one palette per game, but shows only those in use."""
        self.colours[screen] = self.ale.getScreenRGB()
        self.known = bytes(set(self.known + screen.tobytes()))
        brighter = np.maximum(self.colours[:, None], self.colours[None, :])
        cv2.cvtColor(brighter, cv2.COLOR_RGB2GRAY, dst=self.gray_of_two)

    def _redraw(self, changed: NDArray[np.intp]) -> None:
        """Update `gray` and `small` where words of the last two frames changed."""
        if not len(changed):
            return
        colours = _words(self.now).reshape(2, -1).take(changed, axis=1).view(np.uint8)
        # The two bytes of a pixel as one number. Their order makes no difference to the maximum of the two.
        pairs = np.ascontiguousarray(colours.T).view(np.uint16)
        _words(self.gray).reshape(-1)[changed] = self.gray_of_two.take(pairs).reshape(-1).view(np.uint64)

        # A look-up: dividing `changed` takes half a microsecond in its own loop, but 12 after the emulator.
        touched = np.zeros(self.grid, bool)
        touched.reshape(-1)[self.tile_of_word.take(changed)] = True
        where = touched.nonzero()
        tiles, small = self._tiles(self.gray)[where], self._tiles(self.small)
        height, width = small.shape[2:]
        stacked = _shrink(tiles.reshape(-1, tiles.shape[2]), len(tiles) * height, width)
        small[where] = stacked.reshape(-1, height, width)

    def _tiles(self, picture: Screen) -> Screen:
        """The same memory, as tiles: (rows of tiles, columns of tiles, height of a tile, width of a tile)."""
        height, width = picture.shape
        rows, columns = self.grid
        return picture.reshape(rows, height // rows, columns, width // columns).swapaxes(1, 2)


def _words(screen: Screen) -> NDArray[np.uint64]:
    """The same memory, with eight pixels per number: (..., width) -> (..., width / 8)."""
    return screen.view(np.uint64)


def _shrink(picture: Screen, height: int, width: int) -> Screen:
    """Return the picture at another size, each pixel the mean of the area that it covers."""
    small = np.empty((height, width), np.uint8)
    cv2.resize(picture, (width, height), dst=small, interpolation=cv2.INTER_AREA)
    return small
