"""Small environments that each do one odd thing, as users' environments do: `env_id` "tests.peculiar_envs:Name-v0".

Each exists twice: with a vector as observation and, as `NameTable-v0`, with a number of a Discrete space.
"""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple
from numpy.typing import NDArray

PLACES = 6
ODD_STEP = 3  # the step of an episode at which something odd happens
VECTOR = Box(-1, 1, (2,), np.float32)


def as_vector(place: int) -> NDArray[np.float32]:
    return np.array([place / PLACES, 1], np.float32)


class Line(gym.Env[Any, Any]):
    """Six places in a row. Each step goes to the next and pays 1; the episode ends at the last one, after 5 steps.

    Args:
        space: of observations.
        show: a place -> the observation.
        odd: what to do at step `ODD_STEP` with what `step` would return.
        start: what to do with what `reset` would return.
        info: of each step and reset.
        image: what `render` returns.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012 - Gymnasium's own way

    def __init__(
        self,
        space: gym.Space[Any] = VECTOR,
        show: Callable[[int], Any] = as_vector,
        odd: Callable[..., Any] | None = None,
        start: Callable[..., Any] | None = None,
        info: Any = None,
        image: Callable[[], Any] | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.observation_space, self.action_space = space, Discrete(2)
        self.show, self.odd, self.start, self.info, self.image = show, odd, start, info, image
        self.render_mode = render_mode
        self.place = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.place = 0
        returned = self.show(0), dict(self.info or {})
        return returned if self.start is None else self.start(*returned)

    def step(self, action: Any) -> Any:
        assert type(action) is np.int64, "as from a space's `sample`"
        assert action.item() in (0, 1)
        self.place += 1
        returned = self.show(self.place), 1.0, self.place == PLACES - 1, False, dict(self.info or {})
        return self.odd(*returned) if self.odd is not None and self.place == ODD_STEP else returned

    def render(self) -> Any:
        return np.full((8, 8, 3), 40 * self.place, np.uint8) if self.image is None else self.image()


class NeverMade(Line):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.level = dict[str, int]()["level"]


class OldReset(Line):
    def reset(self) -> Any:  # type: ignore[override]
        return super().reset(seed=None)[0]


class LikeMiniGrid(Line):
    """Observes what MiniGrid's environments do: a view of 7 x 7 cells, a direction and a sentence; 5 places to go."""

    def __init__(self, size: int = 5, render_mode: str | None = None) -> None:
        view = Box(0, 255, (7, 7, 3), np.uint8)
        parts = {"image": view, "direction": Discrete(4), "mission": Text(99)}
        super().__init__(Dict(parts), self.look, render_mode=render_mode)

    def look(self, place: int) -> Any:
        return {"image": np.full((7, 7, 3), place, np.uint8), "direction": place % 4, "mission": "go there"}


def fail() -> Any:
    raise LookupError("the map\nhas a hole")


def leave() -> Any:
    raise SystemExit("the window was closed")


def paying(reward: Any) -> dict[str, Any]:
    return {"odd": lambda obs, paid, *rest: (obs, reward, *rest)}


def showing(odd: Any) -> dict[str, Any]:
    return {"odd": lambda obs, *rest: (odd, *rest)}


def register(name: str, **options: Any) -> None:
    gym.register(f"{name}-v0", "tests.peculiar_envs:Line", kwargs=options)


def both(name: str, **options: Any) -> None:
    """Register an environment with vectors and one with a table's numbers."""
    register(name, **options)
    register(f"{name}Table", **{"space": Discrete(PLACES), "show": int, **options})


both("Plain")
# Rewards
both("RewardNone", **paying(None))
both("RewardText", **paying("1"))
both("RewardPair", **paying(np.array([1.0, 2.0])))
both("RewardList", **paying([1.0]))
both("RewardNan", **paying(np.nan))
both("RewardArray", **paying(np.array([3.0])))
both("RewardFloat32", **paying(np.float32(3)))
both("RewardInt64", **paying(np.int64(3)))
both("RewardBool", **paying(np.bool_(True)))
both("RewardScalarArray", **paying(np.array(3.0)))
both("EndArrays", odd=lambda obs, paid, *_: (obs, paid, np.array([False]), np.bool_(True), {}))
# Observations of a Box
both("Shape", **showing(np.zeros(3, np.float32)))
both("Ragged", **showing([[1.0], [1.0, 2.0]]))
both("Nothing", **showing(None))
both("Words", **showing("here"))
both("NotFinite", **showing(np.array([np.nan, 0], np.float32)))
both("NotFiniteFirst", show=lambda place: np.array([np.nan, 0], np.float32))
both("Listed", show=lambda place: [place / PLACES, 1])
both("Doubles", show=lambda place: as_vector(place).astype(np.float64))
register("Wrapped", space=Box(0, 255, (2,), np.uint8), show=lambda place: np.array([place, 100 * place]))
for kind in (np.uint8, np.int32, np.int64, np.float32):
    picture = np.full((2, 36, 36), 40, kind)
    register(f"Images-{kind.__name__}", space=Box(0, 255, (2, 36, 36), kind), show=picture.__mul__)
# States
both("Minus", **showing(-1))
both("Beyond", **showing(PLACES))
both("Float", **showing(3.0))
both("StateArray", **showing(np.array([3])))
both("StateInt64", **showing(np.int64(3)))
register("Choices", space=MultiDiscrete([6, 2]), show=lambda p: [p, p % 2])
register("Bits", space=MultiBinary(2), show=lambda p: [p // 3, p % 2])
register("FromTen", space=Discrete(6, start=10), show=lambda p: p + 10)
register("NoChoice", space=MultiDiscrete([6, 2]), show=lambda p: [p, 2])
# Info, ends, exceptions
both("Messages", info={"reset_reward": 1000.0, "episode": 3})
both("Four", odd=lambda obs, paid, terminated, truncated, info: (obs, paid, terminated, info))
both("ResetAlone", start=lambda obs, info: obs)
both("ResetPair", start=lambda obs, info: (0.5, 1.0))
both("NoInfo", odd=lambda obs, paid, terminated, truncated, info: (obs, paid, terminated, truncated, None))
both("Raises", odd=lambda *_: fail())
both("Exits", odd=lambda *_: leave())
both("ResetRaises", start=lambda *_: fail())
both("RenderRaises", image=fail)
gym.register("NeverMade-v0", "tests.peculiar_envs:NeverMade")
gym.register("NeverMadeTable-v0", "tests.peculiar_envs:NeverMade")
gym.register("OldReset-v0", "tests.peculiar_envs:OldReset")
gym.register("OldResetTable-v0", "tests.peculiar_envs:OldReset", kwargs={"space": Discrete(PLACES), "show": int})
gym.register("Missing-v0", "tests.peculiar_envs:NoSuchClass")
# Spaces that are refused
SPACES = {
    "Empty": Box(0, 1, (0,)),
    "Scalar": Box(0, 1, ()),
    "Flat": Box(0, 255, (84, 84), np.uint8),
    "Gray": Box(0, 255, (84, 84, 1), np.uint8),
    "ColoursLast": Box(0, 255, (84, 84, 3), np.uint8),
    "Cells": Box(0, 255, (7, 7, 3), np.uint8),
    "Parts": Dict({"a": Discrete(2), "b": VECTOR}),
    "Pair": Tuple((Discrete(2), VECTOR)),
    "Many": Discrete(10**13),
}
for name, space in SPACES.items():
    register(name, space=space, show=lambda place, space=space: space.sample())
