"""A training run on disk: its directory, when it saves, TensorBoard events, seeds and signals.

    runs/ppo/PongNoFrameskip-v4/20260131-142500-seed42/
        config.json              the algorithm and its settings
        checkpoint.pt            the latest checkpoint, replaced atomically
        best.pt                  the best one by greedy games, where an algorithm plays them (DQN)
        memory-*.npz             the replay memory that the checkpoint belongs with (DQN)
        videos/step-*.gif        recorded games, where `video_frequency` asks for them
        events.out.tfevents...   TensorBoard; `.0.settings` has the settings

The same for every algorithm. With `run_dir=None` nothing is written.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import shlex
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from tensorboard.compat.proto.summary_pb2 import Summary

from minirl.checks import ConfigError
from minirl.envs.ids import is_atari, registered_id, user_errors
from minirl.envs.vector import Episode
from minirl.runs.checkpoints import (
    BEST_FILE,
    CHECKPOINT_FILE,
    State,
    atomic_file,
    load_checkpoint,
    random_state,
    require_finite,
    save_checkpoint,
)
from minirl.runs.events import Events, save_settings_row
from minirl.runs.progress import Progress, say, silence
from minirl.runs.settings import MAX_SEED

if sys.platform != "win32":
    import fcntl

CONFIG_FILE = "config.json"
BROKEN_PIPE = 13  # SIGPIPE, which Windows has not


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators (all devices), and have a GPU compute the same each time.

    Environments are seeded by their first reset.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - environments and users' code may draw from the global generator
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True  # or the same convolution may round differently from call to call
    torch.backends.cudnn.allow_tf32 = False  # or float32 would be multiplied with 10 bits behind the point


def derived_seed(seed: int, *purpose: int) -> int:
    """Return a seed for another purpose, as good as unrelated to `seed`, to the seeds near it and to other purposes."""
    return int(np.random.SeedSequence(seed, spawn_key=purpose).generate_state(1)[0]) % MAX_SEED


@contextlib.contextmanager
def default_run_dir(algorithm: str, config: Any) -> Iterator[Path]:
    """Make `runs/<algorithm>/<env>/<time>-seed<seed>`, with a number behind it where that is taken.

    What is still empty when the block ends goes again.

    Raises:
        ConfigError: if there is no such environment, or the directory can't be made.
    """
    env_name: str = config.env_id.replace("/", "-").replace(":", "-")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-seed{config.seed}"
    run_dir = Path("runs").absolute() / algorithm / env_name / name
    with user_errors():
        gym.spec(registered_id(config.env_id))  # or the directory of what does not exist might be refused instead
    for number in itertools.count(2):
        try:
            run_dir.mkdir(parents=True)
            break
        except FileExistsError:
            run_dir = run_dir.with_name(f"{name}-{number}")
        except OSError as error:
            raise ConfigError(f"--run-dir must be a directory that can be written: {error}") from error
    try:
        yield run_dir
    finally:
        with contextlib.suppress(OSError):  # not empty, mostly
            for folder in (run_dir, *run_dir.parents[:3]):
                folder.rmdir()


def claim(run_dir: Path) -> None:
    """Make a directory this run's own: of several that try, one succeeds.

    Raises:
        ConfigError: if it is another run's, or can't be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / CONFIG_FILE).open("x").close()
    except FileExistsError as error:
        if not run_dir.is_dir():
            raise ConfigError(f"--run-dir must be a directory, and {run_dir} is a file") from error
        go_on = shlex.join(["--resume", str(run_dir)])
        raise ConfigError(
            f"--run-dir must be a new directory: {run_dir} holds a run; continue it with {go_on}"
        ) from error
    except OSError as error:
        raise ConfigError(f"--run-dir must be a directory that can be written: {error}") from error


