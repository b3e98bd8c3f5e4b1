"""A training run: when it saves, what it logs, seeds and signals; the same for every algorithm.

With `run_dir=None` nothing is written. Of several ranks (`minirl.distributed`), only rank 0 writes files and messages.
"""

import contextlib
import math
import os
import random
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import nn

from minirl.checks import ConfigError
from minirl.distributed import (
    USUAL,
    RankError,
    broadcast_from_rank_0,
    gather_to_rank_0,
    max_over_ranks,
    rank,
    remember,
    some_rank_failed,
    wait_at_most,
    world_size,
)
from minirl.envs.vector import Episode
from minirl.fast.machine import tuned
from minirl.fast.turns import Turns
from minirl.runs.checkpoints import (
    BEST_FILE,
    CHECKPOINT_FILE,
    TAKEN,
    State,
    checksum,
    load_checkpoint,
    random_state,
    require_finite,
    save_checkpoint,
)
from minirl.runs.directory import CONFIG_FILE, claim, files_after, load_settings, lock, save_config
from minirl.runs.events import Events, save_settings_row
from minirl.runs.progress import Progress, say
from minirl.runs.settings import flag_name, length_setting, new_schedules, recipe_note

BROKEN_PIPE = 13  # SIGPIPE, which Windows does not have


def as_number(tag: str, value: Any) -> float:
    """Return a value as a float for TensorBoard, which would silently leave out None.

    Raises:
        TypeError: naming the tag, if the value is not one number.
    """
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{tag} must be a number, not {value!r}") from error


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators (all devices).

    Environments are seeded by their first reset.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - environments and users' code may draw from the global generator
    torch.manual_seed(seed)


