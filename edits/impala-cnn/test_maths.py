"""The residual CNN against one in NumPy; its residual block and the gradient by hand."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from minirl.networks import ImpalaCNN, Residual
from minirl.ppo import ActorCritic

Maps = NDArray[np.float64]  # (C, H, W)


def windows(maps: Maps, fill: float) -> Maps:
    """Return what lies around each pixel, (C, H, W, 3, 3)."""
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)), constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))


def convolved(maps: Maps, layer: Any) -> Maps:
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    result: Maps = np.einsum("chwij,ocij->ohw", windows(maps, 0.0), weight) + bias[:, None, None]
    return result


def by_numpy(network: Any, picture: Maps) -> Maps:
    """Return the features (256,) of a picture."""
    maps = picture
    for block in range(3):
        convolution, _, *residuals = network.maps[4 * block : 4 * block + 4]
        maps = windows(convolved(maps, convolution), -np.inf).max(axis=(-1, -2))[:, ::2, ::2]
        for residual in residuals:
            inner = convolved(np.maximum(maps, 0), residual.first)
            maps = maps + convolved(np.maximum(inner, 0), residual.second)
    dense = network.dense[0]
    features: Maps = dense.weight.detach().numpy() @ np.maximum(maps, 0).ravel() + dense.bias.detach().numpy()
    return np.maximum(features, 0)


def test_the_network_is_the_one_of_the_paper() -> None:
    torch.manual_seed(0)
    network = ImpalaCNN((2, 37, 36)).double()
    pictures = torch.randint(256, (2, 2, 37, 36), dtype=torch.uint8)
    expected = [by_numpy(network, picture.numpy() / 255) for picture in pictures]
    features = network(pictures.double() / 255)
    np.testing.assert_allclose(features.detach(), expected, rtol=1e-9, atol=1e-12)
    assert features.count_nonzero() > 100
    network = network.float()
    torch.testing.assert_close(network(pictures), network(pictures / 255))  # bytes are divided here


def test_its_size_on_atari() -> None:
    sizes = [weight.numel() for weight in ImpalaCNN((4, 84, 84)).parameters()]
    convolutions = [(4, 16), *[(16, 16)] * 4, (16, 32), *[(32, 32)] * 9]
    assert len(sizes) == 2 * 15 + 2  # 15 convolutions, a dense layer
    # 84, 42, 21, 11 pixels
    assert sum(sizes) == sum(9 * a * b + b for a, b in convolutions) + 32 * 11 * 11 * 256 + 256 == 1_089_232


def test_a_residual_block_and_its_gradient_by_hand() -> None:
    block = Residual(1)
    for layer, centre in ((block.first, 3.0), (block.second, 5.0)):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        layer.weight.data[0, 0, 1, 1] = centre
    pixels = torch.tensor([[[[2.0, -1.0]]]], requires_grad=True)
    result = block(pixels)
    assert result.flatten().tolist() == [2 + 5 * 3 * 2, -1]  # nothing is added where it is below 0
    result.sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.flatten().tolist() == [1 + 15, 1]


def test_the_gradient_reaches_every_weight_of_the_agent() -> None:
    torch.manual_seed(0)
    space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    agent = ActorCritic(space, gym.spaces.Discrete(3))
    assert isinstance(agent.actor_body, ImpalaCNN)
    distribution, values = agent(torch.randint(256, (4, 4, 84, 84), dtype=torch.uint8))
    (distribution.log_prob(torch.tensor([0, 1, 2, 0])).sum() + values.sum()).backward()
    for name, weight in agent.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.count_nonzero() > 0, name
