"""PPO and Double DQN on Pong on a GPU, in agent steps per second, against LeanRL's way on the same GPU and cores.

    python benchmarks/gpu_speed.py                                five minutes
    python benchmarks/gpu_speed.py --device cpu --part eager      one part, by a word of its name; without a GPU

Each part is a separate process with a time limit, and its rows are printed as they are measured. Start-up and
compilation are not part of the speeds and are printed beside them.
"""

import argparse
import contextlib
import functools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from leanrl_way import train_lean
from where_time_goes import CONFIG, env_speed, pieces, seconds

from minirl import dqn, ppo
from minirl.dqn import DQNConfig
from minirl.envs.vector import available_cores
from minirl.fast import gpu
from minirl.ppo import PPOConfig
from minirl.runs.run import Run

TOTAL, LONGEST = 290, 75  # seconds: of all parts together, and of one
DQN: dict[str, Any] = {  # the README's
    "env_id": CONFIG.env_id,
    "learning_rate": 2e-4,
    "anneal_lr": False,
    "huber": True,
    "batch_size": 32,
    "train_frequency": 4,
    "target_network_frequency": 1000,
    "tau": 1.0,
    "eval_frequency": None,
}


class Work(NamedTuple):
    """The device to measure on, and for how long."""

    device: torch.device
    seconds: float


class Enough(BaseException):
    """The clock has run long enough."""


class Clock:
    """Runs for some seconds, by default from its ninth call of `look` on, and then prints a row.

    By then everything is compiled, recorded, and recorded again after an update's tensors have moved.
    """

    def __init__(self, name: str, work: Work, first: int = 9) -> None:
        self.name, self.work, self.first = name, work, first
        self.looks, self.made = 0, time.perf_counter()
        self.started = self.first_step = math.nan

    def look(self, global_step: int) -> None:
        """Check the clock, with this many agent steps done.

        Raises:
            Enough: when it has run for long enough.
        """
        self.looks += 1
        now = time.perf_counter()
        if self.looks == self.first:
            self.started, self.first_step = now, global_step
        if now - self.started > self.work.seconds:
            speed, before = (global_step - self.first_step) / (now - self.started), self.started - self.made
            row(self.name, f"{speed:,.0f} steps a second", f"{before:.0f} s before the clock")
            raise Enough


def row(*cells: str) -> None:
    """Print a row of a table immediately."""
    print(f"| {' | '.join(cells)} |", flush=True)


@contextlib.contextmanager
def clocked(module: Any, clock: Clock) -> Iterator[None]:
    """A block in which training of the module checks the clock when it logs, and ends when the clock has run out."""

    class Clocked(Run):
        def log(self, global_step: int, scalars: dict[str, float], **options: Any) -> None:
            super().log(global_step, scalars, **options)
            clock.look(global_step)

    module.Run = Clocked
    with contextlib.suppress(Enough):
        yield


