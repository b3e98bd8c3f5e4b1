"""The network bodies: sizes, initialisation and what they make of pixels."""

import itertools
import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from minirl.checks import ConfigError
from minirl.dqn import QNetwork
from minirl.fast.runtime import has_fast_bfloat16, select_device, select_precision
from minirl.networks import (
    BlockConv2d,
    NatureCNN,
    RoundedCopy,
    channels_last,
    in_blocks,
    is_image,
    mlp,
    observation_tensor,
    orthogonal,
    set_precision,
    training_input,
)
from minirl.ppo import ActorCritic

PIXELS = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
VECTOR = gym.spaces.Box(-1, 1, (4,), np.float64)
TWO = gym.spaces.Discrete(2)
CPU = torch.device("cpu")


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("gain", [0.01, 1.0, math.sqrt(2)])
def test_orthogonal_layers_have_orthogonal_rows_of_the_gains_length_and_no_bias(gain: float) -> None:
    layer = orthogonal(nn.Linear(10, 6), gain)
    weight = layer.weight.detach()
    torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(6), atol=1e-5, rtol=1e-5)
    assert not layer.bias.any()  # type: ignore[union-attr]


def test_the_actor_critic_on_vectors_has_two_separate_mlps() -> None:
    agent = ActorCritic(VECTOR, TWO)
    # (4 x 64 + 64 + 64 x 64 + 64) twice, 64 x 2 + 2 and 64 + 1
    assert count(agent) == 2 * 4480 + 130 + 65
    distribution, value = agent(torch.randn(5, 4))
    value.sum().backward()
    assert all(parameter.grad is None for parameter in agent.actor_body.parameters())
    assert agent.critic_body is not None
    assert all(parameter.grad is not None for parameter in agent.critic_body.parameters())
    assert distribution.logits.shape == (5, 2)
    assert value.shape == (5,)


def test_the_actor_critic_on_pixels_shares_one_nature_cnn() -> None:
    agent = ActorCritic(PIXELS, gym.spaces.Discrete(6))
    # 4x32x8x8 + 32, 32x64x4x4 + 64, 64x64x3x3 + 64, 3136x512 + 512, 512x6 + 6, 512 + 1
    assert count(agent) == 8224 + 32832 + 36928 + 1606144 + 3078 + 513
    assert agent.critic_body is None


def test_all_actions_are_about_equally_likely_at_first() -> None:
    agent = ActorCritic(PIXELS, gym.spaces.Discrete(6))
    distribution, _ = agent(torch.randint(0, 256, (16, 4, 84, 84), dtype=torch.uint8))
    torch.testing.assert_close(distribution.probs, torch.full((16, 6), 1 / 6), atol=0.01, rtol=0)


def test_layers_start_with_the_gains_of_the_paper() -> None:
    for agent in (ActorCritic(VECTOR, TWO), ActorCritic(PIXELS, TWO)):
        bodies = [body for body in (agent.actor_body, agent.critic_body) if body is not None]
        layers = [layer for body in bodies for layer in body.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        assert len(layers) == 4
        for layer, gain in [*((layer, math.sqrt(2)) for layer in layers), (agent.actor, 0.01), (agent.critic, 1.0)]:
            weight = layer.weight.detach().flatten(1)
            largest = float(torch.linalg.matrix_norm(weight, ord=2))
            assert largest == pytest.approx(gain, rel=1e-4), "orthogonal: all singular values are the gain"
    assert [type(layer) for layer in ActorCritic(VECTOR, TWO).actor_body.children()] == [nn.Linear, nn.Tanh] * 2


def test_bytes_and_normalised_floats_give_the_same_features() -> None:
    cnn = NatureCNN((4, 84, 84))
    images = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    normalised = torch.from_numpy(images.numpy().astype(np.float32) / 255)
    assert torch.equal(cnn(images), cnn(normalised))
    assert not torch.allclose(cnn(images), cnn(images.float()))


def test_an_mlp_has_an_activation_after_each_layer() -> None:
    assert [type(layer) for layer in mlp((4, 24, 2), nn.ReLU)] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU]


@pytest.mark.parametrize(
    ("space", "dtype"),
    [
        (PIXELS, torch.uint8),
        (gym.spaces.Box(0.0, 1.0, (4, 84, 84), np.float32), torch.float32),
        (VECTOR, torch.float32),
        (gym.spaces.Box(0, 255, (128,), np.uint8), torch.float32),
        (gym.spaces.Box(0, 255, (1, 36, 36), np.uint8), torch.uint8),
    ],
)
def test_only_images_of_bytes_stay_bytes(space: gym.spaces.Box, dtype: torch.dtype) -> None:
    obs = np.stack([space.sample() for _ in range(3)])
    for tensor in (observation_tensor(obs, CPU), training_input(obs, CPU)):
        assert tensor.dtype == dtype
    np.testing.assert_array_equal(observation_tensor(obs, CPU).numpy(), obs.astype(np.float32))


