"""Generalized advantage estimation, by hand and against a definition that sums forward instead of recursing back."""

import itertools

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


def brute_force(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """The exponentially weighted mean of n-step advantages, each summed from its definition.

    A_t = (1 - lam) sum_{n=1}^{M-1} lam^(n-1) A_t^(n) + lam^(M-1) A_t^(M), where M steps remain up to and with the end
    of the episode or of the data, and A_t^(n) = r_t + ... + gamma^(n-1) r_{t+n-1} + gamma^n V(s_{t+n}) - V(s_t).
    """
    num_steps, num_envs = rewards.shape
    advantages = torch.zeros_like(rewards)
    for t, env in itertools.product(range(num_steps), range(num_envs)):
        estimates = []
        reward_sum = 0.0
        for n, step in enumerate(range(t, num_steps), start=1):
            reward_sum += gamma ** (n - 1) * float(rewards[step, env])
            future = 0.0 if terminated[step, env] else float(next_values[step, env])
            estimates.append(reward_sum + gamma**n * future - float(values[t, env]))
            if terminated[step, env] or truncated[step, env]:
                break
        weights = [(1 - lam) * lam**i for i in range(len(estimates) - 1)] + [lam ** (len(estimates) - 1)]
        advantages[t, env] = sum(w * a for w, a in zip(weights, estimates, strict=True))
    return advantages


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.9), (1.0, 1.0), (0.5, 0.0), (0.0, 0.7), (0.9, 0.95)])
def test_brute_force_with_ends_and_cuts_mixed(seed: int, gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, values, final_values = torch.randn(3, 20, 4, dtype=torch.float64, generator=generator)
    terminated, truncated = torch.rand(2, 20, 4, generator=generator) < 0.15
    over = terminated | truncated
    following = torch.cat([values[1:], final_values[:1]])
    next_values = torch.where(over, final_values, following)
    advantages, returns = compute_gae(rewards, values, next_values, terminated, truncated, gamma, lam)
    expected = brute_force(rewards, values, next_values, terminated, truncated, gamma, lam)
    torch.testing.assert_close(advantages, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(returns, expected + values, rtol=1e-10, atol=1e-10)


def test_a_value_that_is_not_finite_behind_a_real_end_does_no_harm() -> None:
    advantages, _ = compute_gae(column(1), column(2), column(float("nan")), ends(1), ends(0), 0.9, 0.9)
    assert advantages.item() == -1.0


@pytest.mark.parametrize("name", ["rewards", "values", "next_values", "terminated", "truncated"])
def test_shapes_must_match(name: str) -> None:
    tensors = {key: torch.zeros(3, 2) for key in ["rewards", "values", "next_values", "terminated", "truncated"]}
    tensors[name] = torch.zeros(3, 1)
    with pytest.raises(ValueError, match=rf"{name} \(3, 1\)"):
        compute_gae(**tensors, gamma=0.9, gae_lambda=0.9)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float16, torch.float32])
def test_rewards_of_any_dtype_give_the_advantages_of_the_values_dtype(dtype: torch.dtype) -> None:
    rewards, values = torch.ones(2, 1, dtype=dtype), torch.tensor([[0.3], [0.3]])
    next_values, no = torch.tensor([[0.3], [0.7]]), torch.zeros(2, 1, dtype=torch.bool)
    advantages, returns = compute_gae(rewards, values, next_values, no, no, 0.99, 0.95)
    # 1 + 0.99 * 0.7 - 0.3 = 1.393, and 1 + 0.99 * 0.3 - 0.3 + 0.99 * 0.95 * 1.393 = 2.3071
    assert advantages.dtype == returns.dtype == torch.float32
    assert advantages.flatten().tolist() == pytest.approx([0.997 + 0.99 * 0.95 * 1.393, 1.393], rel=1e-6)
    assert returns.flatten().tolist() == pytest.approx([1.297 + 0.99 * 0.95 * 1.393, 1.693], rel=1e-6)
    assert compute_gae(rewards, values.double(), next_values, no, no, 0.99, 0.95)[0].dtype == torch.float64
