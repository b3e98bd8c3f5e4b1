"""What the networks of DQN and PPO share: bodies, initial weights, distributions, normalisation and observations."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import cv2
import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from minirl.checks import ConfigError
from minirl.envs.spaces import SMALLEST_IMAGE, how_to_wrap, require_actions
from minirl.fast.gpu import to_device
from minirl.fast.machine import Float32Linear
from minirl.fast.small import SmallSequential

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d, Float32Linear)


def orthogonal(layer: Layer, gain: float = math.sqrt(2)) -> Layer:
    """Give a layer orthogonal weights times `gain`, and zero biases. Returns the layer.

    sqrt(2) keeps the scale of activations through a ReLU (Saxe et al. 2013).
    """
    nn.init.orthogonal_(layer.weight, gain)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def mlp(sizes: tuple[int, ...], activation: type[nn.Module]) -> nn.Sequential:
    """Return fully connected layers `sizes[0] -> sizes[1] -> ...`, each followed by an activation."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [orthogonal(nn.Linear(inputs, outputs)), activation()]
    return SmallSequential(*layers)  # an nn.Sequential, faster for a few observations


class NatureCNN(nn.Module):
    """The convolutional network of Mnih et al. (2015): images (B, C, H, W) -> features (B, 512).

    Bytes are divided by 255 here, on the device; float observations should be in [0, 1] already. Images and weights
    are channels-last in memory, which makes convolutions a quarter faster and changes no shape.

    Args:
        image_shape: (C, H, W).
        channels: output channels of the three convolutions.
    """

    num_features = 512

    def __init__(self, image_shape: tuple[int, ...], channels: tuple[int, ...] = (32, 64, 64)) -> None:
        super().__init__()
        first, second, third = channels
        self.convolutions = nn.Sequential(
            orthogonal(nn.Conv2d(image_shape[0], first, kernel_size=8, stride=4)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(first, second, kernel_size=4, stride=2)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(second, third, kernel_size=3, stride=1)),
            nn.ReLU(),
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad():
            flat_size = self.convolutions(torch.zeros(1, *image_shape)).numel()
        self.dense = nn.Sequential(orthogonal(nn.Linear(flat_size, self.num_features)), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8, or float in [0, 1] -> (B, 512)."""
        pixels = images / 255 if images.dtype == torch.uint8 else images
        maps: Tensor = self.convolutions(pixels.contiguous(memory_format=torch.channels_last))
        features: Tensor = self.dense(maps.permute(0, 2, 3, 1).flatten(1))  # in memory order: no copy
        return features


class Categorical(torch.distributions.Categorical):
    """PyTorch's distribution of actions 0 to A - 1, normalised once, by `log_softmax`, for both sampling and learning.

    A sample takes one random number, which falls into one of the intervals that the probabilities cut [0, 1) into.
    PyTorch's own takes A random numbers, and twice the time.

    Args:
        logits: (..., A).
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = self._param = logits.log_softmax(dim=-1)
        self._num_events = logits.shape[-1]
        torch.distributions.Distribution.__init__(self, logits.shape[:-1], validate_args=False)

    @property
    def mode(self) -> Tensor:
        """The first of the most likely actions, (...)."""
        return self.logits.argmax(dim=-1)

    def entropy(self) -> Tensor:
        """-sum p log p, (...); impossible actions add nothing, and their gradient is 0."""
        return -(self.probs * self.logits.masked_fill(self.probs == 0, 0.0)).sum(dim=-1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw actions, (...)."""
        if sample_shape:
            drawn: Tensor = super().sample(torch.Size(sample_shape))  # type: ignore[no-untyped-call]
            return drawn
        with torch.no_grad():
            ends = self.probs.cumsum(dim=-1)
            number = torch.rand_like(ends[..., :1]) * ends[..., -1:]  # the sum is 1 up to rounding
            return (ends <= number).sum(dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """log pi(a) of actions (...)."""
        return self.logits.gather(-1, value.unsqueeze(-1)).squeeze(-1)


class Categoricals:
    """Actions of a MultiDiscrete space: an independent `Categorical` for each component.

    log pi(a|s) = sum_i log pi_i(a_i|s), and the entropy is the sum of the components' entropies.

    Args:
        logits: (B, the sum of `sizes`), the first component's first.
        sizes: how many values each component has, in the actions' shape.
    """

    def __init__(self, logits: Tensor, sizes: NDArray[np.integer]) -> None:
        self.shape = sizes.shape
        self.parts = [Categorical(logits=part) for part in logits.split(sizes.flatten().tolist(), dim=-1)]

    @property
    def mode(self) -> Tensor:
        """The likeliest actions, (B, ...)."""
        return self._together([part.mode for part in self.parts])

    def sample(self) -> Tensor:
        """Draw actions, (B, ...)."""
        return self._together([part.sample() for part in self.parts])

    def log_prob(self, value: Tensor) -> Tensor:
        """log pi(a|s) of actions (B, ...), (B,)."""
        columns = value.flatten(1).unbind(dim=1)
        log_probs = [part.log_prob(column) for part, column in zip(self.parts, columns, strict=True)]
        return torch.stack(log_probs).sum(dim=0)

    def entropy(self) -> Tensor:
        """The sum of the entropies, (B,)."""
        return torch.stack([part.entropy() for part in self.parts]).sum(dim=0)

    def _together(self, columns: list[Tensor]) -> Tensor:
        return torch.stack(columns, dim=1).reshape(-1, *self.shape)


class Bernoullis:
    """Actions of a MultiBinary space: each component is 1 with probability sigmoid(logit), independently.

    Args:
        logits: (B, n), for actions of n components.
        shape: of an action.
    """

    def __init__(self, logits: Tensor, shape: tuple[int, ...]) -> None:
        self.logits = logits.reshape(-1, *shape)

    @property
    def mode(self) -> Tensor:
        """The most likely actions, (B, ...) int8; 0 if both values are equally likely."""
        return (self.logits > 0).to(torch.int8)

    def sample(self) -> Tensor:
        """Draw actions, (B, ...) int8."""
        with torch.no_grad():
            return (torch.rand_like(self.logits) < self.logits.sigmoid()).to(torch.int8)

    def log_prob(self, value: Tensor) -> Tensor:
        """log pi(a|s) of actions (B, ...), (B,); 1 - sigmoid(x) is sigmoid(-x)."""
        return summed(F.logsigmoid(torch.where(value > 0, self.logits, -self.logits)))

    def entropy(self) -> Tensor:
        """-sum p log p + (1 - p) log (1 - p), (B,)."""
        size = self.logits.abs()  # which value is more likely makes no difference
        return summed(F.softplus(-size) + size * (-size).sigmoid())


class Gaussian:
    """Actions of a Box: an independent normal distribution N(mu_i(s), sigma_i^2) for each component.

        log pi(a|s) = sum_i -(a_i - mu_i)^2 / (2 sigma_i^2) - log sigma_i - log(2 pi) / 2

    The standard deviations of `ActorCritic` are the same in all states, as in CleanRL and Stable-Baselines3.

    Samples may lie beyond the bounds of a Box. The sample itself is stored and judged, and the environment takes the
    nearest action within (`minirl.envs.guard.as_taken`). Why not SAC's squashed Gaussian, the tanh of a sample, which
    never goes beyond? Its entropy has no formula, its log_prob loses precision near the bounds, where tanh is flat, and
    it can't choose a bound itself; a clipped Gaussian does so with the probability of everything beyond the bound.

    Args:
        mean: (B, n), for actions of n components.
        log_std: n numbers in any shape, or (B, n) if they depend on the state.
        shape: of an action.
    """

    def __init__(self, mean: Tensor, log_std: Tensor, shape: tuple[int, ...]) -> None:
        self.mean = mean.reshape(-1, *shape)
        self.log_std = log_std.reshape(-1, *shape).expand_as(self.mean)

    @property
    def mode(self) -> Tensor:
        """The mean, (B, ...)."""
        return self.mean

    def sample(self) -> Tensor:
        """Draw actions, (B, ...)."""
        with torch.no_grad():
            return self.mean + self.log_std.exp() * torch.randn_like(self.mean)

    def log_prob(self, value: Tensor) -> Tensor:
        """The logarithm of the density at actions (B, ...), (B,)."""
        distance = (value - self.mean) * (-self.log_std).exp()
        return summed(-distance.square() / 2 - self.log_std - math.log(2 * math.pi) / 2)

    def entropy(self) -> Tensor:
        """sum_i log sigma_i + (1 + log(2 pi)) / 2, (B,); it may be negative."""
        return summed(self.log_std + (1 + math.log(2 * math.pi)) / 2)


Distribution = Categorical | Categoricals | Bernoullis | Gaussian


def summed(numbers: Tensor) -> Tensor:
    """Sum over all dimensions of an action: (B, ...) -> (B,)."""
    return numbers.reshape(len(numbers), math.prod(numbers.shape[1:])).sum(dim=1)


def action_distribution(space: gym.Space[Any]) -> tuple[int, Callable[..., Distribution]]:
    """Return how many outputs a network needs for a distribution of actions, and what makes one from those (B, n).

    For a Box the outputs are the means; the log standard deviations are passed separately.

    Raises:
        ConfigError: if such actions have no distribution.
    """
    require_actions(space)
    shape = space.shape or ()
    if isinstance(space, gym.spaces.Discrete):
        return int(space.n), Categorical
    if isinstance(space, gym.spaces.MultiDiscrete):
        return int(space.nvec.sum()), functools.partial(Categoricals, sizes=space.nvec)
    if isinstance(space, gym.spaces.MultiBinary):
        return math.prod(shape), functools.partial(Bernoullis, shape=shape)
    return math.prod(shape), functools.partial(Gaussian, shape=shape)


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
    """Return images (B, C, H, W) as (B, H, W, C), contiguous in memory: no copy if they already are."""
    pixels = images.transpose(0, 2, 3, 1)
    if not pixels.flags.c_contiguous:
        channels = images.transpose(1, 0, 2, 3).reshape(images.shape[1], -1, images.shape[3])
        pixels = cv2.merge(list(channels)).reshape(pixels.shape)  # NumPy's own copy takes eight times as long
    return pixels


def observation_tensor(obs: NDArray[Any], device: torch.device) -> Tensor:
    """Put observations (N, ...) on the device: pixels as bytes, everything else as floats."""
    obs = obs.astype(np.uint8 if obs.dtype == np.uint8 and obs.ndim == 4 else np.float32, copy=False)
    if obs.ndim == 4:
        obs = channels_last(obs).transpose(0, 3, 1, 2)
    return to_device(torch.as_tensor(obs), device)
