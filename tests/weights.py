"""What a network has learned, to compare."""

import torch
from torch import Tensor, nn


def parameters(network: nn.Module) -> Tensor:
    """Return all weights of a network, one after the other."""
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
