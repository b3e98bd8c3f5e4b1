"""The statistics of gradient steps, kept until their means are logged."""

from typing import Any

import torch
from torch import Tensor

from minirl.distributed import mean_over_ranks
from minirl.runs.checkpoints import require_finite_losses


def columns(steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the numbers of n steps by name, (n,) each; empty if there was no step.

    Raises:
        TypeError: naming it, if one is not a tensor of one number, is missing at a step, or the same tensor at two.
    """
    names = steps[0].keys() if steps else {}
    for numbers in steps:
        for name in numbers.keys() ^ names:
            raise TypeError(f"losses/{name} must be returned by each gradient step, not by some")
    return {name: _column(name, [numbers[name] for numbers in steps]) for name in names}


def _column(name: str, numbers: list[Any]) -> Tensor:
    for number in numbers:
        if not isinstance(number, Tensor) or number.ndim > 0:
            what = f"of shape {tuple(number.shape)}" if isinstance(number, Tensor) else f"a {type(number).__name__}"
            raise TypeError(f"losses/{name} must be a tensor of one number for each gradient step, not {what}")
    if len({number.data_ptr() for number in numbers}) < len(numbers):  # a weight, say: all would be the last value
        raise TypeError(f"losses/{name} must be a new tensor at each gradient step: `clone()` it")
    column = torch.stack(numbers)
    return column if column.is_floating_point() else column.float()  # a count has a mean, too


def mean_losses(steps: list[dict[str, Tensor]]) -> dict[str, float]:
    """Return the mean of each number over some gradient steps and all ranks, by TensorBoard tag."""
    means = mean_over_ranks(torch.stack([column.mean() for column in columns(steps).values()])).tolist()
    return {f"losses/{name}": mean for name, mean in zip(steps[0], means, strict=True)}


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 is perfect, 0 no better than a constant, NaN if all returns are equal.

    Returns that differ only by rounding count as equal: they are sums of advantages and values.
    """
    rounding = 8 * torch.finfo(returns.dtype).eps * returns.abs().max().double()
    variance = returns.double().var()
    share = 1 - (returns.double() - values.double()).var() / variance
    return float(share.where(variance > rounding.square(), torch.nan))


class RecentLosses:
    """The statistics of gradient steps since the last call of `means`. Checkpoints include them, so a kill loses none.

    They stay on their device until then: reading one after each step would make a GPU wait.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps = 0  # gradient steps so far
        self.recent: list[dict[str, Tensor]] = []

    def append(self, numbers: dict[str, Tensor]) -> None:
        """Add what a gradient step returned: numbers () by name."""
        self.recent.append(numbers)
        self.steps += 1

    def means(self) -> dict[str, float]:
        """Return the mean of each number by TensorBoard tag, and start over; an empty dictionary if there was no step.

        Raises:
            DivergedError: naming the first of these steps whose numbers are not finite.
        """
        numbers, first = columns(self.recent), self.steps - len(self.recent) + 1
        self.recent.clear()
        if not numbers:
            return {}
        tags, rows = [f"losses/{name}" for name in numbers], torch.stack([*numbers.values()], dim=1)
        if not rows.isfinite().all():
            bad = int(rows.isfinite().all(dim=1).long().argmin())
            require_finite_losses(dict(zip(tags, rows[bad].tolist(), strict=True)), "update", first + bad)
        return dict(zip(tags, rows.mean(dim=0).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps, and the numbers of the recent ones."""
        return {"steps": self.steps, "recent": columns(self.recent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        saved = {name: column.to(self.device) for name, column in state_dict["recent"].items()}
        rows = zip(*saved.values(), strict=True)
        self.steps, self.recent = state_dict["steps"], [dict(zip(saved, row, strict=True)) for row in rows]
