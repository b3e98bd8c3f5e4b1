"""Generalized advantage estimation, by hand and against a definition that sums forward instead of recursing back."""

import pytest
import torch
from torch import Tensor

from minirl.ppo import compute_gae


def column(*numbers: float) -> Tensor:
    """(T,) numbers -> (T, 1) float64."""
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def ends(*flags: int) -> Tensor:
    return torch.tensor(flags, dtype=torch.bool)[:, None]


def test_by_hand_without_an_end() -> None:
    advantages, returns = compute_gae(
        column(1, 2), column(10, 20), column(20, 30), ends(0, 0), ends(0, 0), gamma=0.5, gae_lambda=0.5
    )
    # delta = (1 + 10 - 10, 2 + 15 - 20) = (1, -3); A_1 = -3; A_0 = 1 + 0.25 * -3
    assert advantages.flatten().tolist() == [0.25, -3.0]
    assert returns.flatten().tolist() == [10.25, 17.0]


@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"),
    [
        # delta_0 = 1 + 0.5 * 8 - 10 = -5 where the future counts, 1 - 10 = -9 where it does not; delta_1 = -3
        (ends(0, 0), ends(0, 0), [-5.75, -3.0]),
        (ends(1, 0), ends(0, 0), [-9.0, -3.0]),
        (ends(0, 0), ends(1, 0), [-5.0, -3.0]),
        (ends(1, 0), ends(1, 0), [-9.0, -3.0]),  # both at once: a real end
        (ends(0, 1), ends(0, 0), [-5 - 0.25 * 18, -18.0]),
        (ends(0, 0), ends(0, 1), [-5.75, -3.0]),
    ],
)
def test_an_end_has_no_future_and_a_cut_has_its_own(
    terminated: Tensor, truncated: Tensor, expected: list[float]
) -> None:
    advantages, _ = compute_gae(column(1, 2), column(10, 20), column(8, 30), terminated, truncated, 0.5, 0.5)
    assert advantages.flatten().tolist() == expected


def test_lambda_0_is_the_td_error_and_lambda_1_the_discounted_return() -> None:
    rewards, values, next_values = column(1, 2, 3), column(4, 5, 6), column(5, 6, 7)
    none = ends(0, 0, 0)
    td_errors, _ = compute_gae(rewards, values, next_values, none, none, 0.9, 0.0)
    torch.testing.assert_close(td_errors, rewards + 0.9 * next_values - values)
    _, returns = compute_gae(rewards, values, next_values, none, none, 0.9, 1.0)
    monte_carlo = [1 + 0.9 * 2 + 0.81 * 3 + 0.729 * 7, 2 + 0.9 * 3 + 0.81 * 7, 3 + 0.9 * 7]
    torch.testing.assert_close(returns.flatten(), torch.tensor(monte_carlo, dtype=torch.float64))


def test_a_value_that_is_not_finite_behind_a_real_end_does_no_harm() -> None:
    advantages, _ = compute_gae(column(1), column(2), column(float("nan")), ends(1), ends(0), 0.9, 0.9)
    assert advantages.item() == -1.0


@pytest.mark.parametrize("name", ["rewards", "values", "next_values", "terminated", "truncated"])
def test_shapes_must_match(name: str) -> None:
    tensors = {key: torch.zeros(3, 2) for key in ["rewards", "values", "next_values", "terminated", "truncated"]}
    tensors[name] = torch.zeros(3, 1)
    with pytest.raises(ValueError, match=rf"{name} \(3, 1\)"):
        compute_gae(**tensors, gamma=0.9, gae_lambda=0.9)
