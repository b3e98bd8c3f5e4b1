"""Environments as users write them: each keeps its state in an unusual place, or pays in an unusual number type.

`env_id` "tests.own_envs:Name-v0" observes vectors, and "tests.own_envs:NameTable-v0" the number of a state.
"""

import random
import time
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import WrapperSpec

STATES = 6
LENGTH = 7  # steps until an episode is truncated

Step = tuple[Any, Any, Any, Any, dict[str, Any]]


class Walk(gym.Env[Any, Any]):
    """Places in a row: action 1 goes right, 0 left, sometimes the other way at random; pays the place plus noise.

    Args:
        table: observe the number of the place, instead of a vector of that and the step.
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


class Shaped(gym.RewardWrapper[Any, Any]):
    """A wrapper with a mistake; a test calls it one of this package's."""

    def reward(self, reward: Any) -> Any:
        return reward - self.penalty  # type: ignore[attr-defined]


class Repeats(gym.Wrapper[Any, Any, Any, Any]):
    """Takes each action up to four times."""

    def step(self, action: Any) -> Step:
        for _ in range(4):
            result = self.env.step(action)
            if result[2] or result[3]:
                break
        return result


class Endless(Walk):
    def step(self, action: int) -> Step:
        obs, reward, *_ = super().step(action)
        return obs, reward, False, False, {}


class Born(Walk):
    """Draws a number while it is made, from NumPy's global generator; shows it as its place."""

    def __init__(self, table: bool = False) -> None:
        super().__init__(table)
        self.born = float(np.random.rand())  # noqa: NPY002

    def show(self) -> Any:
        return self.place if self.table else np.array([self.born, self.count], np.float32)


def early(noise: float) -> float:
    return noise


def late(noise: float) -> float:
    return noise / 2


class Changes(Walk):
    """Draws otherwise from its sixtieth step on."""

    def __init__(self, table: bool = False) -> None:
        super().__init__(table)
        self.steps, self.kind = 0, early

    def noise(self) -> float:
        self.steps += 1
        self.kind = early if self.steps < 60 else late
        return self.kind(super().noise())


gym.register(
    "RepeatsTable-v0",
    "tests.own_envs:Endless",
    kwargs={"table": True},
    max_episode_steps=8,
    additional_wrappers=(WrapperSpec("Repeats", "tests.own_envs:Repeats", {}),),
)


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


class OwnGenerator(Walk):
    """Draws from its own generator, created when it is seeded."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        return super().reset(seed=seed)

    def noise(self) -> float:
        return float(self.rng.random())


class GlobalNumpy(Walk):
    """Draws from NumPy's global generator."""

    def noise(self) -> float:
        return float(np.random.random())  # noqa: NPY002


class GlobalPython(Walk):
    """Draws from Python's global generator."""

    def noise(self) -> float:
        return random.random()


class Counts(Walk):
    """Its noise depends on the number of episodes so far."""

    episodes = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.episodes += 1
        return super().reset(seed=seed)

    def noise(self) -> float:
        return (0.37 * self.episodes + 0.21 * self.count) % 1


class Names(Walk):
    """Keeps the state of its noise under names that Gymnasium uses for other things."""

    def __init__(self, table: bool = False) -> None:
        super().__init__(table)
        self.P = {0: [0.1]}
        self.metadata = {"render_modes": [], "luck": 0.2}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if type(self.spec) is not list:
            self.spec: Any = [0.3]
        return super().reset(seed=seed)

    def noise(self) -> float:
        self.P[0][0] += 0.37
        self.metadata["luck"] += 0.11
        self.spec[0] += 0.23
        return float(self.P[0][0] + self.metadata["luck"] + self.spec[0]) % 1


class Shared(Walk):
    """Has several names for one array, and for a part of it."""

    def __init__(self, table: bool = False) -> None:
        super().__init__(table)
        self.position = np.zeros((2, 2))
        self.things, self.by_name, self.row = [self.position], {"me": self.position}, self.position[1]

    def noise(self) -> float:
        self.things[0] += 0.37
        self.by_name["me"][0, 0] += 0.11
        self.row += 0.19
        return float(self.position.sum()) % 1


