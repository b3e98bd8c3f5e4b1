"""Pictures of what was learned and of observations: each function turns data into a figure, without reading a run."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from minirl.results.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

Image = NDArray[np.uint8]
Values = NDArray[np.float64]
CENTRED: dict[str, Any] = {"ha": "center", "va": "center"}

LEFT_BLUE, RIGHT_RED = "#7FB3E0", "#B2182B"  # the blue is light and the red dark, in gray too
CHOSEN, OTHERS = "#D55E00", "#9AA5B1"
DARK, EMPTY, GOAL_GREEN = "#4A4A4A", "#F2F2F2", "#CDEBDD"


@dataclass(frozen=True)
class Grid:
    """How the states and actions of a Q-table are laid out in the plane.

    Attributes:
        rows: of cells; the states are numbered row by row.
        columns: of cells.
        moves: for each action, how far it goes: (rows down, columns to the right).
        names: of special states: "START", "GOAL", or what can't be entered.
    """

    rows: int
    columns: int
    moves: tuple[tuple[int, int], ...]
    names: dict[int, str]


def q_values_figure(q_table: Values, grid: Grid, title: str) -> "Figure":
    """Draw a Q-table (S, A) twice: every action's value on its side of the cell, and the best action's as an arrow.

    A state whose actions all have the same value was not learned (or nothing follows it), and stays empty.

    Raises:
        ConfigError: if matplotlib is missing.
    """
    beside = grid.columns <= 2 * grid.rows
    down, right = (1, 2) if beside else (2, 1)
    cell = min(1.3, 11 / (grid.columns * right))  # inches
    figure = new_figure(cell * grid.columns * right + 1.2, (cell * grid.rows + 0.45) * down + 0.5)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    learned = np.flatnonzero((q_table != q_table[:, :1]).any(axis=1))
    shown = q_table[learned] if len(learned) else np.zeros(1)
    colours = ScalarMappable(Normalize(shown.min(), shown.max()), "viridis")
    panels: Any = figure.subplots(down, right)
    _draw_cells(panels[0], grid, "Q(s, a) of every action")
    _draw_cells(panels[1], grid, "the best action and its value")
    for state in learned.tolist():
        row, column = divmod(state, grid.columns)
        _draw_sides(panels[0], q_table[state], row, column, grid, colours, 6.2 * cell)
        _draw_best(panels[1], q_table[state].max(), row, column, grid, colours, 8 * cell)
    _draw_arrows(panels[1], q_table, learned, grid, colours)
    figure.colorbar(colours, ax=panels, pad=0.02, label="Q(s, a), discounted return")
    figure.suptitle(title)
    return figure


def _draw_cells(axes: "Axes", grid: Grid, title: str) -> None:
    """Draw the empty grid, row 0 at the top, with the names of the cells that can't be entered or left."""
    from matplotlib.patches import Rectangle

    for state in range(grid.rows * grid.columns):
        row, column = divmod(state, grid.columns)
        name = grid.names.get(state, "")
        colour = {"": EMPTY, "START": EMPTY, "GOAL": GOAL_GREEN}.get(name, DARK)
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor="black", linewidth=0.8))
        if name not in ("", "START"):
            ink = "black" if name == "GOAL" else "white"
            axes.text(column, row, name.lower(), color=ink, fontsize=8, **CENTRED)
    axes.set(xlim=(-0.5, grid.columns - 0.5), ylim=(grid.rows - 0.5, -0.5), aspect="equal", title=title)
    axes.set(xticks=range(grid.columns), yticks=range(grid.rows), xlabel="column", ylabel="row")
    axes.tick_params(length=0)


