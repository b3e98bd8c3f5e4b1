"""The whole preprocessing on real ROMs, against Stable-Baselines3 as the independent reference."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.monitor import Monitor

from minirl.envs.atari import make_atari_env

Transition = tuple[NDArray[np.uint8], float, bool, bool]


def play(env: gym.Env[Any, Any], seed: int, num_steps: int) -> tuple[list[Transition], list[Any]]:
    """Play seeded random actions, resetting at each end; return the newest frame of each step and the scores."""
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    transitions: list[Transition] = [(newest_frame(obs), 0.0, False, False)]
    games = []
    for _ in range(num_steps):
        obs, reward, terminated, truncated, info = env.step(int(rng.integers(env.action_space.n)))  # type: ignore[attr-defined]
        transitions.append((newest_frame(obs), float(reward), terminated, truncated))
        if "episode" in info:
            games.append(info["episode"]["r"])
        if terminated or truncated:
            obs, _ = env.reset()
            transitions.append((newest_frame(obs), 0.0, False, False))
    return transitions, games


def newest_frame(obs: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(4, 84, 84) from minirl or (84, 84, 1) from Stable-Baselines3 -> (84, 84)."""
    return (obs[-1] if obs.shape[0] == 4 else obs[..., 0]).copy()


@pytest.mark.parametrize(
    ("env_id", "num_steps"),
    [("PongNoFrameskip-v4", 2500), ("BreakoutNoFrameskip-v4", 1500), ("SpaceInvadersNoFrameskip-v4", 2500)],
)
@pytest.mark.parametrize("seed", [0, 7])
def test_equals_stable_baselines3_bit_for_bit(env_id: str, num_steps: int, seed: int) -> None:
    ours, our_games = play(make_atari_env(env_id), seed, num_steps)
    reference = AtariWrapper(Monitor(gym.make(env_id)))
    theirs, their_games = play(reference, seed, num_steps)
    assert len(ours) == len(theirs)
    for (frame, *rest), (their_frame, *their_rest) in zip(ours, theirs, strict=True):
        assert rest == their_rest
        np.testing.assert_array_equal(frame, their_frame)
    assert sum(transition[2] for transition in ours) >= 2, "the comparison must go over ends"
    assert len(our_games) >= 1
    assert our_games == their_games
