"""Pictures of runs: `python -m minirl.plots RUN_DIR [RUN_DIR ...] [--kind KIND] [--output FILE]`.

`curves` draws the returns of any number of runs; the other kinds draw what one run has learned or observes. The data
come from TensorBoard events and from checkpoints; reading these executes no code.
"""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from minirl.checks import ConfigError
from minirl.evaluate import TRAINING_SCRIPTS
from minirl.plots.of_run import KINDS, draw_picture
from minirl.q_learning import LOG_EVERY
from minirl.results.curves import Curve, curves_figure, read_curve
from minirl.results.figure import check_output, save_figure
from minirl.results.scores import read_scores, scores_figure
from minirl.runs.directory import load_settings
from minirl.runs.flags import Parser, errors_in_one_line, read_path
from minirl.runs.progress import Progress, answer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Curve", "curves_figure", "draw_curves", "draw_picture", "main", "read_curve", "save_figure"]


def draw_curves(run_dirs: list[Path], x: str = "both") -> "Figure":
    """Draw the learning curves of runs; a run named twice is drawn once. Runs of rlhf have scores instead.

    Raises:
        ConfigError: if a directory holds no run in which an episode has finished, or matplotlib is missing.
    """
    different = list({run_dir.resolve(): run_dir for run_dir in run_dirs}.values())
    texts = [run_dir for run_dir in different if load_settings(run_dir)["algorithm"] == "rlhf"]
    if texts:
        if len(texts) < len(different):
            raise ConfigError(f"runs of rlhf must be drawn without others, and {texts[0]} is one")
        return scores_figure([read_scores(run_dir) for run_dir in texts])
    curves = []
    with contextlib.closing(Progress(len(different), unit="runs", shown=len(different) > 1)) as progress:
        for run_dir in different:
            curves.append(read_curve(run_dir, LOG_EVERY))
            progress.update(len(curves))
    return curves_figure(curves, x)


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Parse the flags and draw."""
    parser = Parser(scripts=TRAINING_SCRIPTS, prog="python -m minirl.plots", description="Draw pictures of runs.")
    parser.add_argument("run_dirs", type=read_path, nargs="+", metavar="RUN_DIR", help="directories of runs")
    kinds = ["curves", *KINDS]
    about = f"what to draw: {', '.join(kinds)} (default: curves)"
    parser.add_argument("--kind", choices=kinds, default="curves", metavar="KIND", help=about)
    axis = "of the curves: steps, minutes or both (default: both)"
    parser.add_argument("--x", choices=["steps", "minutes", "both"], default="both", metavar="AXIS", help=axis)
    where = "picture to write (default: curve.png or KIND.png in the first run)"
    parser.add_argument("--output", type=read_path, metavar="FILE", help=where)
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    arguments = parser.parse_args(argv)
    name = "curve" if arguments.kind == "curves" else arguments.kind
    output: Path = arguments.output or arguments.run_dirs[0] / f"{name}.png"
    output = output if output.suffix else output.with_suffix(".png")
    if arguments.output is not None:
        check_output(output)
    if arguments.kind == "curves":
        figure = draw_curves(arguments.run_dirs, arguments.x)
    elif len(arguments.run_dirs) == 1:
        figure = draw_picture(arguments.kind, arguments.run_dirs[0], arguments.device)
    else:
        raise ConfigError(f"--kind {arguments.kind} must go with one RUN_DIR, not {len(arguments.run_dirs)}")
    save_figure(figure, output)
    answer(output)