def _draw_sides(
    axes: "Axes", q_values: Values, row: int, column: int, grid: Grid, colours: "ScalarMappable", fontsize: float
) -> None:
    """Draw the four triangles of a cell: each action's value on the side that it leads to, the best in bold."""
    from matplotlib.patches import Polygon

    for action, (value, (down, right)) in enumerate(zip(q_values.tolist(), grid.moves, strict=True)):
        side = [(column + (right + turn * down) / 2, row + (down + turn * right) / 2) for turn in (-1, 1)]
        triangle = np.array([(column, row), *side])
        axes.add_patch(Polygon(triangle, facecolor=_colour(colours, value), edgecolor="white", linewidth=0.8))
        text = f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"
        style = {**CENTRED, "fontsize": fontsize, "fontweight": "bold" if action == q_values.argmax() else "normal"}
        axes.text(column + 0.29 * right, row + 0.33 * down, text, color=_ink(colours, value), **style)


def _draw_best(
    axes: "Axes", value: float, row: int, column: int, grid: Grid, colours: "ScalarMappable", fontsize: float
) -> None:
    """Draw a cell in the colour of its best action's value, with that value at the bottom."""
    from matplotlib.patches import Rectangle

    corner = column - 0.5, row - 0.5
    axes.add_patch(Rectangle(corner, 1, 1, facecolor=_colour(colours, value), edgecolor="white", linewidth=0.8))
    ink = _ink(colours, value)
    axes.text(column, row + 0.34, f"{value:.2f}", color=ink, fontsize=fontsize, **CENTRED)
    if grid.names.get(row * grid.columns + column) == "START":
        axes.text(column - 0.46, row - 0.46, "start", color=ink, ha="left", va="top", fontsize=0.8 * fontsize)


def _draw_arrows(
    axes: "Axes", q_table: Values, states: NDArray[np.int64], grid: Grid, colours: "ScalarMappable"
) -> None:
    """Draw the first of the best actions of these states as arrows, in data coordinates: y grows downwards."""
    rows, columns = np.divmod(states, grid.columns)
    down, right = np.array(grid.moves)[q_table[states].argmax(axis=1)].T
    inks = [_ink(colours, value) for value in q_table[states].max(axis=1)]
    tails, lengths = (columns - 0.28 * right, rows - 0.1 - 0.28 * down), (0.56 * right, 0.56 * down)
    axes.quiver(*tails, *lengths, color=inks, angles="xy", scale_units="xy", scale=1, units="xy", width=0.055)


def _colour(colours: "ScalarMappable", value: float) -> tuple[float, float, float, float]:
    rgba: tuple[float, float, float, float] = colours.to_rgba(np.array([value]))[0]
    return rgba


def _ink(colours: "ScalarMappable", value: float) -> str:
    """Return a text colour that is readable on the colour of a value."""
    red, green, blue, _ = _colour(colours, value)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"


