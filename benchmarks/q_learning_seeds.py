"""How many seeds of Q-learning reach Q* on the source notebook's grid, with its settings, by the table's initial value.

    python benchmarks/q_learning_seeds.py

A seed counts if every entry of every state that can be visited ends within 0.01 of the exact value.
"""

import contextlib
import io

import numpy as np

from minirl.envs.gridworld import GridWorld
from minirl.q_learning import QLearningConfig, train, value_iteration

SEEDS = 300
TOLERANCE = 0.01


def main() -> None:
    """Train and print a line for each initial value."""
    grid = GridWorld()
    states = sorted(grid.reachable() - {grid.goal_state})
    for initial_value in (0.0, 100.0):
        errors = []
        for seed in range(SEEDS):
            config = QLearningConfig(seed=seed, initial_value=initial_value)
            with contextlib.redirect_stderr(io.StringIO()):  # no progress here
                learned = train(config)
            errors.append(np.abs(learned - value_iteration(grid, config.gamma))[states].max())
        reached = sum(error < TOLERANCE for error in errors)
        print(f"initial value {initial_value:5.0f}: {reached} of {SEEDS} seeds, largest error {max(errors):.2g}")


if __name__ == "__main__":
    main()
