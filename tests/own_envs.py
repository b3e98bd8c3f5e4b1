"""Environments as people write them: each keeps something in another place, or pays in another type of number.

`env_id` "tests.own_envs:Name-v0" shows vectors, and "tests.own_envs:NameTable-v0" the number of a state.
"""

from typing import Any

import gymnasium as gym
import numpy as np

STATES = 6
LENGTH = 7  # steps until an episode is cut

Step = tuple[Any, Any, Any, Any, dict[str, Any]]


class Walk(gym.Env[Any, Any]):
    """Places in a row: action 1 goes right, 0 left, and by chance the other way; pays the place, and some noise.

    Args:
        table: whether it shows the number of the place, or that and the step as a vector.
    """

    def __init__(self, table: bool = False) -> None:
        self.table = table
        self.action_space: gym.Space[Any] = gym.spaces.Discrete(2)
        self.observation_space: gym.Space[Any] = (
            gym.spaces.Discrete(STATES) if table else gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        )
        self.place, self.count = 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.place, self.count = 0, 0
        return self.show(), {}

    def step(self, action: int) -> Step:
        noise = self.noise()
        right = (action == 1) != (noise < 0.3)
        self.place = min(max(self.place + (1 if right else -1), 0), STATES - 1)
        self.count += 1
        return self.show(), self.place + noise, self.place == STATES - 1, self.count == LENGTH, {}

    def show(self) -> Any:
        return self.place if self.table else np.array([self.place, self.count], np.float32)

    def noise(self) -> float:
        """A number from 0 to 1."""
        return float(self.np_random.random())


class Pays(Walk):
    """Pays, ends and shows its state in NumPy's types."""

    def __init__(self, kind: Any, table: bool = False) -> None:
        super().__init__(table)
        self.kind = kind

    def step(self, action: int) -> Step:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, self.kind(reward), np.bool_(terminated), np.bool_(truncated), info

    def show(self) -> Any:
        return np.int64(self.place) if self.table else super().show()


def register(name: str, make: Any, **arguments: Any) -> None:
    """Make an environment known by two ids."""
    gym.register(f"{name}-v0", make, kwargs=arguments)
    gym.register(f"{name}Table-v0", make, kwargs={**arguments, "table": True})


KINDS = {"Float64": np.float64, "Float32": np.float32, "Int64": np.int64, "Bool": np.bool_, "Array": np.array}
for kind_name, kind in KINDS.items():
    register(f"Pays{kind_name}", Pays, kind=kind)
