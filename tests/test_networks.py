"""The network bodies: sizes, initialisation and what they make of pixels."""

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minirl.checks import ConfigError
from minirl.dqn import QNetwork
from minirl.fast.machine import Float32Linear, autocast, has_fast_bfloat16, select_device, select_precision
from minirl.networks import (
    Categorical,
    NatureCNN,
    channels_last,
    is_image,
    mlp,
    observation_tensor,
    orthogonal,
)
from minirl.ppo import ActorCritic, PPOConfig, make_agent

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
    assert not layer.bias.any()


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
    other = ActorCritic(VECTOR, TWO, PPOConfig(hidden_sizes=(5, 6, 7), activation="relu"))
    for body in (other.actor_body, other.critic_body):
        assert body is not None
        assert [type(layer) for layer in body.children()] == [nn.Linear, nn.ReLU] * 3
        assert [weight.shape[0] for weight in body.parameters() if weight.ndim == 2] == [5, 6, 7]
    assert (other.actor.in_features, other.critic.in_features) == (7, 7)


def test_the_cnn_has_the_channels_that_the_settings_say() -> None:
    agent = make_agent(PPOConfig(cnn_channels=(16, 32, 8)), PIXELS, TWO)
    shapes = [
        (*layer.weight.shape,) for layer in agent.actor_body.modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    assert shapes == [(16, 4, 8, 8), (32, 16, 4, 4), (8, 32, 3, 3), (512, 8 * 7 * 7)]


def test_standard_deviations_start_where_they_are_told_to() -> None:
    config = PPOConfig(env_id="Pendulum-v1", log_std_init=-2)
    agent = make_agent(config, VECTOR, gym.spaces.Box(-1, 1, (2, 3)))
    assert torch.equal(agent(torch.zeros(5, 4))[0].log_std, torch.full((5, 2, 3), -2.0))


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
    assert observation_tensor(obs, CPU).dtype == dtype
    np.testing.assert_array_equal(observation_tensor(obs, CPU).numpy(), obs.astype(np.float32))


def test_channels_are_woven_once() -> None:
    images = np.random.default_rng(0).integers(256, size=(2, 3, 5, 6), dtype=np.uint8)
    woven = channels_last(images)
    np.testing.assert_array_equal(woven, np.moveaxis(images, 1, -1))
    assert np.shares_memory(channels_last(woven.transpose(0, 3, 1, 2)), woven)
    assert observation_tensor(images, CPU).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(4, 84, 84), (3, 39, 46), (1, 36, 36)])
def test_the_cnn_is_the_papers_and_so_is_its_gradient(shape: tuple[int, ...]) -> None:
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
    actual = network(images)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    weights = list(network.parameters())
    gradients = [torch.autograd.grad(features.square().sum(), weights) for features in (actual, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(84, 84, 3), (4, 35, 84), (84, 84), (2, 4, 84, 84), ()])
def test_other_pictures_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="--env-id must have vectors"):
        is_image(gym.spaces.Box(0, 255, shape, np.uint8))


@pytest.mark.parametrize(("there", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_cuda_where_it_is(there: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    monkeypatch.setattr("torch.backends.cudnn.deterministic", False)
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", True)
    assert select_device("auto") == torch.device(device)
    assert torch.backends.cudnn.deterministic == there
    assert torch.backends.cudnn.allow_tf32 != there, "float32 is float32 on a GPU, too"
    assert select_device("cpu") == torch.device("cpu")


def test_bfloat16_changes_the_values_to_rounding_and_leaves_them_weights_and_gradients_float32() -> None:
    torch.manual_seed(0)
    network = QNetwork(PIXELS, 6)
    with torch.no_grad():
        network.head.weight.mul_(100)
    images = torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8)
    exact = network(images)
    exact.square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    network.zero_grad()
    with autocast(torch.bfloat16, CPU):
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
    with autocast(torch.float32, CPU):
        assert torch.equal(network(images), exact)


def test_a_head_is_exact_under_autocast_and_a_linear_layer_otherwise() -> None:
    head, features = Float32Linear(3, 2), torch.randn(5, 3)
    expected = nn.functional.linear(features, head.weight, head.bias)
    assert torch.equal(head(features), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(features), expected)
        assert head(features.bfloat16()).dtype == torch.float32
    assert head.double()(features.double()).dtype == torch.float64


# The distribution


def test_the_distribution_is_pytorchs_and_so_are_its_gradients() -> None:
    logits = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    actions = torch.tensor([0, 1, 2, 3, 3, 0, 1])
    weights = torch.rand(7, dtype=torch.float64)
    results = []
    for kind in (Categorical, torch.distributions.Categorical):
        distribution = kind(logits=logits)
        outcomes = (distribution.log_prob(actions), distribution.entropy(), distribution.probs[:, 1])
        gradient = torch.autograd.grad(sum((weights * outcome).sum() for outcome in outcomes), logits)[0]  # type: ignore
        results.append((*outcomes, gradient, distribution.mode))
    torch.testing.assert_close(*results)
    assert Categorical(logits=logits).sample((5,)).shape == (5, 7)
    assert Categorical(logits=torch.zeros(2, 3, 4)).sample().shape == (2, 3)


def test_draws_are_as_likely_as_they_should_be() -> None:
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().expand(40_000, 4)
    torch.manual_seed(0)
    drawn = Categorical(logits=logits).sample()
    shares = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.0, 0.5, 0.3]), atol=0.01, rtol=0)
    assert shares[1] == 0, "an impossible action is never drawn"


@pytest.mark.parametrize(
    ("number", "action"), [(0.0, 0), (0.1999, 0), (0.2001, 2), (0.6999, 2), (0.7001, 3), (0.9999999, 3)]
)
def test_a_draw_is_the_interval_that_the_number_falls_into(
    number: float, action: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.tensor([[0.2, 0.0, 0.5, 0.3]], dtype=torch.float64).log()
    monkeypatch.setattr(torch, "rand_like", lambda tensor: torch.full_like(tensor, number))
    assert Categorical(logits=logits).sample().tolist() == [action]


# Precision


def test_precisions_by_name() -> None:
    cpu = torch.device("cpu")
    assert select_precision("float32", cpu, images=True) == torch.float32
    assert select_precision("bfloat16", cpu, images=False) == torch.bfloat16
    with pytest.raises(ConfigError, match="--precision must be auto, float32 or bfloat16, not 'half'"):
        select_precision("half", cpu, images=True)


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
    assert select_precision("auto", CPU, images=True) == (torch.bfloat16 if fast else torch.float32)
    assert select_precision("auto", CPU, images=False) == torch.float32


def test_a_pytorch_that_does_not_say_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
    assert select_precision("auto", CPU, images=True) == torch.float32
