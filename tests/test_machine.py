"""Where the arithmetic runs: threads, memory, precision."""

import operator
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from minirl.fast.machine import (
    autocast,
    keep_freed_memory,
    one_thread,
    rounded_or_not,
    rounded_weights,
    tuned,
)

ROOT = Path(__file__).parent.parent
KEPT = """
import resource, sys
import numpy as np
from pathlib import Path
from minirl.fast.machine import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def resident_pages():
    return int(Path("/proc/self/statm").read_text().split()[1])
before = resident_pages()
np.ones(40_000_000, np.uint8)  # more than the C library ever keeps by itself
print((resident_pages() - before) * resource.getpagesize())
"""


def test_small_networks_keep_to_one_thread_and_give_the_others_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with tuned(nn.Linear(500, 300)):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with tuned(nn.Linear(500, 400)):  # 200,400 weights
            assert torch.get_num_threads() == 3
            with one_thread():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 3
        with tuned(nn.Linear(1, 1), 2):
            assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="a step goes wrong"), tuned(nn.Linear(1, 1)):
            raise ValueError("a step goes wrong")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
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


class ExactValue(nn.Module):
    """A linear layer that is computed in float32, as somebody may write it for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 2)

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            outputs: Tensor = self.inner(features.float())
            return outputs


@pytest.mark.parametrize("norm", ["spectral_norm", "weight_norm", "parametrizations.spectral_norm"])
def test_weights_that_are_computed_at_each_call_are_not_rounded_once(norm: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(operator.attrgetter(norm)(nn.utils)(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 8)).eval()
    inputs = torch.randn(3, 8)
    with torch.no_grad(), autocast(torch.bfloat16, inputs.device):
        network(inputs)
        for name, weight in network.named_parameters():
            if name.startswith("0."):
                weight.add_(1)
        with rounded_weights(network, torch.bfloat16):
            assert "rounded" in vars(network[2])
            during = network(inputs)
        assert torch.equal(during, network(inputs))


class Drawn(nn.Module):
    """A layer of PyTorch's whose weight is drawn anew at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        self.layer.weight.detach().normal_()
        outputs: Tensor = self.layer(inputs)
        return outputs


def test_a_weight_that_changes_while_it_is_rounded_is_warned_of() -> None:
    network, inputs = Drawn(), torch.ones(1, 4)
    with (
        pytest.warns(UserWarning, match="weight has changed while actions were chosen"),
        torch.no_grad(),
        rounded_weights(network, torch.bfloat16),
    ):
        network(inputs)


def test_weights_are_rounded_once_and_are_themselves_all_the_time() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), ExactValue())
    images = torch.randn(3, 1, 4, 4)
    weights, types = list(network.parameters()), [type(module) for module in network.modules()]
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad(), autocast(torch.bfloat16, images.device):
        expected = network(images)
        with rounded_weights(network, torch.bfloat16), pytest.MonkeyPatch.context() as patch:
            assert vars(network[3])["rounded"].dtype == torch.bfloat16
            assert torch.equal(network(images), expected), "bit for bit what autocast gives"
            used: list[torch.dtype] = []

            def spy(weight: Tensor, rounded: Tensor) -> Tensor:
                result = rounded_or_not(weight, rounded)
                used.append(result.dtype)
                return result

            patch.setattr("minirl.fast.machine.rounded_or_not", spy)
            network(images)
            assert used == [torch.bfloat16, torch.bfloat16, torch.float32]
        assert expected.dtype == torch.float32
    with torch.no_grad(), rounded_weights(network, torch.bfloat16):
        exact = network(images)
    assert torch.equal(exact, network(images)), "without autocast nothing is rounded"
    with rounded_weights(network, torch.bfloat16), autocast(torch.bfloat16, images.device):
        network(images).sum().backward()
    assert all(weight.grad is not None for weight in weights)
    with pytest.raises(ValueError, match="in the middle"), rounded_weights(network, torch.bfloat16):
        raise ValueError("in the middle")
    with rounded_weights(network, torch.float32):
        assert type(network[3]) is nn.Linear
    assert [type(module) for module in network.modules()] == types
    assert not any("rounded" in vars(module) for module in network.modules())
    for weight, parameter, old in zip(weights, network.parameters(), before, strict=True):
        assert weight is parameter
        assert torch.equal(weight, old)
