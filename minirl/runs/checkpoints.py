"""Checkpoints: what training needs to continue, in files that a crash can't break and that run no code when read."""

import contextlib
import io
import math
import os
import pickle
import textwrap
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from minirl.checks import ConfigError
from minirl.envs.state import capture_generators, restore_generators
from minirl.fast.rewrites import own_attributes
from minirl.runs.progress import say

CHECKPOINT_FILE = "checkpoint.pt"
BEST_FILE = "best.pt"

# What every algorithm's checkpoint holds.
COMMON = {"global_step": int, "returns": list, "best_return": float, "seconds": float, "random_state": dict}

# What PyTorch's optimisers keep for each weight, in the weight's shape; the rest of their state has other shapes.
MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "sum"}

State = dict[str, Any]


def save_checkpoint(path: Path, state: State) -> None:
    """Write `state` to `path` so that a crash at any moment leaves the old file or the new one, never a mixture.

    The new file is read back before it replaces the old one: a run can't continue from a file that can't be read.

    Raises:
        ConfigError: naming what can't be read back; the old file is kept.
        OSError: for example if the disk is full.
    """
    with atomic_file(path) as temporary:
        try:
            temporary.write_bytes(_saved(state))
            torch.load(temporary, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:
            bad = " and ".join(place for name, value in state.items() for place in _unreadable(name, value))
            what = f"must hold tensors and plain data, and {bad}" if bad else "can't be read back"
            raise ConfigError(f"{path} {what}; the file before is kept") from error


def _saved(state: State) -> memoryview:
    """Return the bytes of a file of `state`. Python writes them, as its errors say what is wrong with a disk."""
    content = io.BytesIO()
    torch.save(_with_tensors(state), content)
    return content.getbuffer()


def _unreadable(name: str, value: Any) -> Iterator[str]:
    """Yield what in a value can't be read back from a checkpoint, as in "extra['queue'] is a deque"."""
    try:
        torch.load(io.BytesIO(_saved({"value": value})), weights_only=True)
    except Exception:  # torch raises a dozen kinds
        parts = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list | tuple) else {}
        places = [place for key, part in parts.items() for place in _unreadable(f"{name}[{key!r}]", part)]
        yield from places or [f"{name} is a {type(value).__name__}"]


def _with_tensors(value: Any) -> Any:
    """Return plain data with tensors in place of arrays: `weights_only=True` reads no arrays."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.bool_ | np.number):
        return value.item()
    if isinstance(value, dict):
        return {key: _with_tensors(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_tensors(item) for item in value)
    return value


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; if the block succeeds, flush that file to disk and move it to `path`."""
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
    """Read the checkpoint of a run into CPU memory. No code in the file is executed, whoever wrote it.

    Args:
        run_dir: the directory of the run.
        algorithm: the algorithm that must have written it.
        keys: parts of the algorithm's own state that it must hold.
        file: `checkpoint.pt` or `best.pt`.

    Returns:
        What was saved, and the file's `path`.

    Raises:
        ConfigError: if there is no file, it is not a checkpoint, or it is another algorithm's.
    """
    if run_dir is None:
        raise ConfigError("resume=True needs run_dir, the directory of the run")
    path = run_dir / file
    try:
        with warnings.catch_warnings(action="ignore"):  # about odd pickles: the error says enough
            state: State = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no checkpoint here") from None
    except Exception as error:  # torch raises a dozen kinds for a broken or foreign file
        # For a file that holds code, torch's own message tells how to run it.
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
    """Name the checkpoint's file in errors if its content does not fit, such as another run's or an edited one.

    Raises:
        ConfigError: for any error in the block.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{saved['path']} must be of a run as this one, and does not fit: {brief(error)}") from error


def brief(error: Exception) -> str:
    """Return an error's type and the last line of its message, up to 200 characters."""
    text = ": ".join([type(error).__name__, *str(error).strip().splitlines()[-1:]])
    return textwrap.shorten(text, 200, placeholder="...")


class Part(Protocol):
    """What a checkpoint can hold: networks, optimisers, and anything else with these two methods."""

    def state_dict(self) -> dict[str, Any]:
        """Return its state as tensors and plain data."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Put it back."""


# Names in a checkpoint that are not parts.
TAKEN = {
    *(*COMMON, "algorithm", "path", "ranks", "envs", "obs", "network_class", "numbers"),
    *("episodes", "rng", "memory"),  # Double DQN's
    *("kl_coef", "pairs", "vocabulary", "texts"),  # RLHF's
}


