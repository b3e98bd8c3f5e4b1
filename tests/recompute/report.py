"""How far numbers are from what they should be, as a share of how far they may be."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tests.reference import SINGLE

CLOCK = {"charts/SPS", "charts/minutes"}
UNLIKELY = 6  # standard deviations

Series = dict[str, list[tuple[int, float, float]]]  # tag -> agent step, value, how far a logged value may be off


class Report:
    """The largest error of each quantity, as a share of its bound: above 1 is wrong."""

    def __init__(self) -> None:
        self.worst: dict[str, float] = {}

    def compare(self, what: str, found: Any, expected: Any, bound: Any) -> None:
        """Compare numbers, element by element; NaN equals NaN, and only equal numbers are within a bound of 0."""
        found, expected, bound = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected, bound))
        if found.shape != expected.shape:
            self.worst[what] = math.inf
            return
        same = (found == expected) | (found.isnan() & expected.isnan())
        share = ((found - expected).abs() / bound).masked_fill(same, 0.0).nan_to_num(math.inf, math.inf)
        self.worst[what] = max(self.worst.get(what, 0.0), float(share.max()) if share.numel() else 0.0)

    def same(self, what: str, found: Any, expected: Any) -> None:
        """Compare what must be equal to the last bit."""
        self.compare(what, found, expected, 0.0)

    def series(self, logged: dict[str, list[tuple[int, float]]], expected: Series) -> None:
        """Compare all tags."""
        for tag in (logged.keys() | expected.keys()) - CLOCK:
            found, wanted = sorted(logged.get(tag, [])), sorted(expected.get(tag, []))
            self.same(f"steps of {tag}", [step for step, _ in found], [step for step, *_ in wanted])
            values = [value for _, value in found], [value for _, value, _ in wanted]
            self.compare(tag, *values, [bound + 2 * SINGLE * abs(value) for _, value, bound in wanted])

    @property
    def wrong(self) -> dict[str, float]:
        """The quantities beyond their bounds."""
        return {what: share for what, share in self.worst.items() if not share <= 1}


def mean_of(numbers: Iterable[tuple[Tensor, float]]) -> tuple[float, float]:
    """The mean of some numbers, and how far float32 may be off: its sum is rounded at each of them."""
    values, bounds = zip(*((float(value), bound) for value, bound in numbers), strict=True)
    sizes = [abs(value) for value in values]
    return sum(values) / len(values), (sum(bounds) + len(values) * SINGLE * sum(sizes)) / len(values)