def cut_pixel_by_pixel(images: NDArray[Any], size: int) -> NDArray[Any]:
    """What `in_blocks` says it returns, one value at a time."""
    count, channels, height, width = images.shape
    blocks = np.zeros((count, size * size * channels, height // size, width // size), images.dtype)
    for y, x, channel in itertools.product(range(height // size * size), range(width // size * size), range(channels)):
        place = (y % size * size + x % size) * channels + channel
        blocks[:, place, y // size, x // size] = images[:, channel, y, x]
    return blocks


@pytest.mark.parametrize("shape", [(2, 4, 84, 84), (1, 3, 39, 46), (3, 1, 36, 36)])
def test_images_are_cut_into_blocks_pixel_by_pixel(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    expected = cut_pixel_by_pixel(images, 4)
    np.testing.assert_array_equal(in_blocks(torch.from_numpy(images), 4).numpy(), expected)
    woven = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)  # other memory, the same images
    floats = images.astype(np.float32)
    for obs, wanted in ((images, expected), (woven, expected), (floats, expected.astype(np.float32))):
        blocks = training_input(obs, CPU)
        np.testing.assert_array_equal(blocks.numpy(), wanted)
        assert blocks.is_contiguous(memory_format=torch.channels_last)
        assert observation_tensor(obs, CPU).is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(cut_pixel_by_pixel(images, 3), in_blocks(torch.from_numpy(images), 3).numpy())


def test_channels_are_woven_once() -> None:
    images = np.random.default_rng(0).integers(256, size=(2, 3, 5, 6), dtype=np.uint8)
    woven = channels_last(images)
    np.testing.assert_array_equal(woven, np.moveaxis(images, 1, -1))
    assert np.shares_memory(channels_last(woven.transpose(0, 3, 1, 2)), woven)


@pytest.mark.parametrize("shape", [(4, 84, 84), (3, 39, 46), (1, 36, 36)])
@pytest.mark.parametrize("cut", [False, True])
def test_the_cnn_is_the_papers_with_and_without_blocks_and_so_is_its_gradient(
    shape: tuple[int, ...], cut: bool
) -> None:
    torch.manual_seed(0)
    network = NatureCNN(shape)
    images = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    convolutions = [layer for layer in network.convolutions if isinstance(layer, nn.Conv2d)]
    maps = images.float() / 255
    for layer, stride in zip(convolutions, (4, 2, 1), strict=True):
        maps = F.relu(F.conv2d(maps, layer.weight, layer.bias, stride=stride))
    dense = network.dense[0]
    assert isinstance(dense, nn.Linear)
    expected = F.relu(maps.permute(0, 2, 3, 1).reshape(3, -1) @ dense.weight.T + dense.bias)
    seen = training_input(images.numpy(), CPU) if cut else images
    actual = network(seen)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(network(seen), expected.detach(), rtol=1e-4, atol=1e-5)
    weights = list(network.parameters())
    gradients = [torch.autograd.grad(features.square().sum(), weights) for features in (actual, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_a_kernel_must_be_two_strides_wide() -> None:
    with pytest.raises(ValueError, match="kernel_size must be twice the stride of 2, not 3"):
        BlockConv2d(4, 8, kernel_size=3, stride=2)


@pytest.mark.parametrize("shape", [(84, 84, 3), (4, 35, 84), (84, 84), (2, 4, 84, 84), ()])
def test_other_pictures_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="--env-id must have vectors"):
        is_image(gym.spaces.Box(0, 255, shape, np.uint8))


@pytest.mark.parametrize(("there", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_cuda_where_it_is(there: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    assert select_device("auto") == torch.device(device)
    assert select_device("cpu") == torch.device("cpu")


def test_bfloat16_changes_the_features_to_rounding_and_leaves_weights_and_gradients_float32() -> None:
    torch.manual_seed(0)
    network = NatureCNN((4, 84, 84))
    images = torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8)
    exact = network(images)
    exact.square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    network.zero_grad()
    set_precision(nn.Sequential(network), torch.bfloat16)
    rounded = network(images)
    rounded.square().mean().backward()
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.01  # bfloat16 has 8 bits: 0.4 % a number
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert ((parameter.grad - gradient).norm() / gradient.norm()).item() < 0.05
    set_precision(network, torch.float32)
    assert torch.equal(network(images), exact)


def test_precisions_by_name() -> None:
    cpu = torch.device("cpu")
    assert select_precision("float32", cpu) == torch.float32
    assert select_precision("bfloat16", cpu) == torch.bfloat16
    with pytest.raises(ConfigError, match="--precision must be auto, float32 or bfloat16, not 'half'"):
        select_precision("half", cpu)


@pytest.mark.parametrize(
    ("processor", "fast"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),  # slower than float32
        ({"cpu_name": "AMD EPYC 9R14", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"cpu_name": "AMD EPYC 7763", "avx512_bf16": False, "amx_bf16": False}, False),
        ({"bf16": True}, False),  # ARM: not measured
    ],
)
def test_auto_takes_bfloat16_where_it_is_faster(
    processor: dict[str, Any], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: processor, raising=False)
    assert has_fast_bfloat16(torch.device("cpu")) == fast
    assert select_precision("auto", torch.device("cpu")) == (torch.bfloat16 if fast else torch.float32)


def test_a_pytorch_that_does_not_say_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
    assert select_precision("auto", torch.device("cpu")) == torch.float32


def test_rounded_weights_change_no_bit() -> None:
    torch.manual_seed(0)
    network = QNetwork(PIXELS, 6)
    set_precision(network, torch.bfloat16)
    acting = RoundedCopy(network)
    images = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    with torch.no_grad():
        first = acting.network(images)
        assert torch.equal(first, network(images))
        for parameter in network.parameters():
            parameter.add_(0.01)
        assert torch.equal(first, acting.network(images)), "a copy stays as it is"
        acting.refresh()
        assert torch.equal(acting.network(images), network(images))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}

    gradients = [
        torch.autograd.grad(computed(images).square().sum(), list(computed.parameters()))
        for computed in (network, acting.network)
    ]
    for full, rounded in zip(*gradients, strict=True):
        assert torch.equal(full, rounded.float())


def test_without_rounding_the_network_is_its_own_copy() -> None:
    for network in (QNetwork(PIXELS, 6), QNetwork(VECTOR, 2)):
        acting = RoundedCopy(network)
        acting.refresh()
        assert acting.network is network