def save_parts(parts: Mapping[str, Part]) -> State:
    """Return the state of each part, by its name, and the numbers of networks, which PyTorch does not save."""
    numbers = {name: numbers_of(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    return {"numbers": numbers, **{name: _state_of(part) for name, part in parts.items()}}


def _state_of(part: Part) -> Any:
    state = part.state_dict()
    if isinstance(part, torch.optim.Optimizer) and (own := own_attributes(part)):
        # PyTorch saves none of it: a count of steps, say, of an optimiser that somebody wrote.
        return {**state, "attributes": {name: value for name, value in own.items() if _is_saved(name, value)}}
    return state


def _is_saved(name: str, value: Any) -> bool:
    """Whether an own optimiser's attribute is saved: not weights, which the network has, nor what a line names."""
    leaves = tree_leaves(value)
    if any(isinstance(leaf, nn.Parameter) for leaf in leaves):
        return False
    if not next(_unreadable(name, value), None):
        return True
    warnings.warn(f"the optimiser's `{name}` can't be saved, and a resumed run makes it anew", stacklevel=2)
    return False


def numbers_of(network: nn.Module) -> dict[str, float]:
    """Return the numbers that a network's layers have as attributes, by `layer.attribute`: training may change them."""
    return {
        f"{path}.{name}": value
        for path, layer in network.named_modules()
        for name, value in vars(layer).items()
        if type(value) in (int, float)
    }


def put_numbers(network: nn.Module, numbers: dict[str, float]) -> None:
    """Give a network the numbers that were saved; a line says where its code has another."""
    layers = dict(network.named_modules())
    for place, value in numbers.items():
        path, _, name = place.rpartition(".")
        if path in layers:
            if (here := vars(layers[path]).get(name, value)) != value:
                say(f"{place.lstrip('.')} is {value}, as it was saved, and not {here}")
            setattr(layers[path], name, value)


def load_parts(parts: Mapping[str, Part], saved: State | None) -> None:
    """Restore each part from a checkpoint, by its name; without a checkpoint do nothing.

    Raises:
        ConfigError: if it does not fit: the run had another environment, or the file comes from elsewhere.
    """
    if taken := TAKEN & parts.keys():
        raise ValueError(f"a part of a checkpoint can't be called {' or '.join(sorted(taken))}: something else is")
    if saved is None:
        return
    if missing := [name for name in parts if name not in saved]:
        raise ConfigError(f"{saved['path']} must be of a run as this one, and has no {', '.join(missing)}")
    with reading(saved):
        for name, part in parts.items():
            part.load_state_dict(saved[name])
            if isinstance(part, nn.Module):
                put_numbers(part, saved.get("numbers", {}).get(name, {}))
            if isinstance(part, torch.optim.Optimizer):
                _put_attributes(part, saved[name].get("attributes", {}))
                _fit_to_this_machine(part)


def _put_attributes(optimizer: torch.optim.Optimizer, attributes: dict[str, Any]) -> None:
    device = optimizer.param_groups[0]["params"][0].device
    vars(optimizer).update(tree_map_only(torch.Tensor, lambda value: value.to(device), attributes))


def _fit_to_this_machine(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimiser from a checkpoint, perhaps another machine's, fit its parameters here.

    Raises:
        ValueError: if its moments are of parameters of other shapes: they come in order, and fused kernels read on.
    """
    for group in optimizer.param_groups:
        if "capturable" in group:  # true on a GPU, an error on a CPU
            group["capturable"] &= all(parameter.is_cuda for parameter in group["params"])
    for parameter, state in optimizer.state.items():
        for name in MOMENTS & state.keys():
            value = state[name]
            if value is None:
                continue
            if value.shape != parameter.shape:
                raise ValueError("the optimiser is of a network of other shapes")
            # Fused kernels go by memory, not by shape: moments need their parameter's layout.
            state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def load_weights(network: nn.Module, saved: State, key: str = "model") -> None:
    """Load the weights that a checkpoint holds under `key` into the network.

    Raises:
        ConfigError: if they do not fit: the run had another environment, or the file comes from elsewhere; or if the
            run trained a network of another class, which may do something else with the same weights.
    """
    trained, here = saved.get("network_class"), type(network).__qualname__
    if key == "model" and trained not in (None, here):
        where = "make the same one in `train`, evaluation and pictures (`make_agent`, `make_q_network`)"
        raise ConfigError(
            f"{saved['path']} must be of a run as this one, and has the network {trained}, not {here}: {where}"
        )
    with reading(saved):
        network.load_state_dict(saved[key])
        put_numbers(network, saved.get("numbers", {}).get(key, {}))


ADVICE = "the checkpoint before is kept; try a lower learning rate"


class DivergedError(RuntimeError):
    """Training has produced numbers that are not finite. The message says where; the last checkpoint is kept."""


def require_finite_losses(losses: dict[str, float], unit: str, number: int) -> None:
    """Stop training if its losses are not finite: by then its weights are lost, too.

    Args:
        losses: by name.
        unit: what they are losses of, such as "update".
        number: which of these units.

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
    """Return the names of the weights that are not finite, in a Q-table or in any network of a checkpoint."""
    weights: dict[str, Any] = {"q_table": learned.get("q_table")}
    for name, part in learned.items():
        if isinstance(part, dict):
            weights |= {key if name == "model" else f"{name}.{key}": value for key, value in part.items()}
    return [
        name for name, value in weights.items() if isinstance(value, torch.Tensor) and not torch.isfinite(value).all()
    ]


def checksum(state: Any) -> int:
    """Return a number that changes with any bit of the tensors, arrays and plain data in a part's state."""
    number = 0
    for value in tree_leaves(state):
        whole = repr(value).encode()
        if isinstance(value, torch.Tensor):
            whole = value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
        elif isinstance(value, np.ndarray):
            whole = value.tobytes()
        number = zlib.crc32(whole, number)
    return number


def random_state() -> State:
    """Return the random states of PyTorch, NumPy and Python; those of CUDA only if this process uses it."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        **capture_generators(),
    }


def set_random_state(saved: State) -> None:
    """Restore the random states of a checkpoint, as far as this machine has the same devices.

    Raises:
        ConfigError: if they are not random states.
    """
    with reading(saved):
        state = saved["random_state"]
        torch.set_rng_state(state["cpu"])
        restore_generators(state)
        for device, cuda in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(cuda, device)


@contextlib.contextmanager
def untouched_random_state() -> Iterator[None]:
    """After the block, restore the random states of PyTorch, NumPy and Python from before it."""
    before = {"random_state": random_state()}
    try:
        yield
    finally:
        set_random_state(before)
