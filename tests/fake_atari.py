"""A scripted emulator without a ROM, with the parts of ale-py's interface that the wrappers use."""

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

SCREEN = (12, 8, 3)


class FakeALE:
    def __init__(self) -> None:
        self.remaining_lives = 0

    def lives(self) -> int:
        return self.remaining_lives


class FakeAtari(gym.Env[Any, Any]):
    """Every pixel of frame n of a game is `(game * 50 + n) % 256`, so a frame shows its game and its number.

    Args:
        lives: at the start of a game.
        life_lost_at: frame numbers at which one is lost.
        life_won_at: frame numbers at which one is won.
        rewards: frame number -> reward; other frames pay 0.
        ends_at: the frame number that terminates the game, if any.
        cut_at: the frame number that truncates it, if any.
        meanings: names of the actions.
    """

    def __init__(
        self,
        *,
        lives: int = 1,
        life_lost_at: tuple[int, ...] = (),
        life_won_at: tuple[int, ...] = (),
        rewards: dict[int, float] | None = None,
        ends_at: int | None = None,
        cut_at: int | None = None,
        meanings: tuple[str, ...] = ("NOOP", "FIRE", "RIGHT", "LEFT"),
    ) -> None:
        self.observation_space = gym.spaces.Box(0, 255, SCREEN, np.uint8)
        self.action_space = gym.spaces.Discrete(len(meanings))
        self.ale = FakeALE()
        self.start_lives = lives
        self.life_lost_at = life_lost_at
        self.life_won_at = life_won_at
        self.rewards = rewards or {}
        self.ends_at = ends_at
        self.cut_at = cut_at
        self.meanings = meanings
        self.game = -1
        self.frame = 0
        self.actions: list[int] = []  # of all games
        self.seeds: list[int | None] = []  # one per reset

    def get_action_meanings(self) -> list[str]:
        return list(self.meanings)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.game += 1
        self.frame = 0
        self.ale.remaining_lives = self.start_lives
        return self._screen(), {}

    def step(self, action: int) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        self.actions.append(action)
        self.frame += 1
        self.ale.remaining_lives += (self.frame in self.life_won_at) - (self.frame in self.life_lost_at)
        reward = self.rewards.get(self.frame, 0.0)
        return self._screen(), reward, self.frame == self.ends_at, self.frame == self.cut_at, {}

    def _screen(self) -> NDArray[np.uint8]:
        return np.full(SCREEN, (self.game * 50 + self.frame) % 256, np.uint8)
