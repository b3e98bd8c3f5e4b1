"""Does PPO on Pong learn the same by default (compiled, bfloat16 if faster) and plainly (eager, float32)?

    python train_ppo.py --seed 42 --total-timesteps 601000                                    # and --seed 1, 2, 3
    python train_ppo.py --seed 42 --total-timesteps 601000 --no-compile --precision float32   # and --seed 1, 2, 3
    python benchmarks/same_learning.py --plain RUN_DIR ... --fast RUN_DIR ... --output FILE

Draws the curves up to the end of the shortest, and prints the table of docs/performance.md.
"""

import argparse
from pathlib import Path

import numpy as np

from minirl.q_learning import LOG_EVERY
from minirl.results.curves import LAST_EPISODES, Curve, read_curve
from minirl.results.figure import COLOURS, DASHES, new_figure, save_figure

EVERY = 100_000  # agent steps per row of the table


def table(curves: dict[str, list[Curve]], last: int) -> str:
    """Return the mean of the last 100 games of each run, every 100,000 agent steps and at the last one."""
    rows = [["agent steps"]]
    for kind, group in curves.items():
        rows[0] += [f"{kind}: seeds {', '.join(str(curve.settings['seed']) for curve in group)}", "mean"]
    rows.append(["---"] * len(rows[0]))
    for step in [*range(EVERY, last, EVERY), last]:
        rows.append([f"{step:,}"])
        for group in curves.values():
            means = [float(np.interp(step, curve.steps, curve.mean_of_last())) for curve in group]
            rows[-1] += [", ".join(f"{mean:.1f}" for mean in means), f"{np.mean(means):.1f}"]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Read, draw and print."""
    parser = argparse.ArgumentParser(description="The learning curves of the default and of the plain path.")
    parser.add_argument("--plain", type=Path, nargs="+", required=True, metavar="RUN_DIR")
    parser.add_argument("--fast", type=Path, nargs="+", required=True, metavar="RUN_DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    kinds = {"eager, float32": arguments.plain, "default": arguments.fast}
    curves = {kind: [read_curve(run_dir, LOG_EVERY) for run_dir in run_dirs] for kind, run_dirs in kinds.items()}
    last = min(int(curve.steps[-1]) for group in curves.values() for curve in group)

    figure = new_figure(6.5, 4.0)
    axes = figure.subplots()
    for colour, (kind, group) in zip(COLOURS, curves.items(), strict=False):
        for dashes, curve in zip(DASHES, group, strict=False):
            shown = curve.steps <= last
            label = f"{kind}, seed {curve.settings['seed']}"
            axes.plot(curve.steps[shown], curve.mean_of_last()[shown], color=colour, linestyle=dashes, label=label)
    axes.set(
        title=f"PPO on {curves['default'][0].settings['env_id']}",
        xlabel="agent steps",
        ylabel=f"return, mean of the last {LAST_EPISODES} games",
    )
    axes.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:,.0f} k")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, arguments.output)
    print(table(curves, last))


if __name__ == "__main__":
    main()