def policy_map_figure(
    angles: Values, velocities: Values, actions: NDArray[np.int64], game: Values, title: str
) -> "Figure":
    """Draw what a policy does with CartPole's pole: blue where it pushes left, red where it pushes right.

    Args:
        angles: of the pole (n,), evenly spaced, in degrees; positive leans right.
        velocities: angular velocities (m,), evenly spaced, in degrees a second.
        actions: (m, n) 0 left, 1 right.
        game: (steps, 3) angle, velocity and action of each step of a game; its cart may be anywhere.
        title: of the picture.

    Raises:
        ConfigError: if matplotlib is missing.
    """
    figure = new_figure(6.5, 4.8)
    from matplotlib.colors import ListedColormap
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    axes = figure.subplots()
    axes.pcolormesh(angles, velocities, actions, cmap=ListedColormap([LEFT_BLUE, RIGHT_RED]), vmin=0, vmax=1)
    axes.axhline(0, color="white", linewidth=0.6)
    axes.axvline(0, color="white", linewidth=0.6)
    colours = np.where(game[:, 2] == 1, RIGHT_RED, LEFT_BLUE)
    axes.scatter(game[:, 0], game[:, 1], c=colours, s=11, edgecolors="black", linewidths=0.6)
    axes.set(xlim=(angles[0], angles[-1]), xlabel="pole angle (degrees from upright, + leans right)", title=title)
    axes.set(ylim=(velocities[0], velocities[-1]), ylabel="angular velocity of the pole (degrees per second)")
    blue, red = Patch(facecolor=LEFT_BLUE, label="push left"), Patch(facecolor=RIGHT_RED, label="push right")
    dots = Line2D([], [], marker="o", ms=4, mec="black", mfc="none", ls="", label="a greedy game, cart anywhere")
    axes.legend(handles=[blue, red, dots], loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    return figure


@dataclass(frozen=True)
class Moment:
    """A moment of a game: its agent step, the frame on the screen (H, W, 3), and pi(a|s) of each action (A,)."""

    step: int
    frame: Image
    probabilities: NDArray[np.float64]
    name: str


def action_probabilities_figure(moments: list[Moment], names: list[str], title: str) -> "Figure":
    """Draw the probability of each action, as bars over the frame of the game; the most likely one stands out.

    Raises:
        ConfigError: if matplotlib is missing.
    """
    bar_height = max(1.5, 0.25 * len(names) + 0.45)
    frame_width = 2.3
    frame_height = frame_width * moments[0].frame.shape[0] / moments[0].frame.shape[1]
    figure = new_figure(frame_width * len(moments) + 1.5, bar_height + frame_height + 0.9)
    panels: Any = figure.subplots(
        2, len(moments), sharey="row", squeeze=False, height_ratios=(bar_height, frame_height)
    )
    for bars, screen, moment in zip(*panels, moments, strict=True):
        best = int(moment.probabilities.argmax())
        colours = [CHOSEN if action == best else OTHERS for action in range(len(names))]
        drawn = bars.barh(names, moment.probabilities, color=colours)
        bars.bar_label(drawn, [f"{p:.1%}" for p in moment.probabilities], padding=2, fontsize=8)
        bars.set(xlim=(0, 1.22), xticks=(0, 0.5, 1), xlabel="probability", title=moment.name)
        bars.spines[["top", "right"]].set_visible(False)
        screen.imshow(moment.frame, interpolation="nearest")
        screen.set(xticks=[], yticks=[], xlabel=f"agent step {moment.step:,} of the game")
    panels[0, 0].invert_yaxis()  # action 0 at the top
    figure.suptitle(title)
    return figure


@dataclass(frozen=True)
class Stages:
    """A screen of an Atari game on its way to the network.

    Attributes:
        raw: (210, 160, 3), the maximum of the last two frames of the emulator.
        gray: (210, 160).
        resized: (size, size).
        stack: (4, size, size): the resized frame and those of the agent steps before, oldest first.
    """

    raw: Image
    gray: Image
    resized: Image
    stack: Image


def preprocessing_figure(stages: Stages, title: str) -> "Figure":
    """Draw the raw, gray and resized frame and the stack of the last frames side by side.

    Raises:
        ConfigError: if matplotlib is missing.
    """
    figure = new_figure(9.8, 4.1)
    halves: Any = figure.subfigures(1, 2, width_ratios=(6.5, 3.3))
    left, right = halves
    singles: Any = left.subplots(1, 3)
    names = ("1. raw frame", "2. gray", "3. resized")
    for axes, picture, name in zip(singles, (stages.raw, stages.gray, stages.resized), names, strict=True):
        _show_frame(axes, picture, name)
        height, width, *colours = picture.shape
        axes.set_xlabel(f"{height} x {width} pixels" + (f", {colours[0]} colours" if colours else ""))
    ages = ("3 agent steps ago", "2 steps ago", "1 step ago", "now")
    for axes, picture, age in zip(right.subplots(2, 2).flat, stages.stack, ages, strict=True):
        _show_frame(axes, picture, age)
    right.suptitle("4. stacked", fontsize=10)
    count, height, width = stages.stack.shape
    right.supxlabel(f"{count} x {height} x {width} pixels", fontsize=10)
    figure.suptitle(title)
    return figure


def _show_frame(axes: "Axes", picture: Image, name: str) -> None:
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(name, fontsize=10)
