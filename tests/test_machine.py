"""Where the arithmetic runs: threads, memory, precision."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from minirl.fast.machine import (
    Float32Linear,
    autocast,
    keep_freed_memory,
    one_thread,
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


def test_weights_are_rounded_once_and_are_themselves_again_afterwards() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), Float32Linear(8, 2)
    )
    images = torch.randn(3, 1, 4, 4)
    before = [weight.detach().clone() for weight in network.parameters()]
    with torch.no_grad(), autocast(torch.bfloat16, images.device):
        expected = network(images)
        with rounded_weights(network, torch.bfloat16):
            assert network[0].weight.dtype == network[3].weight.dtype == torch.bfloat16
            assert network[5].weight.dtype == torch.float32
            assert torch.equal(network(images), expected), "bit for bit what autocast gives"
        assert expected.dtype == torch.float32, "the head is exact"
    for weight, old in zip(network.parameters(), before, strict=True):
        assert torch.equal(weight, old)
    with pytest.raises(ValueError, match="in the middle"), rounded_weights(network, torch.bfloat16):
        raise ValueError("in the middle")
    assert network[0].weight.dtype == torch.float32
    with rounded_weights(network, torch.float32):
        assert network[0].weight.dtype == torch.float32
