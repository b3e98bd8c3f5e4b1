"""What the networks of DQN and PPO share: two bodies, a last layer, a distribution, and what they are shown."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import cv2
import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minirl.checks import ConfigError
from minirl.envs.spaces import SMALLEST_IMAGE, how_to_wrap
from minirl.fast.gpu import send
from minirl.fast.machine import Head
from minirl.fast.small import SmallSequential

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d, Head)


def orthogonal(layer: Layer, gain: float = math.sqrt(2)) -> Layer:
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
    return SmallSequential(*layers)  # an nn.Sequential, faster for a few observations


class NatureCNN(nn.Module):
    """The convolutional network of Mnih et al. (2015): images (B, C, H, W) -> features (B, 512).

    Bytes are divided by 255 here, on the device; float observations are taken to be in [0, 1] already. Images and
    weights lie channels-last in memory, which convolves a quarter faster and changes no shape.
    """

    num_features = 512

    def __init__(self, image_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            orthogonal(nn.Conv2d(image_shape[0], 32, kernel_size=8, stride=4)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, kernel_size=4, stride=2)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, kernel_size=3, stride=1)),
            nn.ReLU(),
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad():
            flat_size = self.convolutions(torch.zeros(1, *image_shape)).numel()
        self.dense = nn.Sequential(orthogonal(nn.Linear(flat_size, self.num_features)), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8, or float in [0, 1] -> (B, 512)."""
        pixels = images / 255 if images.dtype == torch.uint8 else images
        maps: Tensor = self.convolutions(pixels.contiguous(memory_format=torch.channels_last))
        features: Tensor = self.dense(maps.permute(0, 2, 3, 1).flatten(1))  # as they lie in memory: no copy
        return features


class Categorical(torch.distributions.Categorical):
    """PyTorch's distribution of actions 0 to A - 1, normalised once, by `log_softmax`, for drawing and learning alike.

    A draw takes one random number, which falls into one of the intervals that the probabilities cut [0, 1) into.
    PyTorch's own takes A of them, and twice the time.

    Args:
        logits: (..., A).
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = self._param = logits.log_softmax(dim=-1)
        self._num_events = logits.shape[-1]
        torch.distributions.Distribution.__init__(self, logits.shape[:-1], validate_args=False)

    @property
    def mode(self) -> Tensor:
        """The first of the likeliest actions, (...)."""
        return self.logits.argmax(dim=-1)

    def entropy(self) -> Tensor:
        """-sum p log p, (...); what can't happen adds nothing, and has no gradient but 0."""
        return -(self.probs * self.logits.masked_fill(self.probs == 0, 0.0)).sum(dim=-1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw actions, (...)."""
        if sample_shape:
            drawn: Tensor = super().sample(torch.Size(sample_shape))  # type: ignore[no-untyped-call]
            return drawn
        with torch.no_grad():
            ends = self.probs.cumsum(dim=-1)
            number = torch.rand_like(ends[..., :1]) * ends[..., -1:]  # the sum is 1 but for rounding
            return (ends <= number).sum(dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """log pi(a) of actions (...)."""
        return self.logits.gather(-1, value.unsqueeze(-1)).squeeze(-1)


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
        f"{SMALLEST_IMAGE}x{SMALLEST_IMAGE} as observations, not shape {space.shape}: {how_to_wrap(space)}"
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
    obs = obs.astype(np.uint8 if obs.dtype == np.uint8 and obs.ndim == 4 else np.float32, copy=False)
    if obs.ndim == 4:
        obs = channels_last(obs).transpose(0, 3, 1, 2)
    return send(torch.as_tensor(obs), device)
