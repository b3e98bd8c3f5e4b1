"""Environment steps per second of Q-learning on the grid, against the source notebook's own loop.

    python benchmarks/q_learning_speed.py

The notebook's loop is rewritten here with the same functions: states are tuples, the table is a NumPy array, an action
is a move. Both train with the notebook's settings, in turn, in one process; the ratio is taken pair by pair. Exit
status 1 if the median ratio is below the goal.
"""

import contextlib
import io
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minirl.q_learning import QLearningConfig, train
from minirl.runs.checkpoints import load_checkpoint

PAIRS = 5
GOAL = 2.5
Cell = tuple[int, int]


def notebook_loop(config: QLearningConfig) -> int:
    """Train as the notebook does; return the number of steps."""
    size, start, goal, obstacle = 3, (0, 0), (2, 2), (1, 1)
    moves: list[Cell] = [(-1, 0), (0, 1), (1, 0), (0, -1)]

    def valid(state: Cell) -> bool:
        return 0 <= state[0] < size and 0 <= state[1] < size and state != obstacle

    def successor(state: Cell, move: Cell) -> Cell:
        moved = (state[0] + move[0], state[1] + move[1])
        return moved if valid(moved) else state

    def reward_of(state: Cell, moved: Cell) -> int:
        if moved == goal:
            return 100
        if moved in (obstacle, state):
            return -10
        return -1

    def choose(state: Cell, table: NDArray[np.float64]) -> Cell:
        if random.uniform(0, 1) < config.epsilon:
            return random.choice(moves)
        return moves[np.argmax(table[state])]

    def update(table: NDArray[np.float64], state: Cell, move: Cell, reward: int, moved: Cell) -> None:
        action = moves.index(move)
        target = reward + config.gamma * np.max(table[moved])
        table[state][action] += config.alpha * (target - table[state][action])

    table = np.zeros((size, size, len(moves)))
    steps = 0
    for _ in range(config.num_episodes):
        state = start
        while state != goal:
            move = choose(state, table)
            moved = successor(state, move)
            reward = reward_of(state, moved)
            update(table, state, move, reward, moved)
            state = moved
            steps += 1
    return steps


def notebook_speed(config: QLearningConfig) -> float:
    """Train as the notebook does; return steps per second."""
    started = time.perf_counter()
    steps = notebook_loop(config)
    return steps / (time.perf_counter() - started)


def minirl_speed(config: QLearningConfig, steps: int) -> float:
    """Train as `train_q.py` does, without a run directory; return steps per second."""
    started = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # no progress here
        train(config)
    return steps / (time.perf_counter() - started)


def count_steps(config: QLearningConfig) -> int:
    """Return the number of steps of a training run, which depends on the seed."""
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stderr(io.StringIO()):
        train(config, run_dir=directory)
        steps: int = load_checkpoint(Path(directory), "q_learning")["global_step"]
    return steps


def main() -> None:
    """Measure in turn and print."""
    config = QLearningConfig()
    steps = count_steps(config)
    ratios = []
    for pair in range(PAIRS + 1):
        theirs = notebook_speed(config)
        ours = minirl_speed(config, steps)
        if pair > 0:  # the first warms up
            ratios.append(ours / theirs)
            print(f"notebook {theirs:9,.0f} steps/s   minirl {ours:9,.0f} steps/s   ratio {ours / theirs:.2f}")
    median = statistics.median(ratios)
    print(f"median ratio {median:.2f} (from {min(ratios):.2f} to {max(ratios):.2f}); goal {GOAL}")
    raise SystemExit(0 if median >= GOAL else 1)


if __name__ == "__main__":
    main()
