"""n-step targets against a walk through the history, step by step, and by hand."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from minirl.dqn import double_dqn_target
from minirl.replay import ReplayBuffer

GAMMA = 0.5
N, T, LENGTH = 2, 60, 32  # environments, steps of each, and how many of them are remembered


def play(stacked: bool) -> tuple[ReplayBuffer, dict[str, np.ndarray]]:
    """Fill a memory with steps that tell which they are: step t shows 2 t, and ends an episode with 2 t + 1."""
    rng = np.random.default_rng(0)
    steps = {
        "rewards": rng.integers(-9, 10, (T, N)).astype(np.float32),
        "terminated": rng.random((T, N)) < 0.15,
        "truncated": rng.random((T, N)) < 0.15,
    }
    steps["truncated"] &= ~steps["terminated"]
    ended = steps["terminated"] | steps["truncated"]
    shown = np.arange(T)[:, None].repeat(N, axis=1) * 2
    following = np.where(ended, shown + 1, shown + 2)
    shape = (2, 36, 36) if stacked else (1,)
    space = gym.spaces.Box(0, 255, shape, np.uint8 if stacked else np.float32)
    memory = ReplayBuffer(N * LENGTH, space, N, stacked=stacked, seed=1)
    for t in range(T):
        # Two frames are the same where they are the first of an episode, as `FrameStack` fills them.
        first = t == 0 or ended[t - 1]
        frames = [np.stack([np.where(first, shown[t], shown[t] - 2), shown[t]]), np.stack([shown[t], following[t]])]
        pictures = [
            np.broadcast_to(pair.T[:, -shape[0] :].reshape(N, shape[0], *[1] * (len(shape) - 1)), (N, *shape))
            for pair in frames
        ]
        obs, next_obs = (picture.astype(space.dtype) for picture in pictures)
        memory.add(obs, np.arange(N), steps["rewards"][t], next_obs, steps["terminated"][t], steps["truncated"][t])
    return memory, steps


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("n_step", [1, 3, 50])
def test_the_sum_ends_where_the_episode_or_the_memory_does(n_step: int, stacked: bool) -> None:
    memory, steps = play(stacked)
    batches = [memory.sample(len(memory), n_step, GAMMA) for _ in range(20)]
    kinds = set()
    for batch in batches:
        for obs, action, reward, next_obs, terminated, discount in zip(*batch, strict=True):
            env, t, total, k = int(action), int(obs.flat[-1]) // 2, 0.0, 0
            while True:
                total += GAMMA**k * steps["rewards"][t + k, env]
                k += 1
                last = t + k - 1
                real_end, cut = steps["terminated"][last, env], steps["truncated"][last, env]
                if real_end or cut or k == n_step or last == T - 1:
                    break
            kinds.add((bool(real_end), bool(cut), k == n_step, last == T - 1))
            assert np.isclose(reward, total, rtol=1e-5, atol=1e-5)
            assert discount == np.float32(GAMMA**k)
            assert terminated == real_end
            assert next_obs.flat[-1] == (2 * last + 1 if real_end or cut else 2 * last + 2)
    assert {kind[:2] for kind in kinds} == {(True, False), (False, True), (False, False)}  # each was met
    assert any(kind[3] for kind in kinds)


def test_a_cut_bootstraps_and_a_real_end_does_not_by_hand() -> None:
    space = gym.spaces.Box(-9, 9, (1,), np.float32)
    nothing = np.zeros(1, np.bool_)
    for real_end in (True, False):
        memory = ReplayBuffer(2, space, seed=0)
        end = np.array([True])
        memory.add(np.zeros((1, 1)), np.zeros(1, int), np.ones(1), np.ones((1, 1)), nothing, nothing)
        ends = (end, nothing) if real_end else (nothing, end)
        memory.add(np.ones((1, 1)), np.ones(1, int), np.full(1, 2.0), np.full((1, 1), 2.0), *ends)
        batch = memory.sample(2, 3, GAMMA)
        while batch.actions[0] != 0:  # the step before the last
            batch = memory.sample(2, 3, GAMMA)
        online, target = torch.tensor([[1.0, 3.0]] * 2), torch.tensor([[7.0, 8.0]] * 2)
        rewards, terminated, discounts = map(torch.from_numpy, (batch.rewards, batch.terminated, batch.discounts))
        targets = double_dqn_target(rewards, terminated, online, target, discounts)
        assert targets[0] == 1 + 0.5 * 2 + (0 if real_end else 0.25 * 8)


def test_what_is_saved_and_put_back_gives_the_same_batches() -> None:
    memory, _ = play(stacked=False)
    other, _ = play(stacked=False)
    other.columns["episodes"][:], other.episode[:] = 0, 0
    other.put(T - LENGTH, memory.since(T - LENGTH))
    other.set_counters(memory.counters())
    assert np.array_equal(other.episode, memory.episode)
    for mine, theirs in zip(memory.sample(64, 3, GAMMA), other.sample(64, 3, GAMMA), strict=True):
        assert np.array_equal(mine, theirs)


def test_a_resumed_run_that_starts_new_games_sums_nothing_of_them() -> None:
    memory, _ = play(stacked=False)
    memory.episode[:] = memory.columns["episodes"][:, (T - 1) % LENGTH]  # nothing has ended
    memory.cut()
    memory.add(np.zeros((N, 1)), np.arange(N), np.full(N, 100.0), np.zeros((N, 1)), *np.zeros((2, N), np.bool_))
    batch = memory.sample(len(memory), 50, 1.0)
    assert (batch.rewards[batch.observations[:, 0] > 0] < 100).all()
    assert len(set(batch.observations[:, 0])) > 10
