"""Trainings side by side on one machine: what all of them make together, as a share of what one alone makes.

    python benchmarks/sharing.py              one alone, two started by hand, two with --num-threads 1, two by --seeds
    python benchmarks/sharing.py dqn          one row of the table

Each is trained for a while in processes of its own; speeds are taken from what they say on their way, once all of them
compute. What is compiled is compiled before. Nothing else may run.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LINE = re.compile(r"(?:seed (\d+): )?([\d,]+) of [\d,]+ steps, .* a second")
ROWS = {
    "dqn": ("train_dqn.py @recipes/dqn-lunarlander.args --total-timesteps 10000000 --eval-frequency none", 15.0),
    "ppo": ("train_ppo.py --env-id PongNoFrameskip-v4 --no-compile", 60.0),
    "ppo, compiled": ("train_ppo.py --env-id PongNoFrameskip-v4", 60.0),
}
WAYS = {  # flags, and how many processes are started
    "one alone": ("", 1),
    "one alone, one thread": ("--num-threads 1", 1),
    "two by hand": ("", 2),
    "two by hand, one thread each": ("--num-threads 1", 2),
    "two by --seeds": ("--seeds 0-1", 1),
}


class Said(NamedTuple):
    """How far a run was, and when."""

    seconds: float
    steps: int


def speed(command: str, number: int, seconds: float) -> float:
    """Start so many of a command; return how many agent steps a second all its runs make together."""
    with tempfile.TemporaryDirectory() as parent:
        processes = [
            subprocess.Popen(
                [sys.executable, *command.split(), "--run-dir", f"{parent}/{i}"],
                cwd=ROOT,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
            for i in range(number)
        ]
        said: dict[tuple[int, str], list[Said]] = {}

        def listen(i: int) -> None:
            stream = processes[i].stderr
            assert stream is not None
            for line in stream:
                if (found := LINE.match(line)) is not None:
                    steps = int(found[2].replace(",", ""))
                    said.setdefault((i, found[1] or ""), []).append(Said(time.monotonic(), steps))

        listeners = [threading.Thread(target=listen, args=(i,)) for i in range(number)]
        for listener in listeners:
            listener.start()
        runs = 2 if "--seeds" in command else number
        try:
            while len(said) < runs or min(map(len, said.values())) < 4:  # the first ones begin, and compile
                if any(process.poll() is not None for process in processes):
                    raise SystemExit(f"error: {command} has ended")
                time.sleep(0.5)
            began = time.monotonic()
            time.sleep(seconds)
            ended = time.monotonic()
        finally:
            for process in processes:
                process.terminate()
            for listener in listeners:
                listener.join()
            for process in processes:
                process.wait()
    total = 0.0
    for lines in said.values():
        within = [line for line in lines if began - 10 <= line.seconds <= ended]
        total += (within[-1].steps - within[0].steps) / max(within[-1].seconds - within[0].seconds, seconds / 2)
    return total


def main() -> None:
    """Measure each way in turn, and print the table."""
    parser = argparse.ArgumentParser(description="Trainings that share a machine.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; by default all")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    for name in given.rows or ROWS:
        command, seconds = ROWS[name]
        speeds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(given.rounds):
            for way, (flags, number) in WAYS.items():
                speeds[way].append(speed(f"{command} {flags}", number, seconds))
                print(f"{name}: {way}: {speeds[way][-1]:,.0f} agent steps a second", flush=True)
        alone = statistics.median(speeds["one alone"])
        for way, measured in speeds.items():
            middle = statistics.median(measured)
            spread = f"{min(measured):,.0f} to {max(measured):,.0f}"
            print(f"| {name} | {way} | {middle:,.0f} ({spread}) | {middle / alone:.2f} |")


if __name__ == "__main__":
    main()
