"""The directory of a run: created, claimed by one process, and holding the settings.

runs/ppo/PongNoFrameskip-v4/20260131-142500-seed42/
    config.json              the algorithm and its settings
    checkpoint.pt            the latest checkpoint, replaced atomically
    best.pt                  the best one by greedy games, if the algorithm plays them (DQN)
    memory-*.npz             the replay memory that the checkpoint belongs with (DQN)
    videos/step-*.gif        recorded games, if `video_frequency` asks for them
    events.out.tfevents...   TensorBoard; `.0.settings` has the settings
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minirl.checks import ConfigError
from minirl.envs.ids import spec_of
from minirl.runs.checkpoints import BEST_FILE, CHECKPOINT_FILE, atomic_file, load_checkpoint

if sys.platform != "win32":
    import fcntl

CONFIG_FILE = "config.json"


@contextlib.contextmanager
def default_run_dir(algorithm: str, config: Any) -> Iterator[Path]:
    """Make `runs/<algorithm>/<env>/<time>-seed<seed>`, with a number appended if that is taken.

    Without an environment, <env> is "texts". Directories that are still empty when the block ends are removed.

    Raises:
        ConfigError: if there is no such environment, or the directory can't be made.
    """
    env_id: str = getattr(config, "env_id", "texts")
    env_name = env_id.replace("/", "-").replace(":", "-")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-seed{config.seed}"
    run_dir = Path("runs").absolute() / algorithm / env_name / name
    if hasattr(config, "env_id"):
        spec_of(env_id)  # before the directory, whose own error would hide this one
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
        with contextlib.suppress(OSError):  # usually not empty
            for folder in (run_dir, *run_dir.parents[:3]):
                folder.rmdir()


def claim(run_dir: Path) -> None:
    """Make a directory this run's own: if several try, one succeeds.

    Raises:
        ConfigError: if it belongs to another run, or can't be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for file in (CHECKPOINT_FILE, BEST_FILE):
            if (run_dir / file).exists() and not (run_dir / CONFIG_FILE).exists():
                raise ConfigError(f"--run-dir must be a new directory: {run_dir} holds {file} of another run")
        (run_dir / CONFIG_FILE).open("x").close()
    except FileExistsError as error:
        if not run_dir.is_dir():
            raise ConfigError(f"--run-dir must be a directory, and {run_dir} is a file") from error
        go_on = "continue it with " + shlex.join(["--resume", str(run_dir)])
        if not (run_dir / CHECKPOINT_FILE).exists():
            go_on = "it has no checkpoint yet: if it has been stopped, remove the directory"
        raise ConfigError(f"--run-dir must be a new directory: {run_dir} holds a run; {go_on}") from error
    except OSError as error:
        raise ConfigError(f"--run-dir must be a directory that can be written: {error}") from error


def lock(run_dir: Path) -> int | None:
    """Keep other processes from writing to a run directory, until the descriptor is closed or this process ends.

    Returns:
        A file descriptor of the directory; None if the platform (Windows) or, with a warning, the file system has no
        such locks.

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
    if isinstance(settings, dict) and settings.get("algorithm") == "rlhf":
        del kinds["env_id"]  # its task is texts
    if not isinstance(settings, dict) or any(type(settings.get(key)) is not kind for key, kind in kinds.items()):
        raise ConfigError(f"{path} must hold the settings of a run")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def files_after(run_dir: Path, algorithm: str, global_step: int) -> list[Path]:
    """Return the files that a run wrote after the checkpoint of this agent step: a resumed run must drop them.

    Raises:
        ConfigError: if `best.pt` can't be read.
    """
    steps = {path: path.stem.removeprefix("step-") for path in run_dir.glob("videos/step-*.gif")}
    later = [path for path, step in steps.items() if step.isdecimal() and int(step) > global_step]
    best = run_dir / BEST_FILE
    if best.exists() and load_checkpoint(run_dir, algorithm, file=BEST_FILE)["global_step"] > global_step:
        later.append(best)
    return later
