"""Learning curves, read from the TensorBoard events of runs."""

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minirl.checks import ConfigError
from minirl.results.figure import COLOURS, DASHES, new_figure
from minirl.runs.directory import load_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAST_EPISODES = 100
POINTS = 500  # of the mean over seeds
# Settings that may differ within a group of runs.
CHANGES_NO_CURVE = ("seed", "num_workers", "num_threads", "checkpoint_frequency", "video_frequency")
UNITS = {"steps": "agent steps", "minutes": "minutes of training"}


@dataclass(frozen=True)
class Curve:
    """The returns of a run's episodes (E,), with the agent step and the minute of training at which each ended.

    Q-learning's episodes are logged as means of the last `episodes_per_point`, those of other algorithms one by one.
    `settings` are those of `config.json`.
    """

    settings: dict[str, Any]
    steps: NDArray[np.int64]
    minutes: NDArray[np.float64]
    returns: NDArray[np.float64]
    episodes_per_point: int = 1

    def mean_of_last(self, episodes: int = LAST_EPISODES) -> NDArray[np.float64]:
        """Return the mean of the last returns at each point (E,); at the start, of fewer."""
        window = max(episodes // self.episodes_per_point, 1)
        sums = np.concatenate([[0.0], np.cumsum(self.returns)])
        ends = np.arange(1, len(self.returns) + 1)
        starts = np.maximum(ends - window, 0)
        means: NDArray[np.float64] = (sums[ends] - sums[starts]) / (ends - starts)
        return means


def read_scalars(run_dir: Path) -> dict[str, list[Any]]:
    """Return the events of each scalar in a run's TensorBoard files, by tag: each has a `step` and a `value`."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def read_curve(run_dir: Path, q_learning_episodes: int) -> Curve:
    """Read the episodes of a run; what an interrupted session did after its last checkpoint is left out.

    Args:
        run_dir: the directory of a run.
        q_learning_episodes: how many episodes a point of Q-learning is the mean of.

    Raises:
        ConfigError: if the directory holds no run, or no episode has finished in it.
    """
    settings = load_settings(run_dir)
    scalars = read_scalars(run_dir)
    if not {"charts/episodic_return", "charts/minutes"} <= scalars.keys():
        raise ConfigError(f"{run_dir} must hold TensorBoard events of at least one finished episode")
    episodes, clock = scalars["charts/episodic_return"], scalars["charts/minutes"]
    steps = np.array([event.step for event in episodes])
    # Episodes end between two readings of the clock.
    minutes = np.interp(steps, [0] + [event.step for event in clock], [0.0] + [event.value for event in clock])
    per_point = q_learning_episodes if settings["algorithm"] == "q_learning" else 1
    return Curve(settings, steps, minutes, np.array([event.value for event in episodes]), per_point)


def group_by_seed(curves: list[Curve]) -> list[list[Curve]]:
    """Group the runs whose settings differ only in the seed, in the given order."""
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        settings = {name: value for name, value in curve.settings.items() if name not in CHANGES_NO_CURVE}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(curve)
    return list(groups.values())


def labels(groups: list[list[Curve]]) -> list[str]:
    """Name each group: its algorithm and environment, what sets it apart from others with these, and its seeds."""
    names = []
    for group in groups:
        others = [other[0].settings for other in groups if _kind(other) == _kind(group)]
        names.append(", ".join([_kind(group), *apart(group[0].settings, others), _seeds(group)]))
    return names


def _kind(group: list[Curve]) -> str:
    return f"{group[0].settings['algorithm']} {group[0].settings['env_id']}"


def apart(settings: dict[str, Any], others: list[dict[str, Any]], *but: str) -> list[str]:
    """Return the settings whose values differ in other runs, except these and those that change no curve."""
    return [
        f"{name} {'none' if value is None else value}"
        for name, value in settings.items()
        if name not in (*CHANGES_NO_CURVE, *but) and any(other.get(name, value) != value for other in others)
    ]


def _seeds(group: list[Curve]) -> str:
    seeds = {curve.settings["seed"] for curve in group}
    if len(group) == 1:
        return f"seed {seeds.pop()}"
    return f"{len(group)} seeds" if len(seeds) == len(group) else f"{len(group)} runs"


def mean_and_range(
    xs: list[NDArray[Any]], ys: list[NDArray[np.float64]], points: int = POINTS
) -> tuple[NDArray[np.float64], ...]:
    """Return the mean, the minimum and the maximum of several curves, at points where all of them are known.

    Args:
        xs: of each curve, rising.
        ys: of each curve, as long as its x.
        points: number of points, from the largest first x to the smallest last x.

    Returns:
        x, mean, minimum and maximum, (points,) each.
    """
    last = min(x[-1] for x in xs)
    grid = np.linspace(min(max(x[0] for x in xs), last), last, points)
    values = np.stack([np.interp(grid, x, y) for x, y in zip(xs, ys, strict=True)])
    return grid, values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def curves_figure(curves: list[Curve], x: str = "both") -> "Figure":
    """Draw the mean return of the last 100 episodes against agent steps, minutes of training or both.

    Runs that differ only in the seed become one line, their mean, in a band from the lowest to the highest.

    Args:
        curves: of the runs.
        x: `steps`, `minutes` or `both`.

    Raises:
        ConfigError: if matplotlib is missing.
    """
    groups = group_by_seed(curves)
    sides = ["steps", "minutes"] if x == "both" else [x]
    width = 9.0 if x == "both" else 6.5
    legend = [textwrap.fill(label, int(11 * width)) for label in labels(groups)]
    figure = new_figure(width, 3.7 + 0.2 * "\n".join(legend).count("\n") + 0.2 * len(legend))
    panels = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    for axes, side in zip(panels, sides, strict=True):
        _draw_groups(axes, groups, side)
    panels[0].set_ylabel(f"return, mean of the last {LAST_EPISODES} games")
    env_ids = {curve.settings["env_id"] for curve in curves}
    title = f"Return in training, {env_ids.pop()}" if len(env_ids) == 1 else "Return in training"
    if len(groups) < len(curves):
        title += "\n(several seeds: mean, and a band from minimum to maximum)"
    figure.suptitle(title, fontsize=11)
    figure.legend(panels[0].lines, legend, loc="outside lower center", frameon=False, fontsize=9)
    return figure


def _draw_groups(axes: "Axes", groups: list[list[Curve]], side: str) -> None:
    from matplotlib.ticker import EngFormatter

    for number, group in enumerate(groups):
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
        xs, ys = [getattr(curve, side) for curve in group], [curve.mean_of_last() for curve in group]
        x, y = xs[0], ys[0]
        if len(group) > 1:
            x, y, low, high = mean_and_range(xs, ys)
            width = 2 if x[0] == x[-1] else 0  # of the band's edge: a band as narrow as one point has no area
            axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=width)
        axes.plot(x, y, marker="o" if x[0] == x[-1] else None, **style)  # a line of one point is invisible
    if side == "steps":
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set(xlabel=UNITS[side])
    axes.grid(alpha=0.3)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
