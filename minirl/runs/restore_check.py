"""Whether environments play on from what a checkpoint holds of them as they would have: tried out, not believed.

What `minirl.envs.state` captures is all that it can see. A game may also lie in a module's variable, in a library or in
an open file, and a resumed run would then differ without a word.
"""

import contextlib
import copy
import math
import time
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np

from minirl.envs.state import capture, restore, seeded_reset
from minirl.envs.workers import MakeEnv
from minirl.runs.checkpoints import brief, random_state, set_random_state, untouched_random_state

BEFORE, AFTER = 6, 40  # steps until an environment is captured, and steps that are compared
PATIENCE = 0.5  # seconds for the environment, and as many for its copy
SEED = 1  # not that with which an environment is restored: a copy must not be right by chance

Env = gym.Env[Any, Any]
Seen = tuple[int, dict[str, Any]]  # the number of a step, and what it gave, by name


def how_a_copy_differs(make_env: MakeEnv) -> str:
    """Return in what a copy of an environment plays otherwise than the environment itself, "" for nothing.

    A new environment plays some steps and is captured, and another new one is put into that state. Both go on with the
    same actions, through resets, too, and must show and pay the same to the last bit. The environments of the training
    are not touched, and random numbers are put back.

    This takes about a second at most. Of slow environments fewer steps are compared. Nothing is where one can't be made
    and play in half a second, or not twice, or fails: the training will say why.
    """
    with untouched_random_state():
        try:
            deadline = time.monotonic() + PATIENCE
            with contextlib.closing(make_env()) as env:
                chooser = copy.deepcopy(env.action_space)
                chooser.seed(SEED)
                actions = [chooser.sample() for _ in range(BEFORE + AFTER)]
                seeded_reset(env, SEED)
                list(play(env, actions[:BEFORE], deadline))
                state, random_numbers = capture(env), {"random_state": random_state()}
                expected = list(play(env, actions[BEFORE:], deadline))
                if not expected:
                    return ""
                with contextlib.closing(make_env()) as other:
                    return how_it_differs(other, state, random_numbers, actions[BEFORE:], expected)
        except Exception:
            return ""


def how_it_differs(env: Env, state: Any, random_numbers: Any, actions: list[Any], expected: list[Seen]) -> str:
    """Put an environment into a state, play, and return in what that is not as expected."""
    try:
        restore(env, state)
        set_random_state(random_numbers)
        for (number, one), (_, other) in zip(expected, play(env, actions, math.inf), strict=False):
            if different := [name for name in one if one[name] != other[name]]:
                return f"a copy of one gave another {' and another '.join(different)} at step {number}"
    except Exception as error:
        return f"a copy of one can't be made or played ({brief(error)})"
    return ""


def play(env: Env, actions: list[Any], deadline: float) -> Iterator[Seen]:
    """Take actions; yield what comes of each, to the bit. Start anew at an end, and half way in any case."""
    for number, action in enumerate(actions, start=1):
        if time.monotonic() > deadline:
            return
        obs, reward, terminated, truncated, _ = env.step(action)
        gave = {"observation": np.asarray(obs).tobytes(), "reward": np.float64(reward).tobytes()}
        yield number, {**gave, "end": (bool(terminated), bool(truncated))}
        if terminated or truncated or number == len(actions) // 2:
            yield number, {"first observation": np.asarray(env.reset()[0]).tobytes()}
