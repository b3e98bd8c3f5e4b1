"""Pong's environments alone, 8 at once: agent steps per second against ale-py's own vector environment, in C++.

    python benchmarks/env_speed.py

Random actions; full preprocessing on both sides. The peer's bare vector environment returns stacks from threads of one
process, ours from worker processes, as training gets them. Exit status 1 if the median ratio is below the goal.
"""

import argparse
import time

import numpy as np
from pairs import Timing, compare, report

NUM_ENVS = 8
WARM_UP, STEPS = 100, 1500  # vector steps
GOAL = 1.3


def step_minirl() -> Timing:
    """Step this project's environments, with as many worker processes as cores."""
    from minirl.envs.make import make_vector_env

    started = time.perf_counter()
    rng = np.random.default_rng(0)
    with make_vector_env("PongNoFrameskip-v4", NUM_ENVS) as envs:
        envs.reset(seed=0)
        for step in range(WARM_UP + STEPS):
            if step == WARM_UP:
                clock = time.perf_counter()
            envs.step(rng.integers(6, size=NUM_ENVS))
        return Timing(time.perf_counter() - clock, clock - started)


def step_ale_py() -> Timing:
    """Step ale-py's environments, with as many threads as cores."""
    from ale_py.vector_env import AtariVectorEnv

    from minirl.envs.vector import available_cores

    started = time.perf_counter()
    rng = np.random.default_rng(0)
    envs = AtariVectorEnv("pong", NUM_ENVS, num_threads=available_cores(), episodic_life=True)
    envs.reset(seed=0)
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            clock = time.perf_counter()
        envs.step(rng.integers(6, size=NUM_ENVS))
    seconds = time.perf_counter() - clock
    envs.close()
    return Timing(seconds, clock - started)


SIDES = {"minirl": step_minirl, "ale-py": step_ale_py}


def main() -> None:
    """Measure pairs in turn and print them."""
    parser = argparse.ArgumentParser(description="Pong's environments against ale-py's AtariVectorEnv.")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help="measure one side here")
    arguments = parser.parse_args()
    if arguments.side:
        report(SIDES[arguments.side](), STEPS * NUM_ENVS)
        return
    if not compare("environments", __file__, "ale-py", GOAL, arguments.pairs, lambda side: ["--side", side]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
