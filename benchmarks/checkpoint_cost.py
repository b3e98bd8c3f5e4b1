"""What checkpoints cost: the share of PPO's time on Pong that goes into one every 10,000 agent steps.

    python benchmarks/checkpoint_cost.py [--env-id CartPole-v1]

Trains with the default settings for some 40,000 steps and adds up the time spent on saving: capturing the games,
serialising, reading back, flushing to disk. The first checkpoint (before the first step) and compilation are left out.

Exit status 1 if the share is 2 % or more.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from minirl.ppo import PPOConfig, train
from minirl.runs.checkpoints import load_checkpoint
from minirl.runs.run import Run

FREQUENCY = 10_000  # agent steps
GOAL = 0.02
LOADS = 20


def main() -> None:
    """Train, and print the share."""
    parser = argparse.ArgumentParser(description="What a checkpoint every 10,000 steps costs PPO on Pong.")
    parser.add_argument("--total-timesteps", type=int, default=40_960)
    parser.add_argument("--env-id", default=PPOConfig.env_id)
    arguments = parser.parse_args()
    checkpoint = Run.checkpoint
    saving: list[float] = []
    clock: list[float] = []  # after each update

    def timed(run: Run, *arguments: object, **options: object) -> None:
        saved_before, started = run.last_saved, time.perf_counter()
        checkpoint(run, *arguments, **options)  # type: ignore[arg-type]
        clock.append(time.perf_counter())
        if run.last_saved != saved_before:
            saving.append(clock[-1] - started)

    Run.checkpoint = timed  # type: ignore[method-assign,assignment]
    steps = arguments.total_timesteps
    config = PPOConfig(env_id=arguments.env_id, total_timesteps=steps, checkpoint_frequency=FREQUENCY, compile=True)
    with tempfile.TemporaryDirectory() as directory:
        train(config, run_dir=Path(directory) / "run", device="cpu")
        megabytes = (Path(directory) / "run" / "checkpoint.pt").stat().st_size / 1e6
        reading = []
        for _ in range(LOADS):
            started = time.process_time()
            load_checkpoint(Path(directory) / "run", "ppo")
            reading.append(time.process_time() - started)

    share = sum(saving) / (clock[-1] - clock[1])  # clock[1]: after the first update, which compiles
    each = ", ".join(f"{1000 * seconds:.0f}" for seconds in saving)
    print(f"checkpoints of {megabytes:.1f} MB took {each} ms: {share:.2%} of the time (goal: under {GOAL:.0%})")
    print(f"to read one takes {1000 * min(reading):.0f} ms of the processor's time, at best")
    sys.exit(share >= GOAL)


if __name__ == "__main__":
    main()
