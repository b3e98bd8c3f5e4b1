"""Checkpoints: what training needs to go on, in files that a crash can't break and that run nobody's code."""

import contextlib
import io
import math
import os
import pickle
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from minirl.checks import ConfigError
from minirl.envs.state import capture_generators, restore_generators

CHECKPOINT_FILE = "checkpoint.pt"
BEST_FILE = "best.pt"

# What every algorithm's checkpoint holds.
COMMON = {"global_step": int, "returns": list, "best_return": float, "seconds": float, "random_state": dict}

# What PyTorch's optimisers keep of each weight, in the weight's shape; other things have others.
MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "sum"}

# What PyTorch's optimisers keep of each group that is a matter of the machine: true on a GPU, an error on a processor.
OF_THE_MACHINE = {"capturable"}

State = dict[str, Any]


def save_checkpoint(path: Path, state: State) -> None:
    """Write `state` to `path` so that a crash at any moment leaves the old file or the new one, never a mixture.

    What is written is read back before it takes the old one's place: what can't be read can't be gone on from.

    Raises:
        ConfigError: naming what can't be read back: the old file is kept.
        OSError: if the disk is full, say.
    """
    with atomic_file(path) as temporary:
        try:
            temporary.write_bytes(_saved(state))
            torch.load(temporary, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:
            bad = " and ".join(name for name, value in state.items() if not _readable(value))
            what = f"must hold tensors and plain data, and {bad} is something else" if bad else "can't be read back"
            raise ConfigError(f"{path} {what}; the file before is kept") from error


def _saved(state: State) -> memoryview:
    """Return what a file of `state` holds. Python writes it, whose errors say what is the matter with a disk."""
    content = io.BytesIO()
    torch.save(_with_tensors(state), content)
    return content.getbuffer()


def _readable(value: Any) -> bool:
    """Whether a value can be read back from a checkpoint."""
    try:
        torch.load(io.BytesIO(_saved({"value": value})), weights_only=True)
    except Exception:  # torch raises a dozen kinds
        return False
    return True


def _with_tensors(value: Any) -> Any:
    """Return plain data with tensors for its arrays: `weights_only=True` reads no arrays."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: _with_tensors(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_tensors(item) for item in value)
    return value


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, flush it to disk and move it there."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_checkpoint(run_dir: Path | None, algorithm: str, *keys: str, file: str = CHECKPOINT_FILE) -> State:
    """Read the checkpoint of a run into CPU memory. Nothing in the file is executed, whoever wrote it.

    Args:
        run_dir: the directory of the run.
        algorithm: whose checkpoint it must be.
        keys: what it must hold of the algorithm's own state.
        file: `checkpoint.pt` or `best.pt`.

    Returns:
        What was saved, and its `path`.

    Raises:
        ConfigError: if there is none, it is not a checkpoint, or it is another algorithm's.
    """
    if run_dir is None:
        raise ConfigError("resume=True needs run_dir, the directory of the run")
    path = run_dir / file
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd pickles: the error says enough
            state: State = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no checkpoint here") from None
    except Exception as error:  # torch raises a dozen kinds for a broken or foreign file
        # What torch itself says of code in a file is how to run it.
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "it holds something other than tensors and plain data" if unsafe else f"it is broken ({brief(error)})"
        raise ConfigError(f"{path} must be a checkpoint that minirl wrote, and can't be read: {reason}") from error
    if not isinstance(state, dict) or state.get("algorithm") != algorithm:
        raise ConfigError(f"{path} must be a checkpoint of {algorithm}, and is not")
    if missing := {*COMMON, *keys} - state.keys():
        raise ConfigError(f"{path} must be a whole checkpoint, and has no {', '.join(sorted(missing))}")
    with reading({"path": path}):
        for key, kind in COMMON.items():
            if type(state[key]) is not kind:
                raise TypeError(f"{key} is no {kind.__name__}: {state[key]!r}")
        if state["global_step"] < 0:
            raise ValueError(f"global_step is {state['global_step']}")
        if bad := not_finite(state):
            raise ValueError(f"{', '.join(bad)} not finite")
    return {**state, "path": str(path)}


@contextlib.contextmanager
def reading(saved: State) -> Iterator[None]:
    """Name the file of a checkpoint where what it holds does not fit: it is another run's, say, or was changed.

    Raises:
        ConfigError: for whatever goes wrong in the block.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{saved['path']} must be of a run as this one, and does not fit: {brief(error)}") from error


def brief(error: Exception) -> str:
    """Return an error's type and the last line of what it says, up to 200 characters."""
    text = ": ".join([type(error).__name__, *str(error).strip().splitlines()[-1:]])
    return textwrap.shorten(text, 200, placeholder="...")


class Part(Protocol):
    """What a checkpoint can hold: networks, optimisers, and whatever else has these two methods."""

    def state_dict(self) -> dict[str, Any]:
        """Return its state, as tensors and plain data."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Put it back."""


def load_parts(parts: Mapping[str, Part], saved: State | None) -> None:
    """Put back what a checkpoint holds of each part, by its name; without a checkpoint do nothing.

    Raises:
        ConfigError: if it does not fit: the run was on another environment, or its file comes from elsewhere.
    """
    if saved is None:
        return
    if missing := [name for name in parts if name not in saved]:
        raise ConfigError(f"{saved['path']} must be of a run as this one, and has no {', '.join(missing)}")
    with reading(saved):
        for name, part in parts.items():
            groups = part.param_groups if isinstance(part, torch.optim.Optimizer) else []
            here = [{key: group[key] for key in OF_THE_MACHINE & group.keys()} for group in groups]
            part.load_state_dict(saved[name])
            if isinstance(part, torch.optim.Optimizer):
                _require_fitting_moments(part)
                for group, own in zip(part.param_groups, here, strict=True):
                    group.update(own)


def _require_fitting_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimiser's moments their parameters' layout: fused kernels go through memory, not shapes.

    Raises:
        ValueError: if they are of other shapes.
    """
    for parameter, state in optimizer.state.items():
        for name in MOMENTS & state.keys():
            if state[name] is None:
                continue
            if state[name].shape != parameter.shape:
                raise ValueError("the optimiser is of a network of other shapes")
            state[name] = torch.empty_like(parameter, dtype=state[name].dtype).copy_(state[name])


def load_weights(network: nn.Module, saved: State, key: str = "model") -> None:
    """Put the weights that a checkpoint holds under `key` into the network.

    Raises:
        ConfigError: if they do not fit it: the run was on another environment, or its file comes from elsewhere.
    """
    with reading(saved):
        network.load_state_dict(saved[key])


ADVICE = "the checkpoint before is kept; try a lower learning rate"


class DivergedError(RuntimeError):
    """Training has come to numbers that are not finite. The message says where; the checkpoint before is kept."""


def require_finite_losses(losses: dict[str, float], unit: str, number: int) -> None:
    """Stop a training whose losses are not finite: its weights are lost by then, too.

    Args:
        losses: by name.
        unit: what they are of, "update" say.
        number: which of those.

    Raises:
        DivergedError: naming the losses and the update.
    """
    if not all(map(math.isfinite, losses.values())):
        bad = [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
        raise DivergedError(f"training has diverged: {', '.join(bad)} in {unit} {number:,}; {ADVICE}")


def require_finite(learned: State, global_step: int) -> None:
    """Refuse to save weights that are not finite.

    Raises:
        DivergedError: naming them.
    """
    if bad := not_finite(learned):
        raise DivergedError(
            f"training has diverged: {', '.join(bad)} not finite at agent step {global_step:,}; {ADVICE}"
        )


def not_finite(learned: State) -> list[str]:
    """Return the names of the weights that are not finite: a Q-table's, or those of any network of a checkpoint."""
    weights: dict[str, Any] = {"q_table": learned.get("q_table")}
    for part in learned.values():
        if isinstance(part, dict):
            weights |= part
    return [
        name for name, value in weights.items() if isinstance(value, torch.Tensor) and not torch.isfinite(value).all()
    ]


def random_state() -> State:
    """Return the random states of PyTorch, NumPy and Python; those of CUDA only if this process uses it."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        **capture_generators(),
    }


def set_random_state(saved: State) -> None:
    """Put back the random states of a checkpoint, as far as this machine has the same devices.

    Raises:
        ConfigError: if they are none.
    """
    with reading(saved):
        state = saved["random_state"]
        torch.set_rng_state(state["cpu"])
        restore_generators(state)
        for device, cuda in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(cuda, device)


@contextlib.contextmanager
def untouched_random_state() -> Iterator[None]:
    """Put the random states of PyTorch, NumPy and Python back to what they were before the block."""
    before = {"random_state": random_state()}
    try:
        yield
    finally:
        set_random_state(before)
