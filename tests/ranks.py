"""`train_ppo.py` with something done to it, for `tests/test_distributed.py`: `ranks.py DEED OUT FLAGS`.

It may be started by torchrun or alone. DEED is one of

- `plain`: nothing.
- `same`: with any number of ranks, it draws the random numbers of two ranks with 4 environments each.
- `die`, `raise`, `hang`, `stop`: rank 1 does so (for `stop`, it gets SIGTERM) in its 4th rollout, unless torchrun has
  restarted it. If torchrun has restarted it, before the first one.

What each process has learned goes to OUT, with its rank appended. It prints a line if threads of the group outlive the
training.
"""

import atexit
import itertools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minirl import ppo
from minirl.distributed import attempt, my_share, rank, world_size
from minirl.envs.make import make_envs_of
from minirl.scripts.train import run_training

NUM_ENVS, MINIBATCH, RANKS = 8, 64, 2


@atexit.register
def say_what_outlives() -> None:
    """Python kills such threads when it exits, wherever they are, and sometimes that aborts it (SIGABRT)."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    if outlive := [name for name in names if "gloo" in name]:
        print(f"outlive the training: {outlive}", file=sys.stderr, flush=True)


def seeded(number: int) -> torch.Generator:
    """A generator of random numbers."""
    return torch.Generator().manual_seed(number)


def draw_as_two_ranks() -> None:
    """Let one process draw what two would, and learn from the same minibatches."""
    draws, epochs = itertools.count(), itertools.count()

    def rand_like(values: Tensor) -> Tensor:
        rows = len(values) * world_size()
        return torch.rand((rows, *values.shape[1:]), generator=seeded(next(draws)))[my_share(rows)]

    def randperm(size: int, device: Any) -> Tensor:
        """A permutation of all ranks' samples (T, N): half of each minibatch is rank 0's, half rank 1's."""
        epoch = next(epochs)
        orders = [
            draw_order(size * world_size() // RANKS, generator=seeded(RANKS * epoch + number))
            for number in range(RANKS)
        ]
        if world_size() == RANKS:
            return orders[rank()]
        envs = NUM_ENVS // RANKS
        for number, order in enumerate(orders):
            orders[number] = order // envs * NUM_ENVS + number * envs + order % envs
        return torch.cat(
            [torch.cat(parts) for parts in zip(*(o.split(MINIBATCH // RANKS) for o in orders), strict=True)]
        )

    def not_in_halves(config: Any, mine: slice, in_halves: bool) -> Any:
        return make_envs_of(config, mine)

    draw_order = torch.randperm
    patched: Any = torch
    patched.rand_like, patched.randperm = rand_like, randperm
    vars(ppo)["make_envs_of"] = not_in_halves


def misbehave(deed: str) -> None:
    """Let rank 1 do it in its 4th rollout."""
    collect_rollout, rollouts = ppo.collect_rollout, itertools.count(1)

    def collect(*arguments: Any) -> Any:
        if next(rollouts) == 4 and rank() == 1 and attempt() == 0:
            print(f"rank 1 will {deed} at {time.time()}", file=sys.stderr, flush=True)
            if deed == "raise":
                raise LookupError("of rank 1")
            if deed == "hang":
                time.sleep(1000)
            os.kill(os.getpid(), signal.SIGTERM if deed == "stop" else signal.SIGKILL)
        return collect_rollout(*arguments)

    vars(ppo)["collect_rollout"] = collect


def main(deed: str, out: Path, flags: list[str]) -> None:
    """Train."""
    number = os.environ.get("RANK", "0")
    if deed == "same":
        draw_as_two_ranks()
    elif deed != "plain":
        misbehave(deed)
    _, agent = run_training("ppo", ppo.PPOConfig, ppo.train, "", flags)
    gradients = [weight.grad for weight in agent.parameters()]
    threads = torch.get_num_threads()
    torch.save({"weights": agent.state_dict(), "gradients": gradients, "threads": threads}, f"{out}.{number}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
