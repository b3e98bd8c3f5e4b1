"""What several ranks cost and give: the all-reduce by itself, and whole trainings by 1 and 2 ranks and by one process.

    torchrun --nproc-per-node 2 benchmarks/ranks_speed.py all-reduce
    python benchmarks/ranks_speed.py training pong          one process with 2 workers, 1 rank, 2 ranks, in turn
    python benchmarks/ranks_speed.py training cartpole --rounds 5

The clock of a training runs from one agent step to a later one, by its events, so that start-up drops out. What the
figures come to, and for more ranks: docs/scale.md.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minirl.distributed import process_group, rank, world_size

ROOT = Path(__file__).parent.parent
SIZES = {
    "a minibatch's advantages": 256,
    "CartPole": 9_155,
    "1 MB": 250_000,
    "Pong": 1_687_719,
}  # numbers, 4 bytes each
TASKS = {  # flags, and the agent steps between which the clock runs
    "pong": ("--env-id PongNoFrameskip-v4 --no-compile", 2_048, 10_240),
    "cartpole": ("--env-id CartPole-v1 --num-steps 128 --update-epochs 10 --no-compile", 10_240, 61_440),
}
SIDES = {"one process, 2 workers": (0, 2), "1 rank, 2 workers": (1, 2), "2 ranks, 1 worker each": (2, 1)}


def measure_all_reduce(repeats: int) -> None:
    """Print how long one all-reduce takes."""
    with process_group():
        for name, size in SIZES.items():
            values, seconds = torch.zeros(size), []
            for _ in range(repeats):
                dist.barrier()
                began = time.perf_counter()
                dist.all_reduce(values)
                seconds.append(time.perf_counter() - began)
            if rank() == 0:
                least, median = 1e3 * min(seconds), 1e3 * statistics.median(seconds)
                print(f"{name}, {4 * size / 1e6:.3f} MB, {world_size()} ranks: {median:.2f} ms, the least {least:.2f}")


def measure_training(task: str, rounds: int) -> None:
    """Print the agent steps per second of each side."""
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side, (ranks, workers) in SIDES.items():
            speeds[side].append(speed(task, ranks, workers))
            print(f"round {number + 1}, {side}: {speeds[side][-1]:,.0f} steps a second", flush=True)
    for side, measured in speeds.items():
        ratios = [one / other for one, other in zip(measured, next(iter(speeds.values())), strict=True)]
        print(f"{side}: {statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})")


def speed(task: str, ranks: int, workers: int) -> float:
    """Train once; return agent steps per second."""
    flags, first, last = TASKS[task]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    with tempfile.TemporaryDirectory() as place:
        run_dir = str(Path(place) / "run")
        where = ["--run-dir", run_dir, "--final-games", "0", "--device", "cpu", "--num-workers", str(workers)]
        command = [sys.executable, *launcher, "train_ppo.py", *flags.split(), "--total-timesteps", str(last), *where]
        subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
        events = EventAccumulator(run_dir)
        events.Reload()
        times = {event.step: event.wall_time for event in events.Scalars("charts/SPS")}
    seconds: float = times[last] - times[first]
    return (last - first) / seconds


def main() -> None:
    """Measure what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["all-reduce", "training"])
    parser.add_argument("task", nargs="?", choices=list(TASKS), default="pong")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=200)
    arguments = parser.parse_args()
    if arguments.what == "all-reduce":
        measure_all_reduce(arguments.repeats)
    else:
        measure_training(arguments.task, arguments.rounds)


if __name__ == "__main__":
    main()
