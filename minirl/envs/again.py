"""Episodes that are played again: how an environment is put back whose physics can't be copied.

Box2D's world lies in its library's memory, and nothing can read it whole. But where each episode has a world of its
own, it is made of the random numbers that it began with, of the actions since, and of what wrappers have drawn between
them: played again from there, it comes to the same state, bit for bit. LunarLander makes a new world for each episode;
BipedalWalker and CarRacing empty the old one, which is not the same to the last bit.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding


class PlayedAgain(gym.Wrapper[Any, Any, Any, Any]):
    """Around the core of an environment with a `world`: keeps what its episode is made of.

    Where the last reset made a new world, `minirl.envs.state` captures this in place of the core.

    Attributes:
        began: the state of the core's generator of random numbers before the episode's reset.
        actions: those of the episode so far.
        drawn: pairs of the number of an action, and the generator's state before it, where a wrapper has drawn from it.
        now: the generator's state when this was captured.
        renewed: whether the episode has a world of its own.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.core: Any = env.unwrapped
        self.began: Any = None
        self.actions: list[Any] = []
        self.drawn: list[list[Any]] = []
        self.now: Any = None
        self.renewed = False
        self._left: Any = None  # the generator's state after the core's last step

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        generator = self.core.np_random if seed is None else seeding.np_random(seed)[0]
        self.began, self.actions, self.drawn, world = generator.bit_generator.state, [], [], self.core.world
        first = self.env.reset(seed=seed, options=options)
        self.renewed, self._left = self.core.world is not world, self.core.np_random.bit_generator.state
        return first

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Keep the action, and take it."""
        state = self.core.np_random.bit_generator.state
        if state != self._left:
            self.drawn.append([len(self.actions), state])
        self.actions.append(action)
        result = self.env.step(action)
        self._left = self.core.np_random.bit_generator.state
        return result

    def parts(self) -> dict[str, Any]:
        """Return what is captured, by name: the core, or what its episode is made of, the actions in one array."""
        if not self.renewed:
            return {"env": self.env}
        spaces = {name: getattr(self, name) for name in ("action_space", "observation_space")}
        now = self.core.np_random.bit_generator.state
        return {"began": self.began, "actions": np.array(self.actions), "drawn": self.drawn, "now": now, **spaces}

    def play(self) -> None:
        """Play the episode again that is in `began`, `actions` and `drawn`."""
        actions, drawn, generator = list(self.actions), dict(self.drawn), self.core.np_random.bit_generator
        generator.state = self.began
        self.reset()
        for number, action in enumerate(actions):
            generator.state = drawn.get(number, generator.state)
            self.step(action)
        generator.state = self.now


def played_again(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """Return an environment whose core is `PlayedAgain`, below its wrappers."""
    if not isinstance(env, gym.Wrapper):
        return PlayedAgain(env)
    innermost = env
    while isinstance(innermost.env, gym.Wrapper):
        innermost = innermost.env
    innermost.env = PlayedAgain(innermost.env)
    return env
