"""A Q-table as text: the source notebook's two tables for a grid, a summary for anything else."""

import numpy as np
from numpy.typing import NDArray

from minirl.envs.gridworld import GridWorld
from minirl.envs.make import as_it_is, make_env

ARROWS = ["^", ">", "v", "<"]


def describe(q_table: NDArray[np.float64], env_id: str) -> str:
    """Return what `train_q.py` prints of a Q-table (S, A): both grids for a GridWorld, otherwise a summary."""
    env = make_env(env_id, one_hot=False)
    grid = env.unwrapped
    env.close()
    if isinstance(grid, GridWorld) and as_it_is(env):
        return f"\n{detailed_grid(q_table, grid)}\n\n{best_actions_grid(q_table, grid)}"
    return summary(q_table)


def detailed_grid(q_table: NDArray[np.float64], grid: GridWorld) -> str:
    """Return every Q-value, with a row for each action and a column for each cell."""
    cells = [(row, column) for row in range(grid.size) for column in range(grid.size)]
    header = "   |" + "|".join(f"   ({row},{column})   " for row, column in cells) + "|"
    rule = "-" * len(header)
    lines = ["Detailed Q-table Grid:", header, rule]
    for action, arrow in enumerate(ARROWS):
        values = [_name(cell, grid) or f" {q_table[state, action]:9.2f} " for state, cell in enumerate(cells)]
        lines += [f" {arrow} |" + "".join(f"{value}|" for value in values), rule]
    return "\n".join(lines)


def best_actions_grid(q_table: NDArray[np.float64], grid: GridWorld) -> str:
    """Return the best action of each cell and its Q-value, laid out as the grid is."""
    rule = "-" * (14 * grid.size + 1)
    lines = ["Best Actions Grid:", rule]
    for row in range(grid.size):
        values = []
        for column in range(grid.size):
            q_values = q_table[row * grid.size + column]
            best = int(q_values.argmax())
            values.append(_name((row, column), grid) or f"{ARROWS[best]}:{q_values[best]:7.2f}  ")
        lines += ["| " + "".join(f"{value} | " for value in values), rule]
    return "\n".join(lines)


def _name(cell: tuple[int, int], grid: GridWorld) -> str | None:
    if cell == grid.goal:
        return "   GOAL    "
    return " OBSTACLE  " if cell in grid.obstacles else None


def summary(q_table: NDArray[np.float64]) -> str:
    """Return how much of a table was learned, and for each action where it is best and its values there.

    A state whose actions all have the same value counts as not learned: that is how the table starts.
    """
    num_states, num_actions = q_table.shape
    learned = (q_table != q_table[:, :1]).any(axis=1)
    best = q_table.argmax(axis=1)
    lines = [
        f"Q-table: {num_states} states x {num_actions} actions; {int(learned.sum())} states have learned values.",
        "",
        "action   best in states   mean value there   highest   lowest",
    ]
    for action in range(num_actions):
        values = q_table[learned & (best == action), action]
        numbers = f"{values.mean():18.2f}{values.max():10.2f}{values.min():9.2f}" if len(values) else ""
        lines.append(f"{action:6d}{len(values):17d}{numbers}")
    return "\n".join(lines)
