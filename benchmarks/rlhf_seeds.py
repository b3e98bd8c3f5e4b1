"""The results of RLHF runs, one row each: reproduces the table of docs/rlhf.md.

    python train_rlhf.py --seeds 0-4 --run-dir runs/rlhf-five
    python benchmarks/rlhf_seeds.py runs/rlhf-five/seed0 runs/rlhf-five/seed1 ...

Each run's language model and policy write 1,000 texts from new prompts, the same ones for both.
"""

import argparse
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minirl.checks import ConfigError
from minirl.evaluate import evaluate
from minirl.runs.checkpoints import load_checkpoint
from minirl.runs.directory import load_settings
from minirl.runs.flags import fail

TEXTS, SEED = 1_000, 10_000
COLUMNS = ["hidden before", "after", "grammatical before", "after", "reward model's score", "KL", "accuracy", "best"]


def row(run_dir: Path) -> list[float]:
    """Return the numbers of `COLUMNS` of a run.

    Raises:
        ConfigError: if it is not a finished run of rlhf.
    """
    result = evaluate(run_dir, episodes=TEXTS, seed=SEED)
    if "after" not in result:
        raise ConfigError(f"{run_dir} must be a run of rlhf that has come to PPO")
    before, after = result["before"], result["after"]
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    accuracy = [events.Scalars(f"reward/{name}")[-1].value for name in ("accuracy", "best_accuracy")]
    pairs = [side[name] for name in ("hidden_score", "grammatical") for side in (before, after)]
    return [*pairs, after["reward_score"], after["kl"], *accuracy]


def main() -> None:
    """Print a row for each run, their mean and their standard deviation."""
    parser = argparse.ArgumentParser(description="What runs of RLHF came to.")
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    arguments = parser.parse_args()
    print(f"| seed | {' | '.join(COLUMNS)} | minutes |\n|{' --- |' * (len(COLUMNS) + 2)}")
    rows = []
    try:
        for run_dir in arguments.run_dirs:
            seed, minutes = load_settings(run_dir)["seed"], load_checkpoint(run_dir, "rlhf")["seconds"] / 60
            rows.append(row(run_dir))
            print(f"| {seed} | {' | '.join(f'{number:.3f}' for number in rows[-1])} | {minutes:.1f} |", flush=True)
    except ConfigError as error:
        fail(error)
    for name, numbers in (("mean", np.mean(rows, axis=0)), ("std", np.std(rows, axis=0))):
        print(f"| {name} | {' | '.join(f'{number:.3f}' for number in numbers)} | |")


if __name__ == "__main__":
    main()