def stop_signals() -> list[int]:
    """Return the signals to save and stop at: Ctrl-C, SIGTERM and, without `nohup`, the loss of the terminal."""
    if sys.platform == "win32" or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return [signal.SIGINT, signal.SIGTERM]
    return [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def is_hangup(number: int) -> bool:
    """Whether a signal says that the terminal is gone. Shell and system both send it, so a second one is ignored."""
    return sys.platform != "win32" and number == signal.SIGHUP


class Stopped(KeyboardInterrupt):
    """A signal other than Ctrl-C's has stopped training, which has saved; `number` is the signal's.

    A KeyboardInterrupt, so that what ends at Ctrl-C ends here, too; pytest takes SystemExit for a failed test.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number


def stop_by(number: int) -> KeyboardInterrupt:
    """Return the exception that stops training at this signal: for Ctrl-C, the one that Python itself raises."""
    return KeyboardInterrupt() if number == signal.SIGINT else Stopped(number)


class Run:
    """One training run: logs, shows progress, saves, and stops when asked to.

    Use it as a context manager. Ctrl-C, SIGTERM or SIGHUP waits until the algorithm next calls `checkpoint`, which
    saves and then raises KeyboardInterrupt, or `Stopped` if it was not Ctrl-C; a second signal stops at once. `Stopped`
    is also raised when standard error can no longer be written: a `tee` has ended, or the disk is full.

    Args:
        algorithm: its name, for `config.json`.
        config: the settings; `checkpoint_frequency` (agent steps) is read here.
        run_dir: where to write; None for nowhere.
        network: what is trained, for the number of threads; None if PyTorch computes nothing.
        total: the length of the whole run, in `unit`.
        done: how much of it earlier sessions did.
        unit: what progress is counted in, "steps" or "episodes".
        resumed: the checkpoint that this run continues from.

    Raises:
        ConfigError: if more is done than the whole run, or the directory can't be used.
    """

    def __init__(
        self,
        algorithm: str,
        config: Any,
        run_dir: Path | None,
        network: nn.Module | None = None,
        *,
        total: int,
        done: int = 0,
        unit: str = "steps",
        resumed: State | None = None,
    ) -> None:
        if done > total:
            raise ConfigError(f"{flag_name(length_setting(config))} must be at least the {done} {unit} already done")
        self.algorithm = algorithm
        self.config = config
        self.network = network
        self.turns: Turns | None = None
        self.run_dir = run_dir
        self.returns: deque[float] = deque(resumed["returns"] if resumed else [], maxlen=100)
        self.best_return: float = resumed["best_return"] if resumed else -math.inf
        self.seconds_before: float = resumed["seconds"] if resumed else 0.0
        self.started = time.monotonic()
        self.first_step: int = resumed["global_step"] if resumed else 0
        self.last_saved = self.first_step
        self.found_better = False  # since the last checkpoint
        self.stop_signal: int | None = None
        self.starter = os.getppid()
        self.several = world_size() > 1  # ranks
        self.events: Events | None = None
        self._stack, self._handlers = contextlib.ExitStack(), contextlib.ExitStack()  # what ends with the run, in turn
        broadcast_from_rank_0(lambda: self._open(resumed, done / total))
        self.progress = Progress(total, done=done, unit=unit, shown=rank() == 0)
        self._stack.callback(self.progress.close)
        self.unlogged: list[tuple[int, Episode]] = []  # of one of several ranks

    def _open(self, resumed: State | None, done: float) -> None:
        """Make the run directory this run's own, and start writing there."""
        run_dir, algorithm, config = self.run_dir, self.algorithm, self.config
        if run_dir is not None:
            if resumed is None:
                claim(run_dir)
            before = load_settings(run_dir) if resumed is not None else None
            later = files_after(run_dir, algorithm, self.first_step) if resumed is not None else []
            try:
                if (held := lock(run_dir)) is not None:
                    self._stack.callback(os.close, held)
                if resumed and load_checkpoint(run_dir, algorithm)["global_step"] != self.first_step:
                    raise ConfigError(f"--resume must name a run that has stopped: {run_dir} went on; try again")
                for path in later:
                    path.unlink()
                save_config(run_dir, algorithm, config)
                # What an interrupted session logged after its last checkpoint is dropped, and done again.
                purge_step = self.first_step + 1 if resumed else None
                self.events = Events(run_dir, purge_step)
                save_settings_row(run_dir, algorithm, config)
            except BaseException as error:
                # So that the same command can be tried again, also by this process:
                self._stack.close()
                if resumed is None:
                    (run_dir / CONFIG_FILE).unlink(missing_ok=True)
                if isinstance(error, OSError):
                    raise ConfigError(f"{run_dir} must be a directory that can be written: {error}") from error
                raise
            self._stack.push(self._close_events)
            note = recipe_note(algorithm, config) if before is None else new_schedules(before, config, done)
            for line in (f"run directory: {run_dir}", note):
                if line is not None and not say(line):
                    self.stop_signal = BROKEN_PIPE
            remember(run_dir)

    def __enter__(self) -> "Run":
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in stop_signals():
                self._handlers.callback(signal.signal, number, signal.signal(number, self._on_signal))
        try:
            if self.network is not None:
                self.turns = self._stack.enter_context(tuned(self.network, self.config.num_threads))
        except BaseException:  # a second Ctrl-C, while it waits for its turn
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *raised: Any) -> None:
        with self._handlers:  # to the end, or a signal would leave files half written
            self._stack.__exit__(*raised)

    def _close_events(self, kind: object, error: BaseException | None, trace: object) -> None:
        assert self.events is not None
        try:
            self.events.close()
        except OSError as close_error:
            if error is None:  # otherwise that error is reported already
                raise self._cant_log(close_error) from close_error

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.several:  # then torchrun sends it, and kills ranks that are left after 30 seconds
            if some_rank_failed():
                raise SystemExit(1)
            self.stop_signal = number
            return
        if self.stop_signal not in (None, BROKEN_PIPE):
            if is_hangup(number):
                return
            raise stop_by(number)
        self.stop_signal = number
        say("saving before it stops; once more stops at once")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of `charts/minutes` and `charts/SPS`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.started += time.monotonic() - began

    def log(
        self, global_step: int, scalars: dict[str, float], *, done: int | None = None, total: int | None = None
    ) -> None:
        """Write scalars to TensorBoard at an agent step; advance the progress to `done`, by default that step.

        `total` is the new length of the run, if it has changed.
        """
        if self.several:
            episodes = [episode for unlogged in gather_to_rank_0(self.unlogged) for episode in unlogged]
            self.unlogged = []
            for step, episode in sorted(episodes):
                self._log_episode(step, episode)
        if not self.progress.update(global_step if done is None else done, self._note(), total):
            self.stop_signal = self.stop_signal or BROKEN_PIPE
        seconds = time.monotonic() - self.started
        speed = {
            "charts/SPS": (global_step - self.first_step) / seconds,
            "charts/minutes": (self.seconds_before + seconds) / 60,  # of training: pauses left out
        }
        self._write({**scalars, **speed}, global_step)

    def log_episodes(self, global_step: int, episodes: Iterable[Episode]) -> None:
        """Write the return and length of finished episodes; with several ranks, only when `log` is called."""
        for episode in episodes:
            if self.several:
                self.unlogged.append((global_step, episode))
            else:
                self._log_episode(global_step, episode)

    def _log_episode(self, global_step: int, episode: Episode) -> None:
        self.returns.append(episode.episodic_return)
        scalars = {"charts/episodic_return": episode.episodic_return, "charts/episodic_length": episode.length}
        self._write(scalars, global_step)

    def _write(self, scalars: dict[str, float], global_step: int) -> None:
        if self.events is None:
            return
        # In one record, as each has a checksum, computed in Python. `add_scalar` writes one record per value.
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=as_number(tag, scalars[tag])) for tag in scalars])
        try:
            self.events.add(summary, global_step)
        except OSError as error:
            raise self._cant_log(error) from error

    def _cant_log(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self.run_dir} can't be written any more, and its last checkpoint is kept: {error}")

    def _note(self) -> str:
        if not self.returns:
            return "no episode finished yet"
        mean = sum(self.returns) / len(self.returns)
        return f"mean return {mean:.1f} (last {len(self.returns)})"

    def checkpoint(self, global_step: int, state: Callable[[], State], *, finished: bool = False) -> None:
        """Save if it is due: at the start, every `checkpoint_frequency` steps, at the end, and when asked to stop.

        Also after a new `best.pt`, which is then never from steps that a resumed run would redo. If one of several
        ranks is asked to stop, all stop.

        Raises:
            KeyboardInterrupt: after saving; `Stopped` at SIGTERM, at SIGHUP and if standard error is lost.
        """
        stop = self._agreed_stop() if self.several else self.stop_signal
        due = self.found_better or global_step - self.last_saved >= self.config.checkpoint_frequency
        if self.run_dir is not None and (finished or due or global_step == 0 or stop is not None):
            self._save(CHECKPOINT_FILE, global_step, state)
            self.last_saved, self.found_better = global_step, False
        if self.several:
            wait_at_most(USUAL)  # for other ranks, from here on: no file is being written now
        else:
            stop = self.stop_signal  # it may have come meanwhile
        if stop is not None and not finished:
            raise stop_by(stop)
        if self.turns is not None and not finished:
            self.turns.pass_on()  # to another training run on these cores

    def _agreed_stop(self) -> int | None:
        """Return the signal that one of several ranks has received; later ones wait for the next call."""
        orphaned = os.getppid() != self.starter  # torchrun is gone
        return max_over_ranks(self.stop_signal or (signal.SIGTERM if orphaned else 0)) or None

    def keep_best(self, global_step: int, mean_return: float, state: Callable[[], State]) -> None:
        """Log the mean return of some greedy games; if it is the best so far, save to `best.pt`."""
        if self.run_dir is None:
            return
        self._write({"eval/mean_return": mean_return}, global_step)
        if mean_return > self.best_return:
            self.best_return, self.found_better = mean_return, True
            self._save(BEST_FILE, global_step, state)

    def _save(self, file: str, global_step: int, state: Callable[[], State]) -> None:
        assert self.run_dir is not None
        path = self.run_dir / file
        common = {
            "algorithm": self.algorithm,
            "global_step": global_step,
            "returns": list(self.returns),
            "best_return": self.best_return,
            "seconds": self.seconds_before + time.monotonic() - self.started,
            "random_state": random_state(),
            "network_class": type(self.network).__qualname__,
        }
        try:
            if self.events is not None:
                self.events.flush()  # or a killed run would continue from here without the last events
            learned = state()
            require_same_parts(learned)
            require_finite(learned, global_step)
            broadcast_from_rank_0(lambda: save_checkpoint(path, {**common, **learned}))
        except OSError as error:
            step = f"agent step {global_step:,}"
            kept = "; the one before is kept" if path.exists() else ""
            raise ConfigError(f"{path} can't be written at {step}{kept}: {error}") from error


def require_same_parts(state: State) -> None:
    """Raise RankError unless all ranks have the same parts, bit for bit, as checksums tell: rank 0 saves its own."""
    if world_size() == 1:
        return
    for name in sorted(state.keys() - TAKEN):
        mine = checksum(state[name])
        if max_over_ranks(mine) != -max_over_ranks(-mine):
            why = "every gradient must be averaged (`average_gradients`), on processors of one kind"
            raise RankError(f"ranks must have the same {name!r} in `learned`, for rank 0 saves its own; {why}")
