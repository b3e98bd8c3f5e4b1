"""The two network bodies that DQN and PPO share, and how they are initialised."""

import copy
import itertools
import math
from typing import Any, Generic, TypeVar

import cv2
import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from minirl.checks import ConfigError

Network = TypeVar("Network", bound=nn.Module)

SMALLEST_IMAGE = 36  # below this, nothing is left after the third convolution


def orthogonal(layer: nn.Linear | nn.Conv2d, gain: float = math.sqrt(2)) -> nn.Linear | nn.Conv2d:
    """Give a layer orthogonal weights times `gain`, and zero biases. Returns the layer.

    sqrt(2) keeps the scale of activations through a ReLU (Saxe et al. 2013).
    """
    nn.init.orthogonal_(layer.weight, gain)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def mlp(sizes: tuple[int, ...], activation: type[nn.Module]) -> nn.Sequential:
    """Return fully connected layers `sizes[0] -> sizes[1] -> ...`, an activation after each."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [orthogonal(nn.Linear(inputs, outputs)), activation()]
    return nn.Sequential(*layers)


def in_blocks(images: Tensor, size: int) -> Tensor:
    """Cut images (B, C, H, W) into blocks of size x size pixels: (B, size * size * C, H // size, W // size).

    What is left over at the right and below is dropped. The result lies channels-last in memory: a block's values side
    by side, row by row, a pixel's C values next to each other.
    """
    count, channels, height, width = images.shape
    rows, columns = height // size, width // size
    pixels = images.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    pixels = pixels[:, : rows * size, : columns * size].reshape(count, rows, size, columns, size, channels)
    return pixels.transpose(2, 3).reshape(count, rows, columns, size * size * channels).permute(0, 3, 1, 2)


class BlockConv2d(nn.Conv2d):
    """A convolution whose kernel is two strides wide, and which also takes images cut into blocks (`in_blocks`).

    Over blocks of stride x stride pixels it is a convolution of 2 x 2 with stride 1: the same products, added up in
    another order. oneDNN's gradients of that take less time: a tenth of a minibatch of Pong, a fifth on a busy machine.

    Raises:
        ValueError: if the kernel is not two strides wide.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        if kernel_size != 2 * stride:
            raise ValueError(f"kernel_size must be twice the stride of {stride}, not {kernel_size}")
        super().__init__(in_channels, out_channels, kernel_size, stride)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W), or `in_blocks` of it -> (B, out_channels, H // stride - 1, W // stride - 1)."""
        size = self.stride[0]
        if images.shape[1] == self.in_channels:
            if not torch.is_grad_enabled():  # forward, both are as fast, and the blocks come on top
                return super().forward(images)
            images = in_blocks(images, size)
        return F.conv2d(images, in_blocks(self.weight, size), self.bias)


class NatureCNN(nn.Module):
    """The convolutional network of Mnih et al. (2015): images (B, C, H, W) -> features (B, 512).

    Bytes are divided by 255 here, on the device; float observations are taken to be in [0, 1] already. Images and
    weights lie channels-last in memory, which convolves a quarter faster and changes no shape. With `precision`
    bfloat16, products are computed in it; the weights, their gradients and the features are float32 all the same.
    """

    num_features = 512
    block_size = 4  # the first convolution's stride

    def __init__(self, image_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.precision = torch.float32
        channels = image_shape[0]
        self.convolutions = nn.Sequential(
            orthogonal(BlockConv2d(channels, 32, kernel_size=8, stride=self.block_size)),
            nn.ReLU(),
            orthogonal(BlockConv2d(32, 64, kernel_size=4, stride=2)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, kernel_size=3, stride=1)),
            nn.ReLU(),
        )
        with torch.no_grad():
            flat_size = self.convolutions(torch.zeros(1, *image_shape)).numel()
        self.convolutions.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dense = nn.Sequential(orthogonal(nn.Linear(flat_size, self.num_features)), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8, or float in [0, 1], or `in_blocks` of it by `block_size` -> (B, 512)."""
        images = images.contiguous(memory_format=torch.channels_last)
        pixels = images.to(self.precision) / 255 if images.dtype == torch.uint8 else images
        if self.precision == torch.float32:
            return self._features(pixels)
        if self.dense[0].weight.dtype == self.precision:  # a `RoundedCopy`: nothing is left to be rounded
            return self._features(pixels.to(self.precision)).float()
        with torch.autocast(images.device.type, self.precision):
            return self._features(pixels).float()

    def _features(self, pixels: Tensor) -> Tensor:
        maps: Tensor = self.convolutions(pixels)
        features: Tensor = self.dense(maps.permute(0, 2, 3, 1).flatten(1))  # as they lie in memory: no copy
        return features


def set_precision(network: nn.Module, precision: torch.dtype) -> None:
    """Have the convolutions of a network computed in float32 or bfloat16; an MLP stays as it is."""
    for module in network.modules():
        if isinstance(module, NatureCNN):
            module.precision = precision


class RoundedCopy(Generic[Network]):
    """A network to compute with, its CNN's weights rounded once to the precision of its products, not at every call.

    What it returns is the same, bit for bit, and so is its gradient, with which the original is trained: the mixed
    precision of Micikevicius et al. (2018, https://arxiv.org/abs/1710.03740). Where there is nothing to round, it is
    the network itself.

    Attributes:
        network: what to call; `refresh` it after each change of the original.
        original: what is trained and saved.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.original = network
        if any(module.precision != torch.float32 for module in network.modules() if isinstance(module, NatureCNN)):
            self.network = copy.deepcopy(network)
            for module in self.network.modules():
                if isinstance(module, NatureCNN):
                    module.to(module.precision)

    def refresh(self) -> None:
        """Take over the original's weights."""
        if self.network is self.original:
            return
        with torch.no_grad():
            for mine, original in zip(self.network.parameters(), self.original.parameters(), strict=True):
                mine.copy_(original)


def is_image(space: gym.Space[object]) -> bool:
    """Whether observations are stacks of images (channels, height, width), which a CNN should see.

    Raises:
        ConfigError: if they are neither such images nor vectors.
    """
    if not isinstance(space, gym.spaces.Box):
        raise ConfigError(f"--env-id must have Box observations (numbers or images), not {space}")
    if len(space.shape) == 1:
        return False
    if len(space.shape) == 3 and min(space.shape[1:]) >= SMALLEST_IMAGE:
        return True
    raise ConfigError(
        "--env-id must have vectors (n,) or images (channels, height, width) of at least "
        f"{SMALLEST_IMAGE}x{SMALLEST_IMAGE} as observations, not shape {space.shape}: wrap the environment"
    )


def channels_last(images: NDArray[Any]) -> NDArray[Any]:
    """Return images (B, C, H, W) as (B, H, W, C), side by side in memory: no copy where they lie so already."""
    pixels = images.transpose(0, 2, 3, 1)
    if not pixels.flags.c_contiguous:
        channels = images.transpose(1, 0, 2, 3).reshape(images.shape[1], -1, images.shape[3])
        pixels = cv2.merge(list(channels)).reshape(pixels.shape)  # NumPy's own copy takes eight times as long
    return pixels


def observation_tensor(obs: NDArray[Any], device: torch.device) -> Tensor:
    """Put what environments show, (N, ...), on the device: pixels as bytes, all else as floats."""
    if obs.ndim == 4:
        obs = channels_last(obs).transpose(0, 3, 1, 2)
    dtype = torch.uint8 if obs.dtype == np.uint8 and obs.ndim == 4 else torch.float32
    return torch.as_tensor(obs, dtype=dtype).to(device, non_blocking=True)  # a GPU need not be done with all before


def training_input(obs: NDArray[Any], device: torch.device) -> Tensor:
    """The same, as a gradient takes the least time: images `in_blocks`, as `NatureCNN` looks at them first."""
    if obs.ndim != 4:
        return observation_tensor(obs, device)
    size = NatureCNN.block_size
    count, channels, height, width = obs.shape
    rows, columns = height // size, width // size
    pixels = channels_last(obs)[:, : rows * size, : columns * size].reshape(count, rows, size, columns, size * channels)
    runs = pixels.view(f"V{size * channels * obs.itemsize}")[..., 0]  # moved as one: five times as fast as `in_blocks`
    blocks = np.ascontiguousarray(runs.transpose(0, 1, 3, 2)).view(obs.dtype)
    return observation_tensor(blocks.reshape(count, rows, columns, -1).transpose(0, 3, 1, 2), device)
