"""What a trick gains in a whole training run, or what a commit changed: with and without, in turn, in pairs.

    python benchmarks/without.py dqn cartpole --trick products        tests/switches.py names the tricks
    python benchmarks/without.py ppo pong --checkout ../before        a checkout of another commit
    python benchmarks/without.py ppo cartpole --trick events --side-by-side

Trained and timed as in `ppo_speed.py` and `dqn_speed.py`, each side in its own process. A ratio above 1 is the gain of
the trick, or how much faster this tree is. If the machine's speed changes from second to second, use `--side-by-side`:
both sides at once, on one core each, with the cores swapped from pair to pair, differ less by chance.
"""

import argparse
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dqn_speed
import ppo_speed
import pytest
from pairs import report, sample

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from tests.switches import SWITCHES, switch_off  # noqa: E402 - the tests are not an installed package

SCRIPTS = {"ppo": ppo_speed, "dqn": dqn_speed}


def main() -> None:
    """Measure pairs in turn and print them; or measure one side, for the process that measures pairs."""
    parser = argparse.ArgumentParser(description="What a trick gives to a whole training, or what a commit changed.")
    parser.add_argument("algorithm", choices=SCRIPTS)
    parser.add_argument("work", choices={*ppo_speed.WORKS, *dqn_speed.WORKS})
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--trick", choices=SWITCHES)
    what.add_argument("--checkout", type=Path, help="a checkout of another commit")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--side-by-side", action="store_true", help="both at once, on cores 0 and 1 (Linux)")
    parser.add_argument("--here", action="store_true", help="measure without the trick in this process")
    arguments = parser.parse_args()
    script = SCRIPTS[arguments.algorithm]
    work = script.WORKS.get(arguments.work)
    if work is None:
        parser.error(f"{arguments.algorithm} has no {arguments.work}: it has {', '.join(script.WORKS)}")
    if arguments.here:
        switch_off(arguments.trick, pytest.MonkeyPatch())
        report(script.train_minirl(work), work.clock_to - work.clock_from)
        return

    here = HERE.parent
    checkout: Path = (arguments.checkout or here).resolve()
    plain = [arguments.work, "--side", "minirl"]
    with_it = str(HERE / f"{arguments.algorithm}_speed.py"), plain, here
    without_it = __file__, [arguments.algorithm, arguments.work, "--trick", str(arguments.trick), "--here"], here
    if arguments.checkout:
        without_it = str(checkout / "benchmarks" / f"{arguments.algorithm}_speed.py"), plain, checkout
    name, ratios = f"{arguments.algorithm} {arguments.work}, {arguments.trick or arguments.checkout}", []
    for pair in range(1, arguments.pairs + 1):
        cores = (pair % 2, 1 - pair % 2) if arguments.side_by_side else (None, None)
        with ThreadPoolExecutor(2 if arguments.side_by_side else 1) as pool:
            without, ours = pool.map(sample, *zip(without_it, with_it, strict=True), cores)
        ratios.append(ours.speed / without.speed)
        print(
            f"{name}, pair {pair}: {without.speed:,.0f} and {ours.speed:,.0f} steps a second: {ratios[-1]:.2f}",
            flush=True,
        )
    print(f"{name}: median {statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")


if __name__ == "__main__":
    main()
