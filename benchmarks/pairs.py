"""How the speed benchmarks compare: two sides in turn, each time in a process of its own, the ratio taken pair by pair.

These machines are shared and their speed drifts by a third within an hour: only a ratio of neighbours means anything.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

COMMITTED = Path(__file__).with_name("ratios.json")  # what the tree was measured at, by kind of processor
KINDS = ("amx_bf16", "avx512_bf16", "float32")  # how a processor multiplies fastest
FALL = 0.15  # of a ratio, which is worth a look


class Timing(NamedTuple):
    """One side, once: the seconds that the clock ran, and those before it (start-up, first steps, compilation)."""

    seconds: float
    before: float


class Sample(NamedTuple):
    """What one process came to."""

    speed: float  # steps a second
    before: float  # seconds until the clock ran
    megabytes: float  # the most that all its processes held together


def report(timing: Timing, steps: int) -> None:
    """Print a side's timing for the process that waits for it."""
    print(json.dumps({"speed": steps / timing.seconds, "before": timing.before}))


def sample(script: str, arguments: list[str], source: Path | None = None, core: int | None = None) -> Sample:
    """Run one side in a process of its own; a compilation that fails is an error here.

    Args:
        script: the file to run.
        arguments: of it.
        source: the tree that `minirl` is imported from, if not the installed one.
        core: where it must run, if not on all (Linux).
    """
    command = [] if core is None else ["taskset", "--cpu-list", str(core)]
    command += [sys.executable, "-W", "error:compilation failed", script, *arguments]
    environment = os.environ if source is None else {**os.environ, "PYTHONPATH": str(source)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peak = [0.0]

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], megabytes(process.pid))
            time.sleep(1.0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode != 0:
        raise SystemExit(f"error: {' '.join(command)} ended with status {process.returncode}")
    result = json.loads(output.splitlines()[-1])
    return Sample(result["speed"], result["before"], peak[0])


def megabytes(pid: int, parents: tuple[str, str] | None = None, processes: Path = Path("/proc")) -> float:
    """Return the most that a process and its living descendants have held so far, each, shared pages counted once.

    The most is Linux's own record (VmHWM): Stable-Baselines3 gives memory back after each minibatch, and holds its most
    for moments that a look once a second misses. What others share of a process's pages is Rss - Pss.
    """
    process = processes / str(pid)
    try:
        addresses, *lines = (process / "smaps_rollup").read_text().splitlines()
        lines += (process / "status").read_text().splitlines()
        said = dict(line.split(":", maxsplit=1) for line in lines)
        children = " ".join(task.read_text() for task in process.glob("task/*/children")).split()
        mine = addresses, said["Pss_Anon"]
        if mine == parents:  # it has yet to start its own program, and runs in its parent's memory until then
            return 0.0
        most, now, share = (int(said[name].split()[0]) / 1024 for name in ("VmHWM", "Rss", "Pss"))
    except (OSError, ValueError, KeyError):  # it is gone, or this is no Linux
        return 0.0
    return most - (now - share) + sum(megabytes(int(child), mine, processes) for child in children)


def seconds_between(run_dir: Path, first: int, last: int) -> float:
    """Return how long a training took from one agent step to a later one, at which its run logged `charts/minutes`."""
    # Loaded only now: the memory of a training is measured, too, and this reader is no part of it.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    minutes: dict[int, float] = {point.step: point.value for point in events.Scalars("charts/minutes")}
    return 60 * (minutes[last] - minutes[first])


def compare(name: str, script: str, peer: str, goal: float, pairs: int, arguments: Callable[[str], list[str]]) -> bool:
    """Measure pairs in turn, print them, and compare with the committed ratio; return whether the goal is reached.

    Args:
        name: of the comparison, in `ratios.json`.
        script: the benchmark's own file.
        peer: the other side's name; this side is `minirl`.
        goal: that the median ratio should reach.
        pairs: how many.
        arguments: from a side's name to the arguments that measure it.
    """
    ratios = []
    for pair in range(1, pairs + 1):
        theirs, ours = (sample(script, arguments(side)) for side in (peer, "minirl"))
        ratios.append(ours.speed / theirs.speed)
        print(
            f"{name}, pair {pair}: {peer} {theirs.speed:,.0f}, minirl {ours.speed:,.0f} steps a second: "
            f"{ratios[-1]:.2f} x; before the clock {theirs.before:.0f} and {ours.before:.0f} s, "
            f"memory {theirs.megabytes:,.0f} and {ours.megabytes:,.0f} MB",
            flush=True,
        )
    median = statistics.median(ratios)
    print(f"{name}: median ratio {median:.2f} (goal: {goal})")
    kind = processor()
    committed = json.loads(COMMITTED.read_text()).get(kind, {}).get(name)
    if committed is None:
        print(f"{name}: nothing committed to compare with for this processor ({kind})")
    elif median < (1 - FALL) * committed:
        print(f"{name}: fell by {1 - median / committed:.0%} from the committed {committed} ({kind})")
    return median >= goal


def processor(description: Path = Path("/proc/cpuinfo")) -> str:
    """Return which of `KINDS` this processor is; a ratio means something for its own kind only.

    As `minirl.fast.machine.has_fast_bfloat16`: Intel's without AMX multiply float32 faster.
    """
    words = description.read_text().split() if description.exists() else []  # there is none but on Linux
    if "amx_bf16" in words:
        return "amx_bf16"
    return "avx512_bf16" if "avx512_bf16" in words and "GenuineIntel" not in words else "float32"
