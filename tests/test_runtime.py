"""The gradient step: what it returns beside the new weights."""

import copy
import math
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minirl.fast.runtime import (
    FEW,
    AdamStep,
    Compiled,
    SmallProducts,
    adam_,
    adam_rates,
    batch_guards,
    keep_freed_memory,
    threads_beside,
    threads_for,
)
from minirl.networks import NatureCNN, RoundedCopy, set_precision
from tests.devices import DEVICES

ROOT = Path(__file__).parent.parent
KEPT = """
import resource, sys
import numpy as np
from pathlib import Path
from minirl.fast.runtime import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def resident_pages():
    return int(Path("/proc/self/statm").read_text().split()[1])
before = resident_pages()
np.ones(40_000_000, np.uint8)  # more than the C library ever keeps by itself
print((resident_pages() - before) * resource.getpagesize())
"""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 100.0])
def test_the_norm_of_the_gradient_comes_with_what_the_loss_logs(
    compiled: bool, max_grad_norm: float | None, device: str
) -> None:
    network = nn.Linear(2, 1).to(device)  # loss 3 w_1 - 4 w_2 + 12 b: its gradient is (3, -4, 12) wherever those are

    def loss(weights: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.cat([network.weight[0], network.bias]) * weights).sum(), weights[:2]

    step = AdamStep(RoundedCopy(network), loss, max_grad_norm=max_grad_norm, compiled=compiled)
    logged = step(0.1, torch.tensor([3.0, -4.0, 12.0], device=device))
    assert logged.tolist() == pytest.approx([3.0, -4.0, 13.0])
    assert not logged.requires_grad
    assert step.step.enabled == compiled, "it fell back"
    first_moment = torch.cat([step.optimizer.state[p]["exp_avg"].flatten() for p in network.parameters()])
    clipped = 13.0 if max_grad_norm is None else min(13.0, max_grad_norm)
    assert first_moment.norm().item() == pytest.approx(0.1 * clipped, rel=1e-4)


def test_adams_steps_are_those_of_the_paper() -> None:
    """Algorithm 1 of Kingma and Ba (2015), number by number in Python's floats."""
    gradients = [[0.5, -2.0, 0.0], [1.0, 0.25, -3.0], [-4.0, 0.0, 1e-9]]
    weights, mean, square = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64), *torch.zeros(2, 3, dtype=torch.float64)
    expected, m, v = weights.tolist(), [0.0] * 3, [0.0] * 3
    for t, gradient in enumerate(gradients, start=1):
        learning_rate = 0.1 / t
        for i, g in enumerate(gradient):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g**2
            expected[i] -= learning_rate * (m[i] / (1 - 0.9**t)) / (math.sqrt(v[i] / (1 - 0.999**t)) + 1e-3)
        step_size, correction = adam_rates(learning_rate, t)
        adam_(weights, torch.tensor(gradient).double(), mean, square, step_size, correction, eps=1e-3)
        assert weights.tolist() == pytest.approx(expected, rel=1e-6)
        assert mean.tolist() == pytest.approx(m)
        assert square.tolist() == pytest.approx(v)


