"""What PPO remembers of a rollout: a column for each quantity, T steps of N environments."""

import math
from collections import Counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minirl.normalize import NormalizeReward

Columns = dict[str, Tensor]  # a quantity's name -> its values, sample by sample


class Rollout:
    """T steps of N environments: one column (T, N, ...) per quantity, allocated when it is first put.

    A column keeps the dtype and layout of its first values: pixels stay uint8, channels-last. Tensors stay on the
    device; NumPy arrays, from the environments, are copied there once, when read.

    Raises:
        ValueError: if a quantity changes its shape or dtype, or is missing at some of the steps.
    """

    def __init__(self, num_steps: int, num_envs: int, device: torch.device) -> None:
        self.shape = (num_steps, num_envs)
        self.device = device
        self.columns: dict[str, Any] = {}
        self.kinds: dict[str, tuple[int, tuple[int, ...], Any]] = {}  # dimensions, shape without the rows, dtype
        self.filled: Counter[str] = Counter()  # how many of the T N entries were put since the last read

    def put(self, t: int, rows: slice, **quantities: Tensor | NDArray[Any]) -> None:
        """Store the results of step t in some of the environments: tensors and arrays (rows, ...) by name."""
        for name, values in quantities.items():
            if isinstance(values, np.ndarray) and values.dtype == np.float64:
                values = values.astype(np.float32)  # as networks see observations
            kind = values.ndim, values.shape[1:], values.dtype
            if name not in self.columns:
                self.columns[name], self.kinds[name] = self._column(values), kind
            if kind != self.kinds[name]:
                wanted = f"rows of shape {tuple(self.kinds[name][1])} and {self.kinds[name][2]}, as at first"
                raise ValueError(f"{name} must be {wanted}, not {tuple(values.shape)} and {values.dtype}")
            self.columns[name][t, rows] = values
            self.filled[name] += len(values)

    def _column(self, values: Tensor | NDArray[Any]) -> Any:
        if isinstance(values, np.ndarray):
            return np.empty((*self.shape, *values.shape[1:]), values.dtype)
        layout = torch.channels_last if values.ndim == 4 else torch.contiguous_format
        flat = (math.prod(self.shape), *values.shape[1:])
        column = torch.empty(flat, dtype=values.dtype, device=self.device, memory_format=layout)
        return column.unflatten(0, self.shape)

    def __getitem__(self, name: str) -> Tensor:
        """Return a column (T, N, ...), on the device."""
        return torch.as_tensor(self.columns[name], device=self.device)

    def add(self, **computed: Tensor) -> None:
        """Add columns (T, N, ...) that are computed from the others."""
        for name, column in computed.items():
            if name in self.kinds:
                raise ValueError(f"{name} is computed from the rollout: what is put needs another name")
            self.columns[name] = column

    def normalize_rewards(self, scaled: NormalizeReward) -> None:
        """Replace the environments' rewards by normalised ones."""
        ended = self.columns["terminated"] | self.columns["truncated"]
        self.columns["rewards"] = scaled(self.columns["rewards"], ended)

    def samples(self, **more: Tensor) -> Columns:
        """Return all columns, and `more` (T, N), sample by sample: (T N, ...). The next rollout overwrites them."""
        whole = math.prod(self.shape)
        for name, number in self.filled.items():
            if number < whole:
                raise ValueError(f"{name} must be put at every step: {number} of {whole} places are new")
        self.filled.clear()
        self.add(**more)
        return {name: self[name].flatten(0, 1) for name in self.columns}
