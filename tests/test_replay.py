"""The replay memory against a naive one that stores every pair."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray

from minirl.replay import ReplayBuffer
from minirl.runs.resume import MemoryFiles

SIDE = 36
PIXELS = gym.spaces.Box(0, 255, (4, SIDE, SIDE), np.uint8)
VECTOR = gym.spaces.Box(-1, 1, (3,), np.float32)

Transition = tuple[NDArray[Any], int, float, NDArray[Any], bool]


class Players:
    """Random episodes in several environments, with stacks as `FrameStack` makes them; and the naive memory."""

    def __init__(self, num_envs: int, mean_length: float, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.mean_length = mean_length
        self.num_envs = num_envs
        self.stacks = np.stack([self.first_stack() for _ in range(num_envs)])
        self.memory: list[list[Transition]] = [[] for _ in range(num_envs)]
        self.count = 0

    def frame(self) -> NDArray[np.uint8]:
        return self.rng.integers(0, 256, (SIDE, SIDE), np.uint8)

    def first_stack(self) -> NDArray[np.uint8]:
        return np.repeat(self.frame()[None], 4, axis=0)

    def step(self, buffer: ReplayBuffer) -> None:
        observations = self.stacks.copy()
        following = np.stack([np.concatenate((stack[1:], self.frame()[None])) for stack in self.stacks])
        terminated = self.rng.random(self.num_envs) < 0.5 / self.mean_length
        truncated = self.rng.random(self.num_envs) < 0.5 / self.mean_length
        actions = self.rng.integers(0, 6, self.num_envs)
        rewards = np.arange(self.count, self.count + self.num_envs, dtype=np.float32)  # each its own: its number
        self.count += self.num_envs
        for env in range(self.num_envs):
            self.memory[env].append(
                (observations[env], int(actions[env]), float(rewards[env]), following[env], bool(terminated[env]))
            )
            ended = terminated[env] or truncated[env]
            self.stacks[env] = self.first_stack() if ended else following[env]
        buffer.add(observations, actions, rewards, following, terminated, truncated)

    def transition(self, reward: float) -> Transition:
        number = int(reward)
        return self.memory[number % self.num_envs][number // self.num_envs]


def check(buffer: ReplayBuffer, players: Players, batch_size: int) -> set[int]:
    """Compare a batch with the naive memory, byte for byte; return the numbers of its transitions."""
    batch = buffer.sample(batch_size)
    for i, reward in enumerate(batch.rewards):
        observation, action, _, next_observation, terminated = players.transition(float(reward))
        np.testing.assert_array_equal(batch.observations[i], observation)
        np.testing.assert_array_equal(batch.next_observations[i], next_observation)
        assert batch.actions[i] == action
        assert batch.terminated[i] == terminated
    return {int(reward) for reward in batch.rewards}


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("mean_length", [1.5, 6, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_sampled_transition_is_what_a_naive_memory_holds(num_envs: int, mean_length: float, seed: int) -> None:
    length = 25
    buffer = ReplayBuffer(num_envs * length, PIXELS, num_envs, stacked=True, seed=seed)
    players = Players(num_envs, mean_length, seed)
    for step in range(4 * length):
        players.step(buffer)
        if step % 3 == 0:
            check(buffer, players, min(16, len(buffer)))
    held: set[int] = set()
    for _ in range(60):
        held |= check(buffer, players, min(64, len(buffer)))
    assert len(held) == len(buffer), "everything that is stored is sampled sooner or later"
    newest = {players.count - 1 - i for i in range(num_envs)}
    assert newest <= held, "the newest transitions are among them"
    assert min(held) >= players.count - num_envs * length, "and nothing older than the capacity"


def everything(buffer: ReplayBuffer) -> list[NDArray[Any]]:
    """What each transition that can be sampled would be sampled as, environment by environment."""
    kept: list[NDArray[Any]] = []
    for env, size in enumerate(buffer._sizes()):
        slot = np.arange(buffer.added - size, buffer.added) % buffer.length
        columns = tuple(buffer.columns.values())
        where = env * buffer.length + slot
        kept += [*buffer.observations.read(np.full(size, env), slot, where), *(column[env, slot] for column in columns)]
    return kept


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 24))])
def test_a_memory_that_was_saved_and_loaded_is_the_same_byte_for_byte_at_any_size(
    seed: int, stacked: bool, tmp_path: Path
) -> None:
    """Sizes that divide and sizes that do not, files that end before, at and after the oldest transition, and gaps."""
    rng = np.random.default_rng(seed)
    num_envs, length, every = int(rng.integers(1, 4)), int(rng.integers(2, 40)), int(rng.integers(1, 60))
    players = Players(num_envs, mean_length=float(rng.choice([1, 3, 8, 60])), seed=seed)

    def new(seed: int) -> ReplayBuffer:
        return ReplayBuffer(num_envs * length, PIXELS, num_envs, stacked=stacked, seed=seed)

    buffer, files = new(0), MemoryFiles(tmp_path)
    for step in range(1, 3 * length + 2 * every):
        players.step(buffer)
        if step % every:
            continue
        saved = files.save(buffer)
        loaded, files = new(1), MemoryFiles(tmp_path)
        loaded.rng.bit_generator.state = buffer.rng.bit_generator.state
        files.load(loaded, saved)
        assert len(loaded) == len(buffer)
        for mine, other in zip(everything(buffer), everything(loaded), strict=True):
            np.testing.assert_array_equal(mine, other)
        buffer = loaded  # and it goes on as the one before: see below
        if len(buffer):
            check(buffer, players, min(64, len(buffer)))


def test_two_memories_of_one_run_have_files_of_their_own(tmp_path: Path) -> None:
    saved = {}
    for name in ("memory-of-demonstrations", "memory"):  # the second's files are no pattern for the first's
        buffer, players = ReplayBuffer(20, PIXELS, stacked=True), Players(1, mean_length=5, seed=len(name))
        for _ in range(10):
            players.step(buffer)
        saved[name] = buffer, MemoryFiles(tmp_path, name).save(buffer)
    for name, (buffer, state) in saved.items():
        loaded, files = ReplayBuffer(20, PIXELS, stacked=True), MemoryFiles(tmp_path, name)
        files.load(loaded, state)
        for mine, other in zip(everything(buffer), everything(loaded), strict=True):
            np.testing.assert_array_equal(mine, other)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("num_envs", [1, 3])
def test_after_a_cut_the_old_episodes_end_and_the_new_ones_start_with_their_own_frames(num_envs: int) -> None:
    """A resumed run whose environments could not be saved starts new games in the middle of the old ones."""
    buffer, players = ReplayBuffer(30 * num_envs, PIXELS, num_envs, stacked=True), Players(num_envs, 50, seed=0)
    buffer.cut()
    for step in range(80):
        players.step(buffer)
        if step % 7 == 3:
            buffer.cut()
            players.stacks = np.stack([players.first_stack() for _ in range(num_envs)])
        check(buffer, players, min(32, len(buffer)))


@pytest.mark.parametrize("num_envs", [1, 2])
def test_episodes_of_a_usual_length_fill_the_capacity(num_envs: int) -> None:
    buffer = ReplayBuffer(200 * num_envs, PIXELS, num_envs, stacked=True)
    players = Players(num_envs, mean_length=60, seed=0)
    sizes = []
    for _ in range(700):
        players.step(buffer)
        sizes.append(len(buffer))
    assert sizes[:200] == [num_envs * (i + 1) for i in range(200)]
    assert set(sizes[200:]) == {200 * num_envs}


def test_very_short_episodes_cost_old_transitions_and_nothing_else() -> None:
    buffer = ReplayBuffer(100, PIXELS, stacked=True)
    players = Players(1, mean_length=1, seed=0)
    for _ in range(500):
        players.step(buffer)
    assert 50 <= len(buffer) < 100
    check(buffer, players, len(buffer))


def test_a_million_pong_transitions_take_at_most_7_5_gb() -> None:
    length, space = 1_000_000, gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    buffer = ReplayBuffer(length, space, stacked=True)  # memory that is not written to is not taken
    arrays: list[NDArray[Any]] = [*buffer.columns.values()]
    arrays += [value for value in buffer.observations.__dict__.values() if isinstance(value, np.ndarray)]
    assert 7.0e9 < sum(array.nbytes for array in arrays) <= 7.5e9


@pytest.mark.parametrize("num_envs", [1, 4])
def test_vectors_are_stored_as_they_are(num_envs: int) -> None:
    buffer = ReplayBuffer(8 * num_envs, VECTOR, num_envs)
    for step in range(20):
        value = np.full((num_envs, 3), step, np.float32) + np.arange(num_envs)[:, None] * 100
        ended = np.full(num_envs, step % 5 == 0)
        buffer.add(value, np.full(num_envs, step), -value[:, 0], value + 0.5, ended, ~ended)
    assert len(buffer) == 8 * num_envs
    batch = buffer.sample(8 * num_envs)
    assert batch.observations.shape == (8 * num_envs, 3)
    np.testing.assert_array_equal(batch.next_observations, batch.observations + 0.5)
    np.testing.assert_array_equal(batch.observations[:, 0] % 100, batch.actions)
    np.testing.assert_array_equal(batch.rewards, -batch.observations[:, 0])
    np.testing.assert_array_equal(batch.terminated, batch.actions % 5 == 0)
    assert batch.actions.min() >= 12
    assert {int(value) // 100 for value in batch.observations[:, 0]} == set(range(num_envs))


def test_sampling_is_uniform_and_seeded() -> None:
    def filled(seed: int) -> ReplayBuffer:
        buffer = ReplayBuffer(20, VECTOR, 2, seed=seed)
        for step in range(13):
            zeros = np.zeros((2, 3), np.float32)
            buffer.add(
                zeros,
                np.array([step, step + 100]),
                np.zeros(2, np.float32),
                zeros,
                np.zeros(2, bool),
                np.zeros(2, bool),
            )
        return buffer

    buffer = filled(3)
    draws = np.concatenate([buffer.sample(20).actions for _ in range(1000)])
    numbers, counts = np.unique(draws, return_counts=True)
    assert numbers.tolist() == [*range(3, 13), *range(103, 113)]
    assert counts.min() > 850
    assert counts.max() < 1150
    np.testing.assert_array_equal(filled(3).sample(9).actions, filled(3).sample(9).actions)
    assert filled(3).sample(9).actions.tolist() != filled(4).sample(9).actions.tolist()


@pytest.mark.parametrize(("capacity", "num_envs"), [(0, 1), (-4, 1), (10, 3), (2, 4), (4, 0)])
def test_capacities_that_cannot_work_are_refused(capacity: int, num_envs: int) -> None:
    with pytest.raises(ValueError, match=f"capacity must be a positive multiple of num_envs = {num_envs}"):
        ReplayBuffer(capacity, VECTOR, num_envs)


@pytest.mark.parametrize("batch_size", [0, -1, 4])
def test_batches_that_cannot_be_drawn_are_refused(batch_size: int) -> None:
    buffer = ReplayBuffer(10, VECTOR)
    zeros = np.zeros((1, 3), np.float32)
    for _ in range(3):
        buffer.add(zeros, np.zeros(1, np.int64), np.zeros(1, np.float32), zeros, np.zeros(1, bool), np.zeros(1, bool))
    with pytest.raises(ValueError, match=f"from 1 to the 3 transitions stored, not {batch_size}"):
        buffer.sample(batch_size)