def test_moments_that_have_faded_away_are_zero() -> None:
    """Without a gradient m keeps 0.9 of itself and v 0.999, until it is below 1e-30."""
    weights, gradient, rate = torch.ones(4), torch.zeros(4), torch.tensor(0.1)
    mean = torch.tensor([1.2e-30, 1.1e-30, -1.2e-30, -1.1e-30])
    square = torch.tensor([2e-30, 1.0005e-30, 1.0005e-30, 2e-30])
    adam_(weights, gradient, mean, square, rate, torch.tensor(1.0), eps=1e-8)
    assert mean.tolist() == pytest.approx([1.08e-30, 0, -1.08e-30, 0], rel=1e-6, abs=0)
    assert square.tolist() == pytest.approx([1.998e-30, 0, 0, 1.998e-30], rel=1e-6, abs=0)
    assert weights.tolist() == [1, 1, 1, 1]  # to move a weight takes a billion billion times as much


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_rounded_copy_gives_the_gradient_and_follows_the_weights(compiled: bool, device: str) -> None:
    torch.manual_seed(0)
    network = NatureCNN((1, 36, 36)).to(device)
    set_precision(network, torch.bfloat16)
    rounded = RoundedCopy(network)

    def loss(images: Tensor) -> tuple[Tensor, Tensor]:
        value = rounded.network(images).square().mean()
        return value, value[None]

    step = AdamStep(rounded, loss, compiled=compiled)
    images = torch.randint(256, (2, 1, 36, 36), dtype=torch.uint8).to(device)
    twin = copy.deepcopy(network)  # its weights are rounded anew at each call, by autocast
    adam = torch.optim.Adam(twin.parameters(), lr=0.01)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    for _ in range(3):
        value: Tensor = twin(images).square().mean()
        adam.zero_grad()
        value.backward()
        adam.step()
        assert step(0.01, images)[0].item() == pytest.approx(value.item(), rel=1e-2)
    assert step.step.enabled == compiled, "it fell back"
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    for old, new in zip(before, network.parameters(), strict=True):
        assert (new - old).abs().mean() > 0.001
    for original, copied in zip(network.parameters(), rounded.network.parameters(), strict=True):
        assert copied.dtype == torch.bfloat16
        assert torch.equal(original.to(torch.bfloat16), copied)
    for mine, other in zip(network.parameters(), twin.parameters(), strict=True):
        # Adam's first steps go by the sign: where a gradient is rounded to another, so does the weight.
        assert (mine - other).abs().mean() < 1e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_a_plain_convolution_learns_as_by_torchs_own_adam(compiled: bool) -> None:
    """Images lie channels-last and its weights do not: their gradient may lie otherwise than they do."""
    torch.manual_seed(0)
    images, wanted = torch.rand(8, 3, 9, 9).contiguous(memory_format=torch.channels_last), torch.rand(8, 8)

    def network() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(8))

    def loss(network: nn.Module) -> Tensor:
        return (network(images) - wanted).square().mean()

    plain, ours = network(), network()
    for each in (plain, ours):
        loss(each)  # makes the lazy layer
    plain.load_state_dict(ours.state_dict())
    adam = torch.optim.Adam(plain.parameters(), lr=1e-3)
    step = AdamStep(RoundedCopy(ours), lambda batch: ((x := loss(ours)), x.detach()[None]), compiled=compiled)
    for i in range(30):
        if i == 15:  # moments that somebody saved in another layout
            saved = copy.deepcopy(step.state_dict())
            for state in saved["state"].values():
                for name in ("exp_avg", "exp_avg_sq"):
                    if state[name].ndim == 4:
                        state[name] = state[name].contiguous(memory_format=torch.channels_last)
            step.load(saved)
        adam.zero_grad()
        expected = loss(plain)
        expected.backward()
        adam.step()
        assert step(1e-3, torch.zeros(1))[0].item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_saved_of_adam_is_what_torch_saves(compiled: bool) -> None:
    network = nn.Linear(2, 1)
    step = AdamStep(RoundedCopy(network), lambda batch: ((x := network(batch).sum()), x[None]), compiled=compiled)
    for _ in range(3):
        step(0.5, torch.ones(4, 2))
    saved = step.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert [set(state) for state in saved["state"].values()] == [{"step", "exp_avg", "exp_avg_sq"}] * 2
    assert [state["step"].item() for state in saved["state"].values()] == [3.0, 3.0] == [step.steps] * 2
    # The gradient is 4 at each step: 4 (1 - 0.9^3), and 16 (1 - 0.999^3).
    assert saved["state"][1]["exp_avg"].item() == pytest.approx(4 * 0.271)
    assert saved["state"][1]["exp_avg_sq"].item() == pytest.approx(16 * 0.002997001)
    other = AdamStep(RoundedCopy(nn.Linear(2, 1)), lambda batch: (batch, batch), compiled=compiled)
    other.load(copy.deepcopy(saved))
    assert other.steps == 3
    assert other.moments[1][0].item() == pytest.approx(4 * 0.271)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_that_is_lost_shows_in_the_update_itself(compiled: bool) -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)

    def loss(scale: Tensor) -> tuple[Tensor, Tensor]:
        value = (scale * network.weight).sqrt().sum()  # 0, and its slope is infinite
        return value, value[None]

    logged = AdamStep(RoundedCopy(network), loss, max_grad_norm=0.5, compiled=compiled)(0.1, torch.ones(1))
    assert logged[0].item() == 0.0
    assert not logged[1].isfinite()


