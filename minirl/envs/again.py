"""Episodes that are played again: how to restore an environment whose physics can't be copied.

Box2D's world is in its library's memory, and nothing can read all of it. But if each episode has its own world, it
depends only on the random numbers that it began with, on the actions since, and on what wrappers have drawn between
them: played again from there, it reaches the same state, bit for bit. LunarLander makes a new world for each episode;
BipedalWalker and CarRacing empty the old one, which is not the same to the last bit.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding


class PlayedAgain(gym.Wrapper[Any, Any, Any, Any]):
    """Wraps the core of an environment with a `world`, and records what its episode depends on.

    If the last reset made a new world, `minirl.envs.state` captures this record in place of the core.

    Attributes:
        began: the state of the core's random number generator before the episode's reset.
        actions: those of the episode so far.
        drawn: for each action before which a wrapper drew from the generator, its number and the generator's state.
        now: the generator's state at the capture.
        renewed: whether the episode has its own world.
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
        """Start an episode."""
        generator = self.core.np_random if seed is None else seeding.np_random(seed)[0]
        self.began, self.actions, self.drawn, world = generator.bit_generator.state, [], [], self.core.world
        first = self.env.reset(seed=seed, options=options)
        self.renewed, self._left = self.core.world is not world, self.core.np_random.bit_generator.state
        return first

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Record the action, and take it."""
        state = self.core.np_random.bit_generator.state
        if state != self._left:
            self.drawn.append([len(self.actions), state])
        self.actions.append(action)
        result = self.env.step(action)
        self._left = self.core.np_random.bit_generator.state
        return result

    def parts(self) -> dict[str, Any]:
        """Return what is captured, by name: the core, or the record of its episode, with the actions in one array."""
        if not self.renewed:
            return {"env": self.env}
        spaces = {name: getattr(self, name) for name in ("action_space", "observation_space")}
        now = self.core.np_random.bit_generator.state
        return {"began": self.began, "actions": np.array(self.actions), "drawn": self.drawn, "now": now, **spaces}

    def play(self) -> None:
        """Replay the episode that is in `began`, `actions` and `drawn`."""
        actions, drawn, generator = list(self.actions), dict(self.drawn), self.core.np_random.bit_generator
        generator.state = self.began
        self.reset()
        for number, action in enumerate(actions):
            generator.state = drawn.get(number, generator.state)
            self.step(action)
        generator.state = self.now


def played_again(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """Wrap the core of an environment in `PlayedAgain`, below its wrappers; return the environment."""
    if not isinstance(env, gym.Wrapper):
        return PlayedAgain(env)
    innermost = env
    while isinstance(innermost.env, gym.Wrapper):
        innermost = innermost.env
    innermost.env = PlayedAgain(innermost.env)
    return env
