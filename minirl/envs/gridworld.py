"""The grid of the source notebook: walk from the start to the goal, around obstacles.

    S . .      rewards:  100 for the step onto the goal, which ends the episode
    . # .                -10 for a step against a wall or an obstacle; the agent stays where it is
    . . G                 -1 for any other step

States are numbered row by row; actions are 0 up, 1 right, 2 down, 3 left. The model is in `P`, as in Gymnasium's
toy-text environments: `P[state][action] = [(probability, next_state, reward, terminated)]`.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

Cell = tuple[int, int]  # (row, column)
Model = dict[int, dict[int, list[tuple[float, int, float, bool]]]]

MOVES: tuple[Cell, ...] = ((-1, 0), (0, 1), (1, 0), (0, -1))
GOAL_REWARD, BLOCKED_REWARD, STEP_REWARD = 100.0, -10.0, -1.0
CELL_PIXELS = 64  # side of a cell in `rgb_array`
COLOURS = {".": (255, 255, 255), "#": (70, 70, 70), "G": (90, 190, 90), "S": (210, 225, 245), "A": (220, 60, 50)}


class GridWorld(gym.Env[Any, Any]):
    """A square grid with one start, one goal and any number of obstacles. In `P`, the goal and obstacles lead nowhere.

    Args:
        size: rows and columns.
        start: (row, column) where episodes begin.
        goal: where they end.
        obstacles: cells that can't be entered.
        render_mode: `"ansi"` for text, `"rgb_array"` for a picture, None for neither.

    Raises:
        ValueError: if the layout makes no sense: a cell outside the grid, two things on one, or no way to the goal.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # noqa: RUF012 - Gymnasium's own way

    def __init__(
        self,
        size: int = 3,
        start: Cell = (0, 0),
        goal: Cell = (2, 2),
        obstacles: tuple[Cell, ...] = ((1, 1),),
        render_mode: str | None = None,
    ) -> None:
        check_layout(size, start, goal, obstacles)
        self.size = size
        self.start, self.goal = start, goal
        self.obstacles = frozenset(obstacles)
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Discrete(size * size)
        self.action_space = gym.spaces.Discrete(len(MOVES))
        self.start_state, self.goal_state = self._state(self.start), self._state(self.goal)
        self.P: Model = {
            state: {action: [self._outcome(state, action)] for action in range(len(MOVES))}
            for state in range(size * size)
        }
        if self.goal_state not in self.reachable():
            raise ValueError(f"the goal {self.goal} can't be reached from the start {self.start}")
        self.state = self.start_state

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Go back to the start."""
        super().reset(seed=seed)
        self.state = self.start_state
        return self.state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """Move one cell, or stay and pay if that is not possible."""
        ((_, self.state, reward, terminated),) = self.P[self.state][action]
        return self.state, reward, terminated, False, {}

    def render(self) -> str | NDArray[np.uint8] | None:
        """Return the grid as text or as a picture: A is the agent, G the goal, S the start, # an obstacle."""
        cells = [[self._symbol((row, column)) for column in range(self.size)] for row in range(self.size)]
        if self.render_mode == "ansi":
            return "\n".join(" ".join(row) for row in cells) + "\n"
        if self.render_mode == "rgb_array":
            colours = np.array([[COLOURS[symbol] for symbol in row] for row in cells], np.uint8)
            picture = colours.repeat(CELL_PIXELS, axis=0).repeat(CELL_PIXELS, axis=1)
            picture[::CELL_PIXELS], picture[:, ::CELL_PIXELS] = 150, 150  # lines between the cells
            return picture
        return None

    def _state(self, cell: Cell) -> int:
        return cell[0] * self.size + cell[1]

    def _cell(self, state: int) -> Cell:
        return divmod(state, self.size)

    def _outcome(self, state: int, action: int) -> tuple[float, int, float, bool]:
        """Return (probability, next_state, reward, terminated) of an action; nothing follows the goal."""
        cell = self._cell(state)
        if cell == self.goal or cell in self.obstacles:
            return 1.0, state, 0.0, True
        target = (cell[0] + MOVES[action][0], cell[1] + MOVES[action][1])
        if not inside(target, self.size) or target in self.obstacles:
            return 1.0, state, BLOCKED_REWARD, False
        if target == self.goal:
            return 1.0, self._state(target), GOAL_REWARD, True
        return 1.0, self._state(target), STEP_REWARD, False

    def reachable(self) -> set[int]:
        """Return the states that can be reached from the start."""
        seen, frontier = {self.start_state}, [self.start_state]
        while frontier:
            for ((_, next_state, _, _),) in self.P[frontier.pop()].values():
                if next_state not in seen:
                    seen.add(next_state)
                    frontier.append(next_state)
        return seen

    def _symbol(self, cell: Cell) -> str:
        if self._state(cell) == self.state:
            return "A"
        if cell == self.goal:
            return "G"
        if cell in self.obstacles:
            return "#"
        return "S" if cell == self.start else "."


def check_layout(size: int, start: Cell, goal: Cell, obstacles: tuple[Cell, ...]) -> None:
    """Check that the cells of a layout are in the grid and do not coincide.

    Raises:
        ValueError: naming the first cell that is wrong.
    """
    if not isinstance(size, int) or size < 2:
        raise ValueError(f"size must be a whole number of at least 2, not {size}")
    if not isinstance(obstacles, tuple):
        raise ValueError(f"obstacles must be a tuple of cells, ((1, 1),) say, not {obstacles}")
    for name, cell in [("start", start), ("goal", goal), *(("obstacle", cell) for cell in obstacles)]:
        if not inside(cell, size):
            raise ValueError(f"the {name} {cell} must be a cell (row, column) inside the {size}x{size} grid")
        if name != "obstacle" and cell in obstacles:
            raise ValueError(f"the {name} {cell} must not be an obstacle")
    if start == goal:
        raise ValueError(f"start and goal must be two cells, not both {start}")


def inside(cell: Any, size: int) -> bool:
    """Whether something is a cell of the grid."""
    return isinstance(cell, tuple) and len(cell) == 2 and all(isinstance(i, int) and 0 <= i < size for i in cell)