def lock(run_dir: Path) -> int | None:
    """Keep other processes from writing to a run directory, until what is returned is closed or this process ends.

    Returns:
        A file descriptor of the directory; None where the platform (Windows) or, with a warning, the file system has
        no such locks.

    Raises:
        ConfigError: if another process is writing there.
    """
    if sys.platform == "win32":
        return None
    directory = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(directory)
        raise ConfigError(f"--resume must name a run that has stopped: another process writes to {run_dir}") from None
    except OSError as error:  # some network file systems
        os.close(directory)
        warnings.warn(f"{run_dir} can't be locked, see to it that no other process writes there: {error}", stacklevel=2)
        return None
    return directory


def stop_signals() -> list[int]:
    """Return those that mean to save and stop: Ctrl-C, SIGTERM and, without `nohup`, that the terminal is gone."""
    if sys.platform == "win32" or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return [signal.SIGINT, signal.SIGTERM]
    return [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def is_hangup(number: int) -> bool:
    """Whether a signal says that the terminal is gone. Shell and system both say so: a second one hurries nobody."""
    return sys.platform != "win32" and number == signal.SIGHUP


def save_config(run_dir: Path, algorithm: str, config: Any) -> None:
    """Write the algorithm's name and all settings to `config.json`."""
    settings = {"algorithm": algorithm, **dataclasses.asdict(config)}
    with atomic_file(run_dir / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")


def load_settings(run_dir: Path) -> dict[str, Any]:
    """Read `config.json` of a run directory.

    Raises:
        ConfigError: if it is missing or not such a file.
    """
    path = run_dir / CONFIG_FILE
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{run_dir} must be a run directory, and has no {CONFIG_FILE}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from error
    kinds = {"algorithm": str, "env_id": str, "seed": int}
    if not isinstance(settings, dict) or any(type(settings.get(key)) is not kind for key, kind in kinds.items()):
        raise ConfigError(f"{path} must hold the settings of a run")
    return settings


def files_after(run_dir: Path, algorithm: str, global_step: int) -> list[Path]:
    """Return the files that a run wrote after the checkpoint of this agent step: they are not what it goes on from.

    Raises:
        ConfigError: if `best.pt` can't be read.
    """
    later = [
        path
        for path in run_dir.glob("videos/step-*.gif")
        if (step := path.stem.removeprefix("step-")).isdecimal() and int(step) > global_step
    ]
    best = run_dir / BEST_FILE
    if best.exists() and load_checkpoint(run_dir, algorithm, file=BEST_FILE)["global_step"] > global_step:
        later.append(best)
    return later


# What changes no result, or how far a run goes only, or which games are shown.
NO_RECIPE = {
    *("env_id", "seed", "total_timesteps", "num_episodes", "compile", "precision", "num_workers"),
    *("eval_frequency", "eval_episodes", "confirm_episodes", "checkpoint_frequency", "video_frequency"),
}
# Tasks that README.md has settings for, beside those of the defaults.
RECIPES = {
    "ppo": ("CartPole-v1",),
    "dqn": ("PongNoFrameskip-v4",),
    "q_learning": ("CliffWalking-v1", "FrozenLake-v1", "Taxi-v4"),
}


def recipe_note(algorithm: str, config: Any) -> str | None:
    """Return a line on where to find settings for a task that all defaults are not for; None where some are chosen."""
    defaults, others = type(config)(), RECIPES.get(algorithm)
    chosen = {name for name, value in vars(config).items() if value != vars(defaults)[name]}
    of_its_kind = is_atari(config.env_id) and is_atari(defaults.env_id)
    if others is None or "env_id" not in chosen or chosen - NO_RECIPE or of_its_kind:
        return None
    where = f"those for {config.env_id}" if config.env_id in others else f"some for {' and '.join(others)}"
    return f'all settings are the defaults, which are for {defaults.env_id}; README.md, "Train", has {where}'


def new_schedules(before: dict[str, Any], config: Any, done: float) -> str | None:
    """Return a line on what the schedules of a run do whose total has changed, or None if it has not or there are none.

    Args:
        before: the settings so far.
        config: the settings from here on.
        done: the share of the new total that is done.
    """
    name = "total_timesteps" if hasattr(config, "total_timesteps") else "num_episodes"
    total = getattr(config, name)
    annealed = [
        field.name
        for field in dataclasses.fields(config)
        if field.name.startswith("anneal_") and getattr(config, field.name)
    ]
    parts = []
    if annealed:
        parts.append(f"{', '.join(annealed)}: from {1 - done:.0%} of the start value here to 0 at the new end")
    if hasattr(config, "exploration_fraction") and config.epsilon_decay is None:
        parts.append(f"epsilon: falls until {config.exploration_fraction:.0%} of the new total")
    if before.get(name) == total or not parts:
        return None
    return f"{name} is {total:,} now, and schedules follow it; {'; '.join(parts)}"


class Stopped(KeyboardInterrupt):
    """Another signal than Ctrl-C's has stopped a training, which has saved; `number` is the signal's.

    A KeyboardInterrupt, so that whatever ends at Ctrl-C ends here, too; pytest takes SystemExit for a failed test.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number


def stop_by(number: int) -> KeyboardInterrupt:
    """Return what stops a training at this signal: at Ctrl-C, what Python itself raises."""
    return KeyboardInterrupt() if number == signal.SIGINT else Stopped(number)


class Run:
    """One training run: logs it, shows its progress, saves it, and stops it when asked to.

    Use it as a context manager. Ctrl-C, SIGTERM or SIGHUP is kept until the algorithm next calls `checkpoint`, which
    saves and then raises KeyboardInterrupt, `Stopped` unless it was Ctrl-C; a second one stops at once. `Stopped`, too,
    when standard error can't be written any more: the `tee` behind the pipe has ended, or the disk is full.

    Args:
        algorithm: its name, for `config.json`.
        config: the settings; `checkpoint_frequency` (agent steps) is read here.
        run_dir: where to write; None for nowhere.
        total: when the run is done, in `unit`.
        done: how much of that earlier sessions did.
        unit: what progress is counted in, "steps" or "episodes".
        resumed: the checkpoint that this run goes on from.
    """

    def __init__(
        self,
        algorithm: str,
        config: Any,
        run_dir: Path | None,
        *,
        total: int,
        done: int = 0,
        unit: str = "steps",
        resumed: State | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.config = config
        self.run_dir = run_dir
        self.returns: deque[float] = deque(resumed["returns"] if resumed else [], maxlen=100)
        self.best_return: float = resumed["best_return"] if resumed else -math.inf
        self.seconds_before: float = resumed["seconds"] if resumed else 0.0
        self.started = time.monotonic()
        self.first_step: int = resumed["global_step"] if resumed else 0
        self.last_saved = self.first_step
        self.found_better = False  # since the last checkpoint
        self.stop_signal: int | None = None
        self.events: Events | None = None
        self.lock: int | None = None
        if run_dir is not None:
            if resumed is None:
                claim(run_dir)
            before = load_settings(run_dir) if resumed is not None else None
            later = files_after(run_dir, algorithm, self.first_step) if resumed is not None else []
            try:
                self.lock = lock(run_dir)
                for path in later:
                    path.unlink()
                save_config(run_dir, algorithm, config)
                # What an interrupted session logged after its last checkpoint is dropped: it is done again.
                purge_step = self.first_step + 1 if resumed else None
                self.events = Events(run_dir, purge_step)
                save_settings_row(run_dir, algorithm, config)
            except BaseException as error:
                # So that the same command can be tried again, by this process, too:
                if self.lock is not None:
                    os.close(self.lock)
                if resumed is None:
                    (run_dir / CONFIG_FILE).unlink(missing_ok=True)
                if isinstance(error, OSError):
                    raise ConfigError(f"{run_dir} must be a directory that can be written: {error}") from error
                raise
            print(f"run directory: {run_dir}", file=sys.stderr)
            if before is not None and (note := new_schedules(before, config, done / total)) is not None:
                print(note, file=sys.stderr)
            if before is None and (note := recipe_note(algorithm, config)) is not None:
                print(note, file=sys.stderr)
        self.progress = Progress(total, done=done, unit=unit)

    def __enter__(self) -> "Run":
        self._old_handlers: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in stop_signals():
                self._old_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.close()
        try:
            if self.events is not None:
                self.events.close()
        except OSError as close_error:
            if error is None:  # otherwise it is told already
                raise self._cant_log(close_error) from close_error
        finally:
            if self.lock is not None:
                os.close(self.lock)
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
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
        """Write scalars to TensorBoard against agent steps; move the progress on to `done`, by default the steps.

        `total` is when the run will be done, where that is no longer what it was.
        """
        try:
            self.progress.update(global_step if done is None else done, self._note(), total)
        except OSError:
            silence(sys.stderr.fileno())
            self.stop_signal = self.stop_signal or BROKEN_PIPE
        seconds = time.monotonic() - self.started
        speed = {
            "charts/SPS": (global_step - self.first_step) / seconds,
            "charts/minutes": (self.seconds_before + seconds) / 60,  # of training: pauses left out
        }
        self._write({**scalars, **speed}, global_step)

    def log_episodes(self, global_step: int, episodes: Iterable[Episode]) -> None:
        """Write the return and the length of finished episodes."""
        for episode in episodes:
            self.returns.append(episode.episodic_return)
            scalars = {"charts/episodic_return": episode.episodic_return, "charts/episodic_length": episode.length}
            self._write(scalars, global_step)

    def _write(self, scalars: dict[str, float], global_step: int) -> None:
        if self.events is None:
            return
        # In one record: each has a checksum, in Python. `add_scalar` writes one for each value.
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()])
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
        """Save when it is time: at the start, every `checkpoint_frequency` steps, at the end, and when asked to stop.

        After a new `best.pt`, too: that is then never of a branch that a resumed run does not go on with.

        Raises:
            KeyboardInterrupt: after saving; `Stopped` at SIGTERM, at SIGHUP and when nobody listens.
        """
        due = self.found_better or global_step - self.last_saved >= self.config.checkpoint_frequency
        if self.run_dir is not None and (finished or due or global_step == 0 or self.stop_signal is not None):
            self._save(CHECKPOINT_FILE, global_step, state)
            self.last_saved, self.found_better = global_step, False
        if self.stop_signal is not None and not finished:
            raise stop_by(self.stop_signal)

    def keep_best(self, global_step: int, mean_return: float, state: Callable[[], State]) -> None:
        """Log the mean return of some greedy games; if all before were worse, save to `best.pt`."""
        if self.run_dir is None:
            return
        self._write({"eval/mean_return": mean_return}, global_step)
        if mean_return > self.best_return:
            self.best_return, self.found_better = mean_return, True
            self._save(BEST_FILE, global_step, state)

    def _save(self, file: str, global_step: int, state: Callable[[], State]) -> None:
        assert self.run_dir is not None
        assert self.events is not None
        common = {
            "algorithm": self.algorithm,
            "global_step": global_step,
            "returns": list(self.returns),
            "best_return": self.best_return,
            "seconds": self.seconds_before + time.monotonic() - self.started,
            "random_state": random_state(),
        }
        try:
            self.events.flush()  # or a killed run would go on from here without the events of the last minutes
            learned = state()
            require_finite(learned, global_step)
            save_checkpoint(self.run_dir / file, {**common, **learned})
        except OSError as error:
            path, step = self.run_dir / file, f"agent step {global_step:,}"
            raise ConfigError(f"{path} can't be written at {step}; the one before is kept: {error}") from error
