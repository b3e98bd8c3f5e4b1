"""A layer by hand, and its gradient against differences of a second implementation in plain Python."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from minirl.networks import mlp


def by_hand(values: list[float]) -> list[float]:
    """x Phi(x) of each (x - mean) / sqrt(variance + 1e-5)."""
    mean = sum(values) / len(values)
    scale = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values) + 1e-5)
    return [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in ((value - mean) / scale for value in values)]


def layer_of(values: list[float]) -> nn.Sequential:
    """Return one layer whose linear part gives these numbers for the input (1.0,)."""
    layer = mlp((1, len(values)), nn.Tanh).double()
    layer[0].weight.data[:, 0] = torch.tensor(values, dtype=torch.float64)
    return layer


def test_a_layer_by_hand() -> None:
    """(-1, 0, 1) has variance 2/3 and becomes (-1.2247, 0, 1.2247); Phi(1.2247) is 0.88966."""
    values = layer_of([-1.0, 0.0, 1.0])(torch.ones(1, 1, dtype=torch.float64))
    assert values[0].tolist() == pytest.approx([-0.13514, 0.0, 1.08960], abs=1e-4)
    with torch.no_grad():  # where it acts
        acting = layer_of([-1.0, 0.0, 1.0]).float()(torch.ones(1, 1))
    assert acting[0].tolist() == pytest.approx([-0.13514, 0.0, 1.08960], abs=1e-4)


def test_values_and_gradients_of_others() -> None:
    numbers, weights, tiny = [0.3, -1.2, 2.0, 0.7], [1.0, -2.0, 0.5, 3.0], 1e-6
    layer = layer_of(numbers)
    values = layer(torch.ones(1, 1, dtype=torch.float64))[0]
    assert values.tolist() == pytest.approx(by_hand(numbers), abs=1e-9)
    (values * torch.tensor(weights, dtype=torch.float64)).sum().backward()
    for i, slope in enumerate(layer[0].weight.grad[:, 0].tolist()):
        sides = [[*numbers[:i], numbers[i] + step, *numbers[i + 1 :]] for step in (tiny, -tiny)]
        up, down = (float(np.dot(by_hand(side), weights)) for side in sides)
        assert slope == pytest.approx((up - down) / (2 * tiny), abs=1e-6)
