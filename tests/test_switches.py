"""Each trick that makes minirl fast can be switched off, which changes only the time."""

import functools
from typing import Any

import pytest
from torch import Tensor

from minirl import dqn, ppo
from minirl.dqn import DQNConfig
from minirl.ppo import PPOConfig
from tests.switches import SWITCHES, switch_off
from tests.weights import parameters

PONG: dict[str, Any] = {"env_id": "PongNoFrameskip-v4", "num_workers": 1, "compile": False}
SMALL_PPO: dict[str, Any] = {**PONG, "num_envs": 3, "num_steps": 8, "minibatch_size": 12, "total_timesteps": 48}
SMALL_DQN: dict[str, Any] = {**PONG, "total_timesteps": 80, "learning_starts": 40, "batch_size": 8}
WORKS: dict[str, PPOConfig | DQNConfig] = {
    "ppo, vectors": PPOConfig(env_id="CartPole-v1", num_steps=16, minibatch_size=32, total_timesteps=512),
    "ppo, images": PPOConfig(**SMALL_PPO, precision="float32"),
    "ppo, bfloat16": PPOConfig(**SMALL_PPO, precision="bfloat16"),
    "dqn, compiled": DQNConfig(total_timesteps=400, learning_starts=100, eval_frequency=None, compile=True),
    "dqn, wide": DQNConfig(
        total_timesteps=400,
        learning_starts=200,
        batch_size=128,
        hidden_sizes=(256, 256),
        eval_frequency=None,
        compile=True,
    ),
    "dqn, images": DQNConfig(**SMALL_DQN, train_frequency=4, precision="float32"),
}
SAME = [
    ("allocator", "ppo, images"),
    ("conditions", "dqn, compiled"),
    ("frames-once", "dqn, images"),
    ("modes", "dqn, compiled"),
    ("numbers-once", "dqn, compiled"),
    ("rounded-weights", "ppo, bfloat16"),
    ("skip-and-shrink", "ppo, images"),
    ("turns", "dqn, images"),
]
TO_ROUNDING = [  # other sums, and other orders of the same
    ("compiling", "dqn, compiled"),
    ("halves", "ppo, images"),
    ("numpy", "ppo, vectors"),
    ("one-call-target", "dqn, compiled"),
    ("one-thread-beside", "ppo, images"),
    ("one-thread-small", "ppo, vectors"),
    ("onednn", "dqn, wide"),
    ("products", "dqn, compiled"),
]


def trained(work: str) -> Tensor:
    config = WORKS[work]
    if isinstance(config, PPOConfig):
        return parameters(ppo.train(config, device="cpu"))
    return parameters(dqn.train(config, device="cpu"))


@functools.cache
def as_it_is(work: str) -> Tensor:
    return trained(work)


def test_every_switch_is_tried() -> None:
    named = [trick for trick, _ in SAME + TO_ROUNDING]
    assert sorted([*named, "events"]) == sorted(SWITCHES)  # that one's file is read in test_events.py


@pytest.mark.parametrize(
    ("trick", "work"),
    [
        pytest.param(*pair, marks=() if pair[1] in ("ppo, vectors", "ppo, images") else pytest.mark.slow)
        for pair in SAME + TO_ROUNDING
    ],
)
def test_without_it_a_training_ends_in_the_same_weights(trick: str, work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = as_it_is(work)
    switch_off(trick, monkeypatch)
    rounding = 1e-4 if (trick, work) in TO_ROUNDING else 0.0  # a single step of Adam moves a weight by up to 5e-3
    assert (trained(work) - expected).abs().max() <= rounding
