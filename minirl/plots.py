"""Learning curves from TensorBoard events: `python -m minirl.plots RUN_DIR [RUN_DIR ...] --output curve.png`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minirl.cli import Parser, fail
from minirl.config import ConfigError
from minirl.q_learning import LOG_EVERY
from minirl.runs import load_settings

LAST_EPISODES = 100


@dataclass(frozen=True)
class Curve:
    """The returns of a run's episodes (E,), with the agent step and the minute of training at which each ended.

    Q-learning's episodes are logged in means of `episodes_per_point`, everything else's one by one.
    """

    name: str
    steps: NDArray[np.int64]
    minutes: NDArray[np.float64]
    returns: NDArray[np.float64]
    episodes_per_point: int = 1

    def mean_of_last(self, episodes: int = LAST_EPISODES) -> NDArray[np.float64]:
        """Return the mean of the last returns at each point, of fewer at the start (E,)."""
        window = max(episodes // self.episodes_per_point, 1)
        sums = np.concatenate([[0.0], np.cumsum(self.returns)])
        ends = np.arange(1, len(self.returns) + 1)
        starts = np.maximum(ends - window, 0)
        means: NDArray[np.float64] = (sums[ends] - sums[starts]) / (ends - starts)
        return means


def read_curve(run_dir: Path) -> Curve:
    """Read the episodes of a run; what an interrupted session did after its last checkpoint is left out.

    Raises:
        ConfigError: if the directory holds no run, or no episode has finished in it.
    """
    settings = load_settings(run_dir)
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    if not {"charts/episodic_return", "charts/minutes"} <= set(events.Tags()["scalars"]):
        raise ConfigError(f"{run_dir} must hold TensorBoard events of at least one finished episode")
    episodes = events.Scalars("charts/episodic_return")
    clock = events.Scalars("charts/minutes")
    steps = np.array([event.step for event in episodes])
    # Episodes end between two readings of the clock.
    minutes = np.interp(steps, [0] + [event.step for event in clock], [0.0] + [event.value for event in clock])
    name = f"{settings['algorithm']} {settings['env_id']}, seed {settings['seed']}"
    per_point = LOG_EVERY if settings["algorithm"] == "q_learning" else 1
    return Curve(name, steps, minutes, np.array([event.value for event in episodes]), per_point)


def plot_curves(curves: list[Curve], output: Path) -> None:
    """Draw the mean return of the last 100 episodes against agent steps and against minutes.

    Raises:
        ConfigError: if matplotlib is missing, or the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError as error:
        raise ConfigError("plots need matplotlib, the extra `plot`: pip install -e '.[plot]'") from error
    figure = Figure(figsize=(9, 3.4), dpi=100, layout="constrained")
    by_steps: Any
    by_minutes: Any
    by_steps, by_minutes = figure.subplots(1, 2, sharey=True)
    for curve in curves:
        by_steps.plot(curve.steps, curve.mean_of_last(), label=curve.name)
        by_minutes.plot(curve.minutes, curve.mean_of_last(), label=curve.name)
    by_steps.xaxis.set_major_formatter(EngFormatter(sep=" "))
    by_steps.set(xlabel="agent steps", ylabel=f"return, mean of the last {LAST_EPISODES} games")
    by_minutes.set(xlabel="minutes of training")
    for axes in (by_steps, by_minutes):
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    by_steps.legend(loc="upper left", frameon=False)
    try:
        figure.savefig(output)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output must be a picture that can be written: {error}") from error


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and draw."""
    parser = Parser(prog="python -m minirl.plots", description="Draw the learning curves of runs.")
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="directories of runs")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="picture to write (default: curve.png in the first run)"
    )
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.run_dirs[0] / "curve.png"
    output = output if output.suffix else output.with_suffix(".png")
    try:
        plot_curves([read_curve(run_dir) for run_dir in arguments.run_dirs], output)
    except ConfigError as error:
        fail(error)
    print(output)


if __name__ == "__main__":
    main()
