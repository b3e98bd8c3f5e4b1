"""Training runs side by side on one machine: their total speed, as a share of the speed of one alone.

    python benchmarks/sharing.py              one alone, two started by hand, two with --num-threads 1, two by --seeds
    python benchmarks/sharing.py dqn          one row of the table

Each is trained in its own processes, without compiling. Speeds are taken from the progress lines once all of them
compute, for a while and at least two lines. Nothing else may run.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LINE = re.compile(r"(?:seed (\d+): )?([\d,]+) of [\d,]+ steps, .* a second")
ROWS = {
    "dqn": "train_dqn.py @recipes/dqn-lunarlander.args --total-timesteps 10000000 --eval-frequency none --no-compile",
    "ppo": "train_ppo.py --env-id PongNoFrameskip-v4 --no-compile",
}
WHILE = 20.0  # seconds
WAYS = {  # flags, and how many processes are started
    "one alone": ("", 1),
    "one alone, one thread": ("--num-threads 1", 1),
    "two by hand": ("", 2),
    "two by hand, one thread each": ("--num-threads 1", 2),
    "two by --seeds": ("--seeds 0-1", 1),
}


class Said(NamedTuple):
    """How far a run had got, and when."""

    seconds: float
    steps: int


def speed(command: str, number: int) -> float:
    """Start this many of a command; return how many agent steps per second all its runs make together."""
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

        def wait_until(true: Callable[[], bool]) -> None:
            while not true():
                if any(process.poll() is not None for process in processes):
                    raise SystemExit(f"error: {command} has ended")
                time.sleep(0.2)

        try:
            wait_until(lambda: len(said) == runs and min(map(len, said.values())) >= 2)
            before = {run: len(lines) for run, lines in said.items()}
            began = time.monotonic()
            wait_until(
                lambda: time.monotonic() - began > WHILE and all(len(said[run]) > before[run] + 1 for run in said)
            )
        finally:
            for process in processes:
                process.terminate()
            for listener in listeners:
                listener.join()
            for process in processes:
                process.wait()
    spans = [(lines[before[run] - 1], lines[-1]) for run, lines in said.items()]
    return sum((last.steps - first.steps) / (last.seconds - first.seconds) for first, last in spans)


def main() -> None:
    """Measure each way in turn, and print the table."""
    parser = argparse.ArgumentParser(description="Trainings that share a machine.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; by default all")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    for name in given.rows or ROWS:
        speeds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(given.rounds):
            for way, (flags, number) in WAYS.items():
                speeds[way].append(speed(f"{ROWS[name]} {flags}", number))
                print(f"{name}: {way}: {speeds[way][-1]:,.0f} agent steps a second", flush=True)
        alone = statistics.median(speeds["one alone"])
        for way, measured in speeds.items():
            middle = statistics.median(measured)
            spread = f"{min(measured):,.0f} to {max(measured):,.0f}"
            print(f"| {name} | {way} | {middle:,.0f} ({spread}) | {middle / alone:.2f} |")


if __name__ == "__main__":
    main()
