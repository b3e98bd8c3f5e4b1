"""Several processes train one policy, each on its own share of the environments: `torch.distributed`, torchrun.

    torchrun --nproc-per-node 4 train_ppo.py --num-envs 32          # four ranks, 8 environments each

Every rank plays and learns from its own samples; before each optimiser step the gradients are averaged, so that all
ranks take the same step and hold the same weights, bit for bit. Rank 0 writes files and messages for all.

Without torchrun a process is rank 0 of 1, and every function here returns what it was given.
"""

import contextlib
import importlib
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.optim import Optimizer

from minirl.checks import ConfigError
from minirl.envs.vector import available_cores

T = TypeVar("T")

LAUNCHED = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # set by torchrun
# How long ranks wait for one: when it may have more to do than they, such as compiling or writing a file, and usually.
# torchrun gives a hanging rank 30 seconds more: after a minute all are gone.
PATIENT, USUAL = timedelta(minutes=10), timedelta(seconds=25)


class RankError(RuntimeError):
    """Another rank has ended, does not answer, or has another state."""


def launched() -> bool:
    """Whether this process was started by torchrun, or by something that sets the same variables."""
    return os.environ.keys() >= LAUNCHED


def together() -> bool:
    """Whether this process is one of several ranks (`process_group`)."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process: 0 writes files and messages."""
    return dist.get_rank() if together() else 0


def world_size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if together() else 1


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Within the block this process is one of torchrun's ranks; without torchrun nothing happens.

    GPU tensors are exchanged by nccl, everything else by gloo. A rank computes with its share of the cores, and only
    rank 0 warns. An error that ends one rank ends all: the first to fail says why, and the others, which fail because
    of it, exit silently, with status 1.
    """
    if together() or not launched():
        yield
        return
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # which torchrun sets if the user has not
        torch.set_num_threads(available_cores())
    # The first optimiser imports this module, whose functions have the current group as a default. A group that
    # outlives the block has threads, and if one of them is busy when Python exits, that is a SIGABRT.
    importlib.import_module("torch.distributed.nn.functional")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, number, ranks = next(rendezvous("env://", timeout=PATIENT))
    # torchrun keeps the store when it restarts ranks, and the new ones would look for the old ones in it.
    store = dist.PrefixStore(f"minirl/{attempt()}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=number, world_size=ranks, timeout=PATIENT)
    try:
        with warnings.catch_warnings():
            if rank() != 0:
                warnings.simplefilter("ignore")
            yield
    except Exception:
        if not first_to_fail():
            raise SystemExit(1) from None
        raise
    finally:
        dist.destroy_process_group()


def first_to_fail() -> bool:
    """Whether no other rank has failed so far. Call it once, to decide which rank tells the user."""
    if not together():
        return os.environ.get("RANK", "0") == "0" or not launched()
    try:
        return bool(noticeboard().add(f"minirl/failed/{attempt()}", 1) == 1)
    except RuntimeError:  # the process that held the store is gone
        return True


def some_rank_failed() -> bool:
    """Whether a rank has said why it ends."""
    try:
        return bool(noticeboard().check([f"minirl/failed/{attempt()}"]))
    except RuntimeError:
        return False


def noticeboard() -> Any:
    """Return a store that all ranks can write and read; torchrun keeps it when it restarts them."""
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=10))  # type: ignore[attr-defined]


def attempt() -> int:
    """Return how often torchrun has restarted the ranks (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def remember(run_dir: Path) -> None:
    """Note where this run is, for ranks that torchrun may start after these."""
    if together():
        noticeboard().set("minirl/run_dir", str(run_dir))


def recall() -> Path | None:
    """Return where the run of the ranks before these is; None if torchrun has not restarted them."""
    if not together() or attempt() == 0 or not noticeboard().check(["minirl/run_dir"]):
        return None
    return Path(noticeboard().get("minirl/run_dir").decode())


def wait_at_most(timeout: timedelta) -> None:
    """Set how long ranks wait for one from here on, `PATIENT` or `USUAL`: a longer wait ends the run."""
    if together():
        dist.distributed_c10d._set_pg_timeout(timeout)


def require_one_process(algorithm: str) -> None:
    """Raise a ConfigError if torchrun has started several processes."""
    if launched() and int(os.environ["WORLD_SIZE"]) > 1:
        raise ConfigError(
            f"{algorithm} must run on one process: start it with python, not with torchrun; PPO takes both"
        )


def require_shares(**totals: int) -> None:
    """Raise a ConfigError unless the ranks can have the same share of each of these settings."""
    for name, total in totals.items():
        if total % world_size() != 0:
            below, flag = total - total % world_size(), "--" + name.replace("_", "-")
            would = " or ".join(str(number) for number in (below, below + world_size()) if number > 0)
            raise ConfigError(f"{flag} must divide into the {world_size()} ranks of torchrun: {would}, not {total}")


def my_share(total: int) -> slice:
    """Return which of `total` things, in order, are this rank's."""
    share = total // world_size()
    return slice(rank() * share, (rank() + 1) * share)


@torch.library.custom_op("minirl::sum_over_ranks", mutates_args=())  # PyTorch's compiler leaves it as it is
def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, with the same bits on all of them."""
    total = values.clone()
    with answered():
        dist.all_reduce(total)
    return total


sum_over_ranks.register_fake(torch.empty_like)


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """A block in which this rank waits for others.

    Raises:
        RankError: if one does not answer.
    """
    began = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        late = "imed out" in str(error)
        why = f"has not answered for {time.monotonic() - began:.0f} seconds" if late else "has ended"
        raise RankError(f"another rank {why}; the last checkpoint is kept") from error


def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the mean of a tensor over all ranks, with the same bits on all of them."""
    return sum_over_ranks(values) / world_size() if together() else values


def average_gradients(optimizer: Optimizer) -> None:
    """Give each parameter of an optimiser the mean of its gradients over all ranks, that of the whole minibatch.

    They go in one flat buffer, in one all-reduce. A parameter that has a gradient on one rank must have one on all.
    """
    if not together():
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    means = mean_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, mean in zip(gradients, means.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def all_gather(values: Tensor) -> Tensor:
    """Return the tensors of all ranks one after the other: (B, ...) -> (ranks x B, ...), those of rank 0 first."""
    if not together():
        return values
    everything = values.new_zeros((world_size(), *values.shape))
    everything[rank()] = values
    gathered: Tensor = sum_over_ranks(everything).flatten(0, 1)
    return gathered


def max_over_ranks(number: int) -> int:
    """Return the maximum of a number over all ranks."""
    return int(all_gather(torch.tensor([number])).max())


def gather_to_rank_0(value: T) -> list[T]:
    """Return the values of all ranks on rank 0, and nothing on the others."""
    if not together():
        return [value]
    values: list[Any] = [None] * world_size()
    with answered():
        dist.gather_object(value, values if rank() == 0 else None)
    return values if rank() == 0 else []


def broadcast_from_rank_0(function: Callable[[], T]) -> T:
    """Let rank 0 call the function while the others wait; all return what it returned, or raise its error.

    From here on, they wait for as long as `PATIENT`.
    """
    if not together():
        return function()
    wait_at_most(PATIENT)
    message: list[Any] = [None]
    if rank() == 0:
        try:
            message = [(function(), None)]
        except Exception as raised:
            message = [(None, raised if is_plain(raised) else RuntimeError(f"{type(raised).__name__}: {raised}"))]
    with answered():
        dist.broadcast_object_list(message)
    result, error = message[0]
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def is_plain(error: Exception) -> bool:
    """Whether an error can be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True
