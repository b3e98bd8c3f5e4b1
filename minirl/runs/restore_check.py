"""Whether restored environments continue as the original ones would have: tested, not assumed.

`minirl.envs.state` captures only what it can see. Part of a game's state may also be in a module's variable, in a
library or in an open file, and a resumed run would then silently differ.
"""

import contextlib
import copy
import math
import time
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np

from minirl.checks import described
from minirl.envs.state import capture, restore, seeded_reset
from minirl.envs.workers import MakeEnv
from minirl.runs.checkpoints import random_state, set_random_state, untouched_random_state

BEFORE, AFTER = 6, 40  # steps before an environment is captured, and steps that are compared
PATIENCE = 0.5  # seconds for the environment, and the same for its copy
SEED = 1  # not the seed with which an environment is restored: a copy must not be right by chance

Env = gym.Env[Any, Any]
Seen = tuple[int, dict[str, Any]]  # the number of a step, and its results by name


def how_a_copy_differs(make_env: MakeEnv) -> str:
    """Return how a copy of an environment plays differently from the environment itself, "" if it does not.

    A new environment plays some steps and is captured, and another new one is put into that state. Both continue with
    the same actions, also through resets, and must give the same observations and rewards to the last bit. The
    environments of the training are not touched, and random states are restored.

    This takes about a second at most. For slow environments fewer steps are compared; none if one can't be made and
    play in half a second, can't be made twice, or fails: the training will say why.
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
        except (Exception, SystemExit):
            return ""


def how_it_differs(env: Env, state: Any, random_numbers: Any, actions: list[Any], expected: list[Seen]) -> str:
    """Put an environment into a state, play, and return how the results differ from the expected ones."""
    try:
        restore(env, state)
        set_random_state(random_numbers)
        for (number, one), (_, other) in zip(expected, play(env, actions, math.inf), strict=False):
            if different := [name for name in one if one[name] != other[name]]:
                return f"a copy of one gave another {' and another '.join(different)} at step {number}"
    except (Exception, SystemExit) as error:
        return f"a copy of one can't be made or played ({described(error)})"
    return ""


def play(env: Env, actions: list[Any], deadline: float) -> Iterator[Seen]:
    """Take actions; yield the results of each, bit for bit. Reset at the end of an episode, and once half way."""
    for number, action in enumerate(actions, start=1):
        if time.monotonic() > deadline:
            return
        obs, reward, terminated, truncated, _ = env.step(action)
        gave = {"observation": np.asarray(obs).tobytes(), "reward": np.float64(reward).tobytes()}
        yield number, {**gave, "end": (bool(terminated), bool(truncated))}
        if terminated or truncated or number == len(actions) // 2:
            yield number, {"first observation": np.asarray(env.reset()[0]).tobytes()}
