"""Training with several seeds: `--seeds 0-4`.

Each seed is a separate process of the same script with `--seed`, and has its own run directory, which works like any
other with resume, evaluate and plots.
"""

import argparse
import datetime
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from minirl.checks import ConfigError
from minirl.envs.ids import is_atari, is_slow, spec_of
from minirl.envs.vector import available_cores
from minirl.runs.checkpoints import CHECKPOINT_FILE, load_checkpoint
from minirl.runs.directory import CONFIG_FILE
from minirl.runs.progress import answer, say
from minirl.runs.run import is_hangup, stop_signals
from minirl.streams import MAX_SEED

MOST_SEEDS = 1_000
ATARI_MEMORY = 1 << 30  # bytes that a run on Atari takes, without a replay memory

Status = int | None  # exit status of a process; None if it was never started


def read_seeds(text: str) -> list[int]:
    """Read `0-4`, `0,3,7` or `0-4,9`.

    Raises:
        ArgumentTypeError: if that is not a list of different seeds.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash) and len(part) < 50):
            raise argparse.ArgumentTypeError(f"must be seeds as in 0-4, 0,3,7 or 0-4,9, not {text[:80]!r}")
        start, stop = int(first), int(last or first)
        if not start <= stop <= MAX_SEED:
            raise argparse.ArgumentTypeError(f"must count up, from 0 to {MAX_SEED}, and {part} does not")
        if len(seeds) + stop - start >= MOST_SEEDS:
            raise argparse.ArgumentTypeError(f"must be at most {MOST_SEEDS:,} seeds")
        seeds += range(start, stop + 1)
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"must name each seed once, not {text[:80]!r}")
    return seeds


def train_seeds(algorithm: str, config: Any, flags: list[str], run_dirs: dict[int, Path]) -> int:
    """Train with each seed and print a table of the results.

    Args:
        algorithm: its name.
        config: the settings; their seed is ignored.
        flags: of the current script, for each process, without the seed and the run directory.
        run_dirs: seed -> where its run goes.

    Returns:
        The status to exit with: 0; 130 or 143 if stopped; else 2 if all seeds failed with 2, 1 if some failed.

    Raises:
        ConfigError: if there is no such environment, or a directory is taken.
    """
    if hasattr(config, "env_id"):
        spec_of(config.env_id)
    for run_dir in run_dirs.values():
        if (run_dir / CONFIG_FILE).exists():
            go_on = shlex.join(["--resume", str(run_dir)])
            raise ConfigError(f"--run-dir must be new: {run_dir} holds a run; continue it with {go_on}")
        parent = next(folder for folder in run_dir.parents if folder.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            raise ConfigError(f"--run-dir must be a directory that can be written, and {parent} is none")
    at_once, shares, environment = side_by_side(config, len(run_dirs))
    say(f"{len(run_dirs)} seeds, {at_once} at a time")
    commands = {
        seed: [sys.executable, sys.argv[0], *flags, *shares, f"--seed={seed}", f"--run-dir={run_dir}"]
        for seed, run_dir in run_dirs.items()
    }
    processes = Processes(environment)
    statuses = processes.run(commands, at_once)
    done = [seed for seed, status in statuses.items() if status == 0]
    failed = [seed for seed, status in statuses.items() if status != 0]
    if done:
        answer(summary(algorithm, {seed: run_dirs[seed] for seed in done}))
    if processes.stopped_by is not None:
        say(f"stopped: {len(done)} of {len(statuses)} seeds done")
        _say_how_to_go_on({seed: run_dirs[seed] for seed in failed})
        return 128 + processes.stopped_by
    if failed:
        say(f"error: {len(failed)} of {len(statuses)} seeds failed: {', '.join(map(str, failed))}")
    return 0 if not failed else 2 if all(status == 2 for status in statuses.values()) else 1


def side_by_side(config: Any, num_seeds: int) -> tuple[int, list[str], dict[str, str]]:
    """Return how many seeds to train at once, and the flags and variables that keep each to its share of the cores.

    Runs with one core each achieve most: two runs of Pong with one thread and one process each made 1,416 agent steps a
    second; one after the other, with both cores, 1,247; side by side with both cores each, 60.
    """
    cores, given = available_cores(), vars(config)
    env_id = given.get("env_id")
    atari = env_id is not None and is_atari(env_id)
    each = max(given.get("num_workers") or 1, given.get("num_threads") or 1)
    at_once = min(num_seeds, cores // each)
    if atari:
        frames = given.get("buffer_size", 0) * config.frame_size**2  # in the replay memory, one byte per pixel
        at_once = min(at_once, memory() // (ATARI_MEMORY + frames))
    at_once = max(1, at_once)
    share, flags = cores // at_once, []
    if given.get("num_workers", 1) is None and is_slow(config.env_id, config.num_envs):
        flags.append(f"--num-workers={share}")
    if "OMP_NUM_THREADS" in os.environ:
        return at_once, flags, {}
    if atari and given.get("num_threads", 1) is None:
        flags.append(f"--num-threads={share}")  # saved with the run: its bits may depend on it
    return at_once, flags, {"OMP_NUM_THREADS": str(share)}


def memory() -> int:
    """Return how many bytes of memory this machine has."""
    if not hasattr(os, "sysconf"):
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Processes:
    """Runs commands, some at a time, and shows their standard error with the seed in front.

    Ctrl-C and SIGTERM are passed on to the running ones, once each time, and no more are started. Children have their
    own sessions: a Ctrl-C from the terminal would also reach them, and a second one means not to save.

    Args:
        environment: variables to set for them.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = {**os.environ, **environment}
        self.running: dict[int, subprocess.Popen[str]] = {}
        self.stopped_by: int | None = None

    @property
    def stopped(self) -> bool:
        """Whether a signal has come."""
        return self.stopped_by is not None

    def run(self, commands: dict[int, list[str]], at_once: int) -> dict[int, Status]:
        """Run them all; return each one's exit status."""
        old_handlers = {number: signal.signal(number, self._on_signal) for number in stop_signals()}
        statuses: dict[int, Status] = {}
        started = time.monotonic()
        try:
            with ThreadPoolExecutor(at_once) as pool:
                seeds = {pool.submit(self._run_one, seed, command): seed for seed, command in commands.items()}
                for future in as_completed(seeds):
                    statuses[seeds[future]] = future.result()
                    if not self.stopped:
                        rounds = (len(commands) - len(statuses)) / max(len(statuses), at_once)
                        left = (time.monotonic() - started) * rounds
                        clock = datetime.timedelta(seconds=round(left))
                        self._say(f"{len(statuses)} of {len(commands)} seeds done, {clock} left")
        finally:
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
        return {seed: statuses[seed] for seed in commands}

    def _run_one(self, seed: int, command: list[str]) -> Status:
        if self.stopped:
            return None
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with subprocess.Popen(
            command, env=self.environment, start_new_session=True, text=True, errors="replace", **pipes
        ) as process:
            self.running[seed] = process
            if self.stopped_by is not None:  # since the line above
                process.send_signal(self.stopped_by)
            assert process.stderr is not None
            for line in process.stderr:
                if not self.stopped:  # or there may be tracebacks of processes that were still starting
                    self._say(f"seed {seed}: {line.rstrip()}")
        del self.running[seed]
        if process.returncode != 0 and not self.stopped:
            self._say(f"seed {seed}: failed with status {process.returncode}")
        return process.returncode

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopped and is_hangup(number):
            return
        first = not self.stopped
        self._stop(number)  # before the line: nobody may read it
        if first:
            say("each seed saves before it stops; once more stops at once")

    def _stop(self, number: int) -> None:
        self.stopped_by = number
        for process in list(self.running.values()):
            process.send_signal(number)

    def _say(self, text: str) -> None:
        if not say(text) and not self.stopped:  # nobody reads it any more
            self._stop(signal.SIGTERM)


