"""The tricks that make minirl fast, each with its plain replacement, for a test and for a benchmark."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from minirl.dqn import TargetUpdate
from minirl.envs.make import make_envs_of
from minirl.fast.small import InTraining


def _plainly(function: Callable[..., Any], *bound: Any, enabled: bool = True) -> Callable[..., Any]:
    return functools.partial(function, *bound)


def _not_in_halves(config: Any, num_envs: slice, in_halves: bool) -> Any:
    return make_envs_of(config, num_envs)


def _set_mode(context: InTraining, training: bool) -> None:
    context.network.train(training)


class _MovedOneByOne(TargetUpdate):
    @torch.no_grad()
    def update(self) -> None:
        target, online = self.target.network, self.online.network
        for mine, other in zip(target.parameters(), online.parameters(), strict=True):
            mine.lerp_(other, self.tau)
        for copy, buffer in zip(target.buffers(), online.buffers(), strict=True):
            copy.copy_(buffer)


class _Writer:
    """`Events`, but with PyTorch's writer and its thread."""

    def __init__(self, run_dir: Path, purge_step: int | None = None) -> None:
        self.writer = SummaryWriter(str(run_dir), purge_step=purge_step)

    def add(self, summary: Summary, global_step: int | None = None) -> None:
        writer: Any = self.writer._get_file_writer()
        writer.add_event(Event(summary=summary), global_step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


# A trick -> the places where it is used, and the replacement there that switches it off.
SWITCHES: dict[str, dict[str, Any]] = {
    "allocator": {"minirl.fast.machine.keep_freed_memory": lambda: None},
    "compiling": {"minirl.ppo.compiled": _plainly, "minirl.dqn.compiled": _plainly},
    "conditions": {"minirl.fast.compiled.that_can_change": lambda conditions: [True] * len(conditions)},
    "events": {"minirl.runs.run.Events": _Writer},
    "frames-once": {"minirl.envs.workers.shows_stacks": lambda env: False},
    "halves": {"minirl.ppo.make_envs_of": _not_in_halves},
    "modes": {"minirl.fast.small.InTraining._set": _set_mode},
    "numbers-once": {"minirl.fast.rewrites.ARITHMETIC": ()},
    "numpy": {"minirl.fast.small.FEW": 0},
    "one-call-target": {"minirl.dqn.TargetUpdate": _MovedOneByOne},
    "one-thread-beside": {"minirl.fast.machine.one_thread": contextlib.nullcontext},
    "one-thread-small": {"minirl.fast.machine.SMALL": 0},
    "onednn": {"minirl.fast.passes.onednn_is_faster": lambda: False},
    "products": {"minirl.fast.rewrites.FEW": 0},
    "rounded-weights": {"minirl.fast.machine.rounded_weights": lambda network, precision: contextlib.nullcontext()},
    "skip-and-shrink": {"minirl.envs.atari.why_not_faster": lambda layers: "it is switched off"},
    "turns": {"minirl.fast.turns.available_cores": lambda: 1_000_000},
}


def switch_off(trick: str, patch: pytest.MonkeyPatch) -> None:
    """Replace a trick by the plain version in this process; workers, which are new processes, keep the trick."""
    for place, plain in SWITCHES[trick].items():
        patch.setattr(place, plain)
