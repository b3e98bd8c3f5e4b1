"""PPO's losses: every branch worked out by hand, values and gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from minirl.ppo import clipped_surrogate_loss, ppo_loss, value_loss


def numbers(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        # clip_coef 0.2. The gradient is with respect to log pi: -A r where the unclipped term is the minimum, else 0.
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),  # inside the range
        (1.5, 2.0, -2.4, 0.0),  # A > 0, already likelier: clipped at 1.2
        (0.5, 2.0, -1.0, -1.0),  # A > 0, less likely: not clipped, or it could not recover
        (0.9, -2.0, 1.8, 1.8),  # inside the range
        (0.5, -2.0, 1.6, 0.0),  # A < 0, already less likely: clipped at 0.8
        (1.5, -2.0, 3.0, 3.0),  # A < 0, likelier: not clipped
    ],
)
def test_clipped_surrogate_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    log_prob = numbers(math.log(ratio) - 1.0, grad=True)
    result = clipped_surrogate_loss(log_prob, numbers(-1.0), numbers(advantage), 0.2)
    result.backward()
    assert log_prob.grad is not None
    assert result.item() == pytest.approx(loss)
    assert log_prob.grad.item() == pytest.approx(gradient)


def test_clipped_surrogate_is_the_mean_over_the_batch() -> None:
    log_prob = numbers(math.log(1.5), math.log(0.5), 0.0)
    assert clipped_surrogate_loss(log_prob, numbers(0, 0, 0), numbers(2, 2, 6), 0.2).item() == pytest.approx(
        -(2.4 + 1.0 + 6.0) / 3
    )


def test_value_loss_is_the_mean_square_without_a_half() -> None:
    values = numbers(1.0, 4.0, grad=True)
    loss = value_loss(values, numbers(3.0, 1.0))
    loss.backward()
    assert loss.item() == pytest.approx((4 + 9) / 2)
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([-2.0, 3.0])  # 2 (V - R) / B


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient"),
    [
        # Old value 0, clip 0.5: V_clip = clip(V, -0.5, 0.5); the larger of (V - R)^2 and (V_clip - R)^2.
        (0.2, 1.0, 0.64, -1.6),  # inside: both are the same
        (0.9, 1.0, 0.25, 0.0),  # moved 0.9 towards R: the clipped loss is larger, no gradient
        (0.9, -1.0, 3.61, 3.8),  # moved away from R: the unclipped loss is larger
        (-0.9, -1.0, 0.25, 0.0),
        (-0.9, 1.0, 3.61, -3.8),
    ],
)
def test_clipped_value_loss_by_hand(value: float, target: float, loss: float, gradient: float) -> None:
    values = numbers(value, grad=True)
    result = value_loss(values, numbers(target), numbers(0.0), 0.5)
    result.backward()
    assert values.grad is not None
    assert result.item() == pytest.approx(loss)
    assert values.grad.item() == pytest.approx(gradient)


def test_clipped_value_loss_clips_around_the_old_values_element_by_element() -> None:
    values, old_values, returns = numbers(5.0, 3.0), numbers(3.0, 3.0), numbers(6.0, 2.0)
    # V_clip = (4, 3): squares (1, 1) against (4, 1)
    assert value_loss(values, returns, old_values, 1.0).item() == pytest.approx((4 + 1) / 2)


def test_value_clipping_needs_something_to_clip_around() -> None:
    with pytest.raises(ValueError, match="old_values"):
        value_loss(numbers(1.0), numbers(1.0), clip_coef=0.1)
    assert value_loss(numbers(1.0), numbers(3.0), old_values=numbers(9.0)).item() == 4.0, "no clip_coef, no clipping"
    with pytest.raises(ValueError, match="old_values"):
        value_loss(numbers(1.0), numbers(3.0), old_values=numbers(9.0)[:, None])


BATCH: dict[str, Any] = {
    "log_prob": numbers(math.log(1.5) - 1, math.log(0.9) - 2),
    "old_log_prob": numbers(-1.0, -2.0),
    "advantages": numbers(2.0, -4.0),
    "values": numbers(1.0, 4.0),
    "returns": numbers(3.0, 1.0),
    "entropy": numbers(0.5, 1.5),
}


def test_ppo_loss_adds_its_terms_with_their_signs() -> None:
    loss, stats = ppo_loss(**BATCH, clip_coef=0.2, vf_coef=0.5, ent_coef=0.1)
    policy = -(1.2 * 2 + 0.9 * -4) / 2  # 0.6
    assert loss.item() == pytest.approx(policy + 0.5 * 6.5 - 0.1 * 1.0)
    assert stats["policy_loss"].item() == pytest.approx(policy)
    assert stats["value_loss"].item() == pytest.approx(6.5)
    assert stats["entropy"].item() == pytest.approx(1.0)
    assert stats["clipfrac"].item() == 0.5
    expected_kl = ((1.5 - 1 - math.log(1.5)) + (0.9 - 1 - math.log(0.9))) / 2
    assert stats["approx_kl"].item() == pytest.approx(expected_kl)
    assert {"policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"} <= stats.keys()
    _, stats = ppo_loss(**BATCH, clip_coef=0.05, vf_coef=0.5, ent_coef=0.1)
    assert stats["clipfrac"].item() == 1.0, "above the range, and below it"


def test_ppo_loss_passes_the_value_clipping_on() -> None:
    loss, stats = ppo_loss(
        **BATCH, clip_coef=0.2, vf_coef=0.5, ent_coef=0.0, old_values=numbers(0.0, 3.5), value_clip_coef=0.25
    )
    # V_clip = (0.25, 3.75): squares (7.5625, 7.5625) against (4, 9)
    assert stats["value_loss"].item() == pytest.approx((7.5625 + 9) / 2)
    assert loss.item() == pytest.approx(0.6 + 0.5 * (7.5625 + 9) / 2)


def test_ppo_loss_gradients_by_hand_and_none_through_what_is_fixed() -> None:
    batch = {name: tensor.clone().requires_grad_() for name, tensor in BATCH.items()}
    fixed = {name: batch[name].detach() for name in ("old_log_prob", "advantages", "returns")}
    loss, stats = ppo_loss(**{**batch, **fixed}, clip_coef=0.2, vf_coef=0.5, ent_coef=0.1)
    loss.backward()
    expected = {
        "log_prob": [0.0, 0.9 * 4 / 2],  # the first is clipped
        "values": [0.5 * -2.0, 0.5 * 3.0],
        "entropy": [-0.05, -0.05],
    }
    for name, gradient in expected.items():
        grad = batch[name].grad
        assert grad is not None
        assert grad.tolist() == pytest.approx(gradient), name
    assert not any(tensor.requires_grad for tensor in stats.values())


@pytest.mark.parametrize("name", list(BATCH))
def test_ppo_loss_refuses_a_shape_that_would_broadcast(name: str) -> None:
    batch = {**BATCH, name: BATCH[name][:, None]}
    with pytest.raises(ValueError, match=name):
        ppo_loss(**batch, clip_coef=0.2, vf_coef=0.5, ent_coef=0.1)


def test_the_losses_alone_refuse_it_too() -> None:
    flat, tall = torch.zeros(3), torch.zeros(3, 1)
    with pytest.raises(ValueError, match="old_log_prob"):
        clipped_surrogate_loss(flat, tall, flat, 0.2)
    with pytest.raises(ValueError, match="returns"):
        value_loss(flat, tall)
    with pytest.raises(ValueError, match="old_values"):
        value_loss(flat, flat, tall, 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("advantage", "loss"), [(1.0, -1.05), (0.0, -0.5)])
def test_a_ratio_that_overflows_is_clipped_with_a_gradient_of_0(
    advantage: float, loss: float, dtype: torch.dtype
) -> None:
    """r = e^90 is clipped to 1.1, and e^800 too; the other sample's is 1: -(1.1 A + 1) / 2."""
    log_prob = torch.tensor([0.0, -1.0], dtype=dtype, requires_grad=True)
    old = torch.tensor([-90.0 if dtype == torch.float32 else -800.0, -1.0], dtype=dtype)
    outcome = clipped_surrogate_loss(log_prob, old, torch.tensor([advantage, 1.0], dtype=dtype), 0.1)
    outcome.backward()
    assert log_prob.grad is not None
    assert outcome.item() == pytest.approx(loss)
    assert log_prob.grad.tolist() == [0.0, -0.5]


def test_small_divergences_are_not_lost_and_never_negative() -> None:
    zero = torch.zeros(1)

    def approx_kl(log_ratio: float) -> float:
        log_prob = torch.tensor([log_ratio])
        _, stats = ppo_loss(log_prob, zero, zero, zero, zero, zero, clip_coef=0.2, vf_coef=0.5, ent_coef=0.0)
        return stats["approx_kl"].item()

    assert approx_kl(1e-6) == pytest.approx(5e-13, rel=0.15, abs=0)  # x^2 / 2; float32 has 7 digits of e^x - 1
    assert approx_kl(0.5) == pytest.approx(math.exp(0.5) - 1.5)
    assert min(approx_kl(10.0**-power * sign) for power in range(10) for sign in (-1, 1)) >= 0
