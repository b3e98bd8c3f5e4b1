"""How the speed benchmarks compare two sides: in turn, each in its own process, with the ratio taken pair by pair.

These machines are shared and their speed drifts by a third within an hour: only a ratio of adjacent runs is meaningful.
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

COMMITTED = Path(__file__).with_name("ratios.json")  # the ratios measured for this tree, by kind of CPU
KINDS = ("amx_bf16", "avx512_bf16", "float32")  # how a CPU multiplies fastest
FALL = 0.15  # fall of a ratio that is worth a look


class Timing(NamedTuple):
    """One side, once: the seconds that were timed, and those before (start-up, first steps, compilation)."""

    seconds: float
    before: float


class Sample(NamedTuple):
    """The result of one process."""

    speed: float  # steps per second
    before: float  # seconds before the timed part
    megabytes: float  # the peak memory of all its processes together


def report(timing: Timing, steps: int) -> None:
    """Print a side's timing for the process that waits for it."""
    print(json.dumps({"speed": steps / timing.seconds, "before": timing.before}))


def sample(script: str, arguments: list[str], source: Path | None = None, core: int | None = None) -> Sample:
    """Run one side in its own process; a failed compilation is an error here.

    Args:
        script: the file to run.
        arguments: its arguments.
        source: the tree that `minirl` is imported from, if not the installed one.
        core: the core to run on, if not all (Linux).
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
    """Return the peak memory so far of a process plus those of its living descendants, with shared pages counted once.

    The peak is Linux's own record (VmHWM): Stable-Baselines3 returns memory after each minibatch, and its short peaks
    would be missed by one look per second. Rss - Pss is the part of a process's pages that others share.
    """
    process = processes / str(pid)
    try:
        addresses, *lines = (process / "smaps_rollup").read_text().splitlines()
        lines += (process / "status").read_text().splitlines()
        said = dict(line.split(":", maxsplit=1) for line in lines)
        children = " ".join(task.read_text() for task in process.glob("task/*/children")).split()
        mine = addresses, said["Pss_Anon"]
        if mine == parents:  # it has not started its own program yet, and still runs in its parent's memory
            return 0.0
        most, now, share = (int(said[name].split()[0]) / 1024 for name in ("VmHWM", "Rss", "Pss"))
    except (OSError, ValueError, KeyError):  # it is gone, or this is not Linux
        return 0.0
    return most - (now - share) + sum(megabytes(int(child), mine, processes) for child in children)


def seconds_between(run_dir: Path, first: int, last: int) -> float:
    """Return how long training took from one agent step to a later one, at which its run logged `charts/minutes`."""
    # Imported only now: the memory of the training is measured, too, and this reader is not part of it.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    minutes: dict[int, float] = {point.step: point.value for point in events.Scalars("charts/minutes")}
    return 60 * (minutes[last] - minutes[first])


def compare(name: str, script: str, peer: str, goal: float, pairs: int, arguments: Callable[[str], list[str]]) -> bool:
    """Measure pairs in turn, print them, and compare with the committed ratio; return whether the goal was reached.

    Args:
        name: of the comparison, in `ratios.json`.
        script: the benchmark's own file.
        peer: the other side's name; this side is `minirl`.
        goal: the median ratio to reach.
        pairs: how many.
        arguments: maps a side's name to the arguments that measure it.
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
    """Return which of `KINDS` this CPU is; a ratio is only valid for its own kind.

    As in `minirl.fast.machine.has_fast_bfloat16`: Intel CPUs without AMX multiply float32 faster.
    """
    words = description.read_text().split() if description.exists() else []  # it exists on Linux only
    if "amx_bf16" in words:
        return "amx_bf16"
    return "avx512_bf16" if "avx512_bf16" in words and "GenuineIntel" not in words else "float32"