@pytest.mark.parametrize(("device", "in_cpp"), [("cpu", True), ("cuda", False)])
def test_a_gpu_is_compiled_for_without_the_headers_of_cuda(
    device: str, in_cpp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def spy(function: Any, *, options: dict[str, Any], **others: Any) -> Any:
        seen.update(options)
        return function

    monkeypatch.setattr(torch, "compile", spy)
    assert Compiled(abs, torch.device(device))(-1) == 1
    assert seen.get("cpp_wrapper", False) == in_cpp
    assert seen["guard_filter_fn"] is batch_guards


def test_compilation_does_not_warn_that_float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_as_for_a_gpu(function: Any, **choices: Any) -> Any:
        def first_call(*arguments: Any) -> Any:
            warnings.warn("TensorFloat32 tensor cores available but not enabled", stacklevel=1)
            warnings.warn("another", stacklevel=1)
            return function(*arguments)

        return first_call

    monkeypatch.setattr(torch, "compile", compile_as_for_a_gpu)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert Compiled(abs, torch.device("cuda"))(-1) == 1
    assert [str(warning.message) for warning in seen] == ["another"]


@pytest.mark.parametrize(("batch_size", "bias", "products"), [(64, True, True), (70, True, False), (64, False, False)])
def test_a_small_linear_layer_is_products_and_sums_and_gives_the_same(
    batch_size: int, bias: bool, products: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 24, bias=bias, dtype=torch.float64)
    assert 64 * 24 * 24 <= FEW < 70 * 24 * 24
    inputs = torch.randn(batch_size, 24, dtype=torch.float64, requires_grad=True)
    weights = [inputs, *layer.parameters()]
    expected = layer(inputs)
    with SmallProducts():
        outputs = layer(inputs)
    matrix_product = "Addmm" if bias else "Mm"
    assert type(expected.grad_fn).__name__.startswith(matrix_product)
    assert type(outputs.grad_fn).__name__.startswith("Add" if products else matrix_product)
    assert type(outputs.grad_fn).__name__.startswith(matrix_product) != products
    torch.testing.assert_close(outputs, expected)
    gradients = [torch.autograd.grad(outcome.square().sum(), weights) for outcome in (outputs, expected)]
    torch.testing.assert_close(*gradients)


def test_small_networks_keep_to_one_thread_and_give_the_others_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with threads_for(nn.Linear(100, 400)):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with threads_for(nn.Linear(200, 400)):  # 80,400 weights
            assert torch.get_num_threads() == 3
            with threads_beside(2):  # this process, and a worker that needs a core
                assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="a step goes wrong"), threads_for(nn.Linear(1, 1)):
            raise ValueError("a step goes wrong")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_kept_for_the_next_arrays() -> None:
    def bytes_kept(mode: str) -> int:
        command = [sys.executable, "-c", KEPT, mode]
        return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)

    assert bytes_kept("keep") > 39_000_000
    assert bytes_kept("plain") < 10_000_000, "there must be something to win"


@pytest.mark.parametrize("platform_name", ["darwin", "win32"])
def test_elsewhere_memory_is_left_alone(platform_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", platform_name)
    monkeypatch.setattr("ctypes.CDLL", None)  # calling it would fail
    keep_freed_memory()


def test_a_compiled_step_is_its_own_networks_and_takes_batches_of_other_shapes() -> None:
    torch.compiler.reset()  # it remembers which sizes changed in other tests, and prepares for it

    def make(target: float) -> tuple[nn.Linear, AdamStep]:
        network = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(network.weight)

        def loss(batch: Tensor) -> tuple[Tensor, Tensor]:
            value = ((network.weight - target) * batch).square().mean()
            return value, value[None]

        return network, AdamStep(RoundedCopy(network), loss, compiled=True)

    (first, first_step), (second, second_step) = make(2.0), make(-3.0)
    for size in (2, 5):
        first_step(0.1, torch.full((size,), 2.0))
        second_step(0.1, torch.ones(size, dtype=torch.float32 if size == 2 else torch.float64))
    assert first_step.step.enabled
    assert second_step.step.enabled
    assert first.weight.item() == pytest.approx(0.2, rel=0.02)  # Adam's steps are about the learning rate
    assert second.weight.item() == pytest.approx(-0.2, rel=0.02)
    # mean(1, 4, 16) = 7: all of the larger batch counts
    logged = first_step(0.0, torch.tensor([1.0, 2.0, 4.0]))
    assert logged[0].item() == pytest.approx(7 * (2.0 - first.weight.item()) ** 2)