class Above(gym.Wrapper[Any, Any, Any, Any]):
    """Moves an array of the environment below."""

    def __init__(self, table: bool = False) -> None:
        core = Shared(table)
        super().__init__(core)
        self.below = core.position

    def step(self, action: int) -> Step:
        self.below += 0.29
        return self.env.step(action)


class Samples(Walk):
    """Draws from its spaces, one of which is the class's."""

    action_space: gym.Space[Any] = gym.spaces.Discrete(2)

    def __init__(self, table: bool = False) -> None:
        super().__init__(table)
        del self.action_space

    def show(self) -> Any:
        return self.observation_space.sample()

    def noise(self) -> float:
        return 0.5 * float(self.action_space.sample())


class World:
    """A physics engine whose state can't be read."""

    def __init__(self) -> None:
        self.position = 0.0


class Falls(gym.Env[Any, Any]):
    """Its state is in its world, which is new for each episode, or for none."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,))

    def __init__(self, renewed: bool = True) -> None:
        self.renewed, self.world = renewed, World()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if self.renewed:
            self.world = World()
        self.world.position = self.np_random.normal()
        return np.array([self.world.position]), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.world.position += 0.3 * action[0] - self.world.position * action[1] + self.np_random.normal()
        return np.array([self.world.position]), 0.0, False, False, {}


class Nested(Samples):
    """Observes samples from a nested space."""

    def __init__(self) -> None:
        super().__init__()
        spaces = {"place": gym.spaces.Discrete(3), "more": gym.spaces.Tuple([gym.spaces.Box(0, 1, (2,))])}
        self.observation_space = gym.spaces.Dict(spaces)


class Holds(gym.Env[Any, Any]):
    """Plays another environment, which it holds like a wrapper without being one."""

    def __init__(self, table: bool = False) -> None:
        self.env = Samples(table)
        self.action_space, self.observation_space = self.env.action_space, self.env.observation_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self.env.reset(seed=seed)

    def step(self, action: int) -> Step:
        return self.env.step(action)


class Closure(Walk):
    """Keeps the state of its noise in a function's closure."""

    def __init__(self, table: bool = False) -> None:
        super().__init__(table)
        luck = 0.0

        def draw() -> float:
            nonlocal luck
            luck = (luck + 0.37) % 1
            return luck

        self.noise = draw  # type: ignore[method-assign]


class Hidden(Walk):
    """Keeps its luck, a number, where `capture` does not look, as a library might. `what` depends on it.

    Args:
        table: as in `Walk`.
        what: `observation`, `reward` or `end`.
        seconds: for how long it sleeps at each step.
    """

    __slots__ = ("luck",)

    def __init__(self, table: bool = False, what: str = "reward", seconds: float = 0.0) -> None:
        super().__init__(table)
        self.luck, self.what, self.seconds = 0.0, what, seconds

    def step(self, action: int) -> Step:
        time.sleep(self.seconds)
        self.luck += 1
        obs, reward, terminated, truncated, info = super().step(action)
        if self.what == "reward":
            reward += self.luck
        if self.what == "observation":
            obs = obs + self.luck
        return obs, reward, terminated, truncated or (self.what == "end" and self.luck % 5 == 0), info


def register(name: str, make: Any, **arguments: Any) -> None:
    """Make an environment known by two ids."""
    gym.register(f"{name}-v0", make, kwargs=arguments)
    gym.register(f"{name}Table-v0", make, kwargs={**arguments, "table": True})


KINDS = {"Float64": np.float64, "Float32": np.float32, "Int64": np.int64, "Bool": np.bool_, "Array": np.array}
for kind_name, kind in KINDS.items():
    register(f"Pays{kind_name}", Pays, kind=kind)

# Those with which a resumed run continues as if nothing had happened.
EXACT = (OwnGenerator, GlobalNumpy, GlobalPython, Counts, Holds, Names, Shared, Above, Samples, Closure)
for make in (Walk, Hidden, Changes, *EXACT):
    register(make.__name__, make)
gym.register("Falls-v0", "tests.own_envs:Falls", max_episode_steps=30)
