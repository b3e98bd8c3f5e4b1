"""A network's weights and gradients, for comparisons."""

import pytest
import torch
from torch import Tensor, nn


def parameters(network: nn.Module) -> Tensor:
    """Return all weights of a network, one after the other."""
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def assert_close_elsewhere_and_in_bfloat16(logged: list[Tensor], gradients: list[Tensor], *, rtol: float) -> None:
    """Compare a gradient step in float32 on the CPU with the same on a device, in float32 and in bfloat16."""
    assert logged[2].dtype == gradients[2].dtype == torch.float32
    torch.testing.assert_close(logged[1], logged[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logged[2], logged[0], rtol=rtol, atol=rtol / 10)
    assert not torch.equal(logged[0], logged[2])
    distances = [((gradient - gradients[0]).norm() / gradients[0].norm()).item() for gradient in gradients]
    assert distances == [0.0, pytest.approx(0.0, abs=1e-4), pytest.approx(0.0, abs=0.1)]
