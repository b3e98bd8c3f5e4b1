"""The two network bodies that DQN and PPO share, and how they are initialised."""

import copy
import itertools
import math
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minirl.config import ConfigError

Network = TypeVar("Network", bound=nn.Module)
MLPArrays = list[tuple[NDArray[np.float32], NDArray[np.float32]]]

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


def arrays_of(layers: Iterable[nn.Module]) -> MLPArrays:
    """Weights (inputs, outputs) and biases (outputs,) of the linear layers, on the CPU.

    They are the layers' own memory, and follow it as it is trained.
    """
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    return [(layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in linear]


def mlp_in_numpy(arrays: MLPArrays, inputs: NDArray[Any]) -> NDArray[np.float32]:
    """What linear layers with ReLUs between them give for inputs (B, n), to rounding.

    For a network of a few hundred weights the arithmetic is nothing and each call of a torch function costs: this takes
    a tenth of the time, which counts where each step looks at one observation.
    """
    outputs: NDArray[np.float32] = np.asarray(inputs, np.float32)
    for weights, biases in arrays[:-1]:
        outputs = np.maximum(outputs @ weights + biases, 0)
    weights, biases = arrays[-1]
    return outputs @ weights + biases


class NatureCNN(nn.Module):
    """The convolutional network of Mnih et al. (2015): images (B, C, H, W) -> features (B, 512).

    Bytes are divided by 255 here, on the device; float observations are taken to be in [0, 1] already. Images and
    weights lie channels-last in memory, which convolves a quarter faster and changes no shape. With `precision`
    bfloat16, products are computed in it; the weights, their gradients and the features are float32 all the same.
    """

    num_features = 512

    def __init__(self, image_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.precision = torch.float32
        channels = image_shape[0]
        self.convolutions = nn.Sequential(
            orthogonal(nn.Conv2d(channels, 32, kernel_size=8, stride=4)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, kernel_size=4, stride=2)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, kernel_size=3, stride=1)),
            nn.ReLU(),
            nn.Flatten(),
        )
        with torch.no_grad():
            flat_size = self.convolutions(torch.zeros(1, *image_shape)).shape[1]
        self.convolutions.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.linear = nn.Sequential(orthogonal(nn.Linear(flat_size, self.num_features)), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8, or float in [0, 1] -> (B, 512)."""
        images = images.contiguous(memory_format=torch.channels_last)
        pixels = images / 255 if images.dtype == torch.uint8 else images
        features: Tensor
        if self.precision == torch.float32:
            features = self.linear(self.convolutions(pixels))
        else:
            with torch.autocast(images.device.type, self.precision):
                features = self.linear(self.convolutions(pixels)).float()
        return features


def set_precision(network: nn.Module, precision: torch.dtype) -> None:
    """Have the convolutions of a network computed in float32 or bfloat16; an MLP stays as it is."""
    for module in network.modules():
        if isinstance(module, NatureCNN):
            module.precision = precision


class ActingCopy(Generic[Network]):
    """A network to act with, its CNN's weights rounded once to the precision of its products, not at every call.

    What it returns is the same, bit for bit. Where there is nothing to round, it is the network itself.

    Attributes:
        network: what to call; `refresh` it after each change of the original.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.original = network
        if any(module.precision != torch.float32 for module in network.modules() if isinstance(module, NatureCNN)):
            self.network = copy.deepcopy(network)
            for module in self.network.modules():
                if isinstance(module, NatureCNN):
                    module.to(module.precision)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the original's weights."""
        if self.network is not self.original:
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


def observation_dtype(space: gym.Space[object]) -> torch.dtype:
    """Return what observations are kept as until the network sees them: bytes of images, floats of all else."""
    return torch.uint8 if is_image(space) and space.dtype == np.uint8 else torch.float32


def observation_tensor(obs: NDArray[Any], device: torch.device) -> Tensor:
    """Put what environments show, (N, ...), on the device: pixels as bytes, all else as floats."""
    dtype = torch.uint8 if obs.dtype == np.uint8 and obs.ndim == 4 else torch.float32
    return torch.as_tensor(obs, dtype=dtype, device=device)