def summary(algorithm: str, run_dirs: dict[int, Path]) -> str:
    """Return a table of finished runs, with the mean and the standard deviation (divided by n) over the seeds."""
    rows = [["seed", "steps", "mean of the last 100 returns", "best greedy return", "minutes", "directory"]]
    numbers: list[list[float]] = []
    for seed, run_dir in run_dirs.items():
        saved = load_checkpoint(run_dir, algorithm)
        returns, best = saved["returns"], saved["best_return"]
        mean = statistics.fmean(returns) if returns else math.nan
        numbers.append([mean, best if math.isfinite(best) else math.nan, saved["seconds"] / 60])
        rows.append([str(seed), f"{saved['global_step']:,}", *map(_shown, numbers[-1]), str(run_dir)])
    rows.append(["mean", "", *map(_shown, np.mean(numbers, axis=0)), ""])
    rows.append(["std", "", *map(_shown, np.std(numbers, axis=0)), ""])
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]  # only Double DQN plays greedy games
    padded = [[text.rjust(max(map(len, column))) for text in column] for column in columns[:-1]]
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, columns[-1], strict=True))


def _shown(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else ""


def _say_how_to_go_on(run_dirs: dict[int, Path]) -> None:
    not_begun = [seed for seed, run_dir in run_dirs.items() if not (run_dir / CHECKPOINT_FILE).exists()]
    for seed, run_dir in run_dirs.items():
        if seed not in not_begun:
            say(f"go on with seed {seed}: {shlex.join(['python', sys.argv[0], '--resume', str(run_dir)])}")
    if not_begun:
        say(f"not begun: --seeds {','.join(map(str, not_begun))}")