def of_minirl(name: str, work: Work, *, num_envs: int = 8, record: bool = True, **settings: Any) -> None:
    """This project's PPO: by default compiled and recorded, in bfloat16."""
    if not record:
        gpu.RECORDED = ()
    batch = num_envs * CONFIG.num_steps
    minibatch = max(CONFIG.minibatch_size, batch // 4)
    settings = {"compile": True, **settings, "num_envs": num_envs, "minibatch_size": minibatch}
    with tempfile.TemporaryDirectory() as parent, clocked(ppo, Clock(name, work)):
        ppo.train(PPOConfig(**settings), run_dir=Path(parent) / "run", device=work.device.type)


def of_leanrl(name: str, work: Work, *, num_envs: int = 8) -> None:
    """The same sizes and environments, in float32, as LeanRL does it."""
    clock, batch = Clock(name, work), num_envs * CONFIG.num_steps
    with contextlib.suppress(Enough):
        train_lean(num_envs, max(CONFIG.minibatch_size, batch // 4), work.device, clock.look)


def of_dqn(name: str, work: Work) -> None:
    """Double DQN, an update of 32 every 4 steps."""
    config = DQNConfig(**DQN, compile=True)
    with tempfile.TemporaryDirectory() as parent, clocked(dqn, Clock(name, work, first=3)):
        dqn.train(config, run_dir=Path(parent) / "run", device=work.device.type)


def environments(name: str, work: Work) -> None:
    """The environments alone: an upper limit for training."""
    for num_envs in (8, 64, 256):
        speed = env_speed(num_envs, available_cores())
        row(f"{name}, {num_envs}", f"{speed:,.0f} steps a second", f"{available_cores()} processes")


def where_it_goes(name: str, work: Work) -> None:
    """Each part of an update's 1,024 steps alone, with its kernel launches and waits."""
    on_gpu = work.device.type == "cuda"
    with pieces(work.device) as parts:
        for part, function in parts.items():

            def finished(function: Callable[[], object] = function) -> None:
                function()
                if on_gpu:
                    torch.cuda.synchronize()

            count = 10 if work.seconds > 1 else 1
            row(f"{name}: {part}", f"{1e3 * seconds(finished, count):.2f} ms", f"{count} times")
        for part, function in parts.items() if on_gpu else []:
            kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=kinds) as profiler:
                function()
                torch.cuda.synchronize()
            calls = {e.key: e for e in profiler.key_averages() if e.key.startswith("cu")}
            said = [f"{key} {e.count} ({e.cpu_time_total / 1e3:.2f} ms)" for key, e in sorted(calls.items())]
            row(f"{name}: {part}", ", ".join(said), "calls of CUDA, and the processor's time in them")


PARTS: dict[str, Callable[[str, Work], None]] = {
    "minirl, 8 x 128": of_minirl,
    "LeanRL's way, 8 x 128": of_leanrl,
    "where it goes, 8 x 128": where_it_goes,
    "minirl, 64 x 128": functools.partial(of_minirl, num_envs=64),
    "minirl, 256 x 128": functools.partial(of_minirl, num_envs=256),
    "LeanRL's way, 64 x 128": functools.partial(of_leanrl, num_envs=64),
    "environments alone": environments,
    "Double DQN": of_dqn,
    "minirl, 8 x 128, float32": functools.partial(of_minirl, precision="float32"),
    "minirl, 8 x 128, compiled and not recorded": functools.partial(of_minirl, record=False),
    "minirl, 8 x 128, eager": functools.partial(of_minirl, record=False, compile=False),
    "minirl, 64 x 128, float32": functools.partial(of_minirl, num_envs=64, precision="float32"),
    "minirl, 256 x 128, float32": functools.partial(of_minirl, num_envs=256, precision="float32"),
    "minirl, 64 x 128, compiled and not recorded": functools.partial(of_minirl, num_envs=64, record=False),
    "minirl, 64 x 128, eager": functools.partial(of_minirl, num_envs=64, record=False, compile=False),
    "LeanRL's way, 256 x 128": functools.partial(of_leanrl, num_envs=256),
}


def main() -> None:
    """Measure part by part, each in its own process; or one part, here."""
    parser = argparse.ArgumentParser(description="The speed of PPO and Double DQN on Pong on a GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--part", default="", help="only those whose name has this in it")
    parser.add_argument("--seconds", type=float, default=6.0, help="that a speed is measured for")
    parser.add_argument("--limit", type=float, default=TOTAL, help="seconds for all parts together")
    parser.add_argument("--here", help="this part, in this process")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: this benchmark needs a GPU that PyTorch can use, or --device cpu", file=sys.stderr)
        raise SystemExit(2)
    work = Work(torch.device(arguments.device), arguments.seconds)
    if arguments.here:
        PARTS[arguments.here](arguments.here, work)
        return

    card = torch.cuda.get_device_name() if arguments.device == "cuda" else "no GPU"
    print(f"{card}, {available_cores()} cores, PyTorch {torch.__version__}, NumPy {np.__version__}\n")
    row("part", "measured", "and")
    row("---", "---", "---")
    # A profiler that is set up again beside a recorded graph can crash.
    environment = {**os.environ, "TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
    ends, failed = time.monotonic() + arguments.limit, False
    for name in [name for name in PARTS if arguments.part in name]:
        given = ["--here", name, "--device", arguments.device, "--seconds", str(arguments.seconds)]
        left = min(LONGEST, ends - time.monotonic())
        if left < 10:
            row(name, "no time was left", "")
            continue
        with subprocess.Popen([sys.executable, __file__, *given], env=environment, start_new_session=True) as process:
            try:
                status = process.wait(left)
            except subprocess.TimeoutExpired:
                process.terminate()  # it saves and ends; its workers end with it
                status = None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
                process.kill()
        if status != 0:
            row(name, f"took longer than {left:.0f} s" if status is None else f"failed with status {status}", "")
            failed = failed or status is not None
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
