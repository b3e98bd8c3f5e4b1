"""The whole preprocessing on real ROMs, against Stable-Baselines3 as the independent reference."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.monitor import Monitor

from minirl.checks import ConfigError, fingerprint
from minirl.envs import atari
from minirl.envs.atari import (
    EpisodicLife,
    FireReset,
    Frame,
    FrameStack,
    Grayscale,
    MaxAndSkip,
    NoopReset,
    Resize,
    make_atari_env,
    shows_stacks,
)
from minirl.envs.atari_fast import SkipAndShrink
from minirl.envs.ids import is_atari, registered_id
from minirl.envs.make import make_env
from minirl.envs.state import layers_of

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
    [("PongNoFrameskip-v4", 1000), ("BreakoutNoFrameskip-v4", 300), ("SpaceInvadersNoFrameskip-v4", 700)],
)
@pytest.mark.parametrize("seed", [0, pytest.param(7, marks=pytest.mark.slow)])
def test_equals_stable_baselines3_bit_for_bit(env_id: str, num_steps: int, seed: int) -> None:
    ours, our_games = play(make_atari_env(env_id), seed, num_steps)
    reference = AtariWrapper(Monitor(gym.make(env_id)))
    theirs, their_games = play(reference, seed, num_steps)
    assert len(ours) == len(theirs)
    for (frame, *rest), (their_frame, *their_rest) in zip(ours, theirs, strict=True):
        assert rest == their_rest
        np.testing.assert_array_equal(frame, their_frame)
    assert len(our_games) >= 1, "the comparison must go over the end of a game, and of lives where there are any"
    assert our_games == their_games


@pytest.mark.parametrize(
    ("env_id", "num_steps", "size"),
    [
        ("PongNoFrameskip-v4", 1050, 84),
        ("BreakoutNoFrameskip-v4", 250, 84),
        ("BreakoutNoFrameskip-v4", 250, 42),
        pytest.param("SpaceInvadersNoFrameskip-v4", 800, 42, marks=pytest.mark.slow),
        pytest.param("SpaceInvadersNoFrameskip-v4", 800, 84, marks=pytest.mark.slow),
        pytest.param("ALE/Seaquest-v5", 800, 84, marks=pytest.mark.slow),
        pytest.param("QbertNoFrameskip-v4", 800, 84, marks=pytest.mark.slow),
        ("CarnivalNoFrameskip-v4", 500, 84),  # 214 lines high: two rows of tiles
    ],
)
def test_the_fast_path_equals_the_readable_wrappers_bit_for_bit(env_id: str, num_steps: int, size: int) -> None:
    fast, readable = (make_atari_env(env_id, size=size, fast=fast) for fast in (True, False))
    assert fast.observation_space == readable.observation_space
    rng = np.random.default_rng(3)
    ends = 0
    for seed, steps in ((5, num_steps), (None, 50)):
        obs, info = fast.reset(seed=seed)
        expected_obs, expected_info = readable.reset(seed=seed)
        np.testing.assert_array_equal(obs, expected_obs)
        assert info.keys() == expected_info.keys()
        for _ in range(steps):
            action = int(rng.integers(fast.action_space.n))  # type: ignore[attr-defined]
            obs, *rest = fast.step(action)
            expected_obs, *expected_rest = readable.step(action)
            np.testing.assert_array_equal(obs, expected_obs)
            assert rest == expected_rest, "reward, ends and info, with the score of a finished game"
            if rest[1] or rest[2]:
                ends += 1
                np.testing.assert_array_equal(fast.reset()[0], readable.reset()[0])
    assert ends >= 1


@pytest.mark.parametrize("longest", [200, 201, 202, 203])
def test_the_fast_path_keeps_the_frames_of_the_step_before_where_a_game_is_cut(longest: int) -> None:
    fast, readable = (make_atari_env("BreakoutNoFrameskip-v4", fast=fast) for fast in (True, False))
    ends = []
    for env in (fast, readable):
        env.unwrapped.ale.setInt("max_num_frames_per_episode", longest)  # type: ignore[attr-defined]
        env.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(60):
        action = int(rng.integers(4))
        (obs, *rest), (expected_obs, *expected_rest) = fast.step(action), readable.step(action)
        np.testing.assert_array_equal(obs, expected_obs)
        assert rest == expected_rest
        ends.append(rest[1:3])
        if rest[1] or rest[2]:
            np.testing.assert_array_equal(fast.reset()[0], readable.reset()[0])
    assert [False, True] in ends


def test_what_the_fast_path_showed_stays_as_it_was() -> None:
    env = SkipAndShrink(gym.make("PongNoFrameskip-v4"), 84)
    env.reset(seed=0)
    shown = [env.step(0)[0] for _ in range(60)]
    assert len({frame.tobytes() for frame in shown}) > 10


def kinds(env: gym.Env[Any, Any]) -> list[type]:
    return [type(layer) for layer in layers_of(env)]


PONG = "PongNoFrameskip-v4"


class Darker(Grayscale):
    """A user's own wrapper."""

    def observation(self, observation: Any) -> Any:
        return super().observation(observation) // 2


class Brighter(gym.ObservationWrapper[Any, Any, Any]):
    """Between those that skip and those that gray."""

    def observation(self, observation: Any) -> Any:
        return np.maximum(observation, 100)


def test_the_fast_path_is_taken_for_what_it_stands_in_for() -> None:
    assert SkipAndShrink in kinds(make_env(PONG))
    assert not {MaxAndSkip, Grayscale, Resize} & set(kinds(make_env(PONG)))
    assert set(kinds(make_env(PONG))) >= {FireReset, EpisodicLife, FrameStack, NoopReset}
    bare = make_atari_env(PONG, episodic_life=False, clip_reward=False, noop_max=0, fast=True)
    assert SkipAndShrink in kinds(bare)


@pytest.mark.parametrize(
    ("options", "changed", "reason"),
    [
        ({"size": 64}, {}, "their frames have other sizes"),
        ({"size": 190}, {}, "their frames have other sizes"),  # wider than the screen: interpolated across tiles
        ({"frame_skip": 3}, {}, "their frames have other sizes"),
        ({}, {"Grayscale": lambda env: Darker(env)}, "other wrappers skip, gray or shrink"),
        ({}, {"EpisodicLife": lambda env: Brighter(EpisodicLife(env))}, "other wrappers lie between"),
        ({}, {"NoopReset": lambda env, noop_max: NoopReset(Brighter(env), noop_max)}, "or below them"),
        ({}, {"KNOWN": {**atari.KNOWN, Resize: "edited"}}, "Resize is not what it was"),
    ],
)
def test_anything_else_is_played_by_the_plain_wrappers_and_a_line_says_why(
    options: dict[str, Any],
    changed: dict[str, Any],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    atari._say_once.cache_clear()
    for name, value in changed.items():
        monkeypatch.setattr(atari, name, value)
    fast, plain = (make_atari_env(PONG, fast=fast, **options) for fast in (True, False))
    assert kinds(fast) == kinds(plain)
    assert MaxAndSkip in kinds(fast)
    np.testing.assert_array_equal(fast.reset(seed=0)[0], plain.reset(seed=0)[0])
    make_atari_env(PONG, fast=True, **options)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, "once"
    assert reason in said[0]


def test_frames_of_other_sizes_are_stacks_of_that_size() -> None:
    env = make_atari_env(PONG, size=64, fast=True)
    assert env.reset(seed=0)[0].shape == (4, 64, 64) == env.observation_space.shape


def test_the_code_that_something_faster_stands_in_for_is_still_that_code() -> None:
    """A deliberate change of one also needs a change of `SkipAndShrink` or the replay memory, then of `KNOWN`."""
    assert {kind: fingerprint(kind) for kind in atari.KNOWN} == atari.KNOWN


def test_stacks_are_told_by_what_shows_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shows_stacks(make_atari_env(PONG))
    assert not shows_stacks(make_atari_env(PONG, normalize=True)), "no bytes"
    assert not shows_stacks(Brighter(make_atari_env(PONG)))
    assert not capsys.readouterr().err
    monkeypatch.setitem(atari.KNOWN, FrameStack, "edited")
    atari._say_once.cache_clear()
    assert not shows_stacks(make_atari_env(PONG))
    assert "FrameStack is not what it was" in capsys.readouterr().err


def test_a_time_limit_that_somebody_registered_cuts_games_in_training_too() -> None:
    kwargs = {"game": "pong", "repeat_action_probability": 0.0, "full_action_space": False}
    gym.register("ShortPong-v0", "ale_py.env:AtariEnv", kwargs=kwargs, max_episode_steps=200)
    try:
        lengths = []
        for render_mode in (None, "rgb_array"):
            env = make_env("ShortPong-v0", render_mode=render_mode)
            env.reset(seed=0)
            steps = [env.step(0)[2:4]]
            while not any(steps[-1]):
                steps.append(env.step(0)[2:4])
            lengths.append((len(steps), *steps[-1]))
        assert lengths[0] == lengths[1]
        assert 30 < lengths[0][0] <= 50
        assert lengths[0][1:] == (False, True)
    finally:
        del gym.registry["ShortPong-v0"]


def test_observations_are_stacks_of_bytes_or_of_normalised_floats() -> None:
    raw, floats = make_atari_env("PongNoFrameskip-v4"), make_atari_env("PongNoFrameskip-v4", normalize=True)
    assert raw.observation_space == gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    assert floats.observation_space == gym.spaces.Box(0.0, 1.0, (4, 84, 84), np.float32)
    obs, _ = raw.reset(seed=1)
    normalised, _ = floats.reset(seed=1)
    assert obs.dtype == np.uint8
    assert normalised.dtype == np.float32
    np.testing.assert_array_equal(normalised, obs.astype(np.float32) / 255)
    assert all((frame == obs[0]).all() for frame in obs), "the stack starts as four copies"
    assert raw.action_space == gym.spaces.Discrete(6)


def frames_per_step(env: gym.Env[Frame, int]) -> set[int]:
    """How many emulator frames agent steps take."""
    env.reset()
    counter = env.unwrapped.ale.getFrameNumber  # type: ignore[attr-defined]
    counts = set()
    for _ in range(20):
        before = counter()
        env.step(0)
        counts.add(counter() - before)
    return counts


@pytest.mark.parametrize(
    ("env_id", "frame_skip", "probability"),
    [
        ("ALE/Pong-v5", 4, 0.25),
        ("PongNoFrameskip-v4", 4, 0.0),
        ("PongNoFrameskip-v0", 2, 0.25),
        ("Pong-v4", 2, 0.0),
    ],
)
def test_no_id_skips_twice_and_its_sticky_actions_stay(env_id: str, frame_skip: int, probability: float) -> None:
    env = make_atari_env(env_id, frame_skip=frame_skip)
    assert frames_per_step(env) == {frame_skip}
    assert env.unwrapped.ale.getFloat("repeat_action_probability") == probability  # type: ignore[attr-defined]


def test_a_game_with_lives_ends_for_the_learner_at_each_and_is_counted_once() -> None:
    env = make_atari_env("BreakoutNoFrameskip-v4")
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    ends, learner_steps, score, episode = 0, 0, 0.0, None
    clipped = make_atari_env("BreakoutNoFrameskip-v4", clip_reward=False)
    clipped.reset(seed=0)
    while episode is None:
        action = int(rng.integers(4))
        _, reward, terminated, truncated, info = env.step(action)
        _, points, *_ = clipped.step(action)
        assert reward == np.sign(float(points))
        score += float(points)
        learner_steps += 1
        assert not truncated
        if terminated:
            ends += 1
            episode = info.get("episode")
            assert (episode is None) == (ends < 5), "a game of Breakout has five lives"
            if episode is None:
                env.reset()
                clipped.reset()
    # Besides the learner's own steps: FIRE and one more button per life, and a no-op after each of four lost lives.
    assert episode == {"r": score, "l": learner_steps + 5 * 2 + 4}


def test_without_episodic_life_only_the_end_of_the_game_ends_the_episode() -> None:
    env = make_atari_env("SpaceInvadersNoFrameskip-v4", episodic_life=False)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    lives = set()
    terminated = False
    while not terminated:
        _, _, terminated, _, info = env.step(int(rng.integers(6)))
        lives.add(info["lives"])
    assert lives == {0, 1, 2, 3}
    assert "episode" in info


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["BreakoutNoFrameskip-v4", "ALE/Breakout-v5"])
def test_a_game_of_half_an_hour_is_cut_not_over(env_id: str) -> None:
    env = make_atari_env(env_id, episodic_life=False, noop_max=0)
    env.reset(seed=0)
    # Without FIRE after the first lost life, Breakout waits for ever: here most of the time, without preprocessing.
    emulator = env.unwrapped.ale  # type: ignore[attr-defined]
    waited = 25_000 * 4
    for _ in range(waited):
        emulator.act(0)
    steps = 0
    terminated = truncated = False
    while not (terminated or truncated):
        _, _, terminated, truncated, info = env.step(0)
        steps += 1
    assert (terminated, truncated) == (False, True)
    assert info["episode_frame_number"] == 108_000
    assert info["episode"]["l"] == 27_000 - waited // 4 == steps + 2  # FIRE and one more button


@pytest.mark.parametrize("env_id", ["CartPole-v1", "ALE/Pang-v5", "PongInBytes-v0"])
def test_other_ids_are_refused(env_id: str) -> None:
    gym.register("PongInBytes-v0", "ale_py.env:AtariEnv", kwargs={"game": "pong", "obs_type": "ram"})
    assert not is_atari(env_id)
    with pytest.raises(ConfigError, match="--env-id must be an Atari game"):
        make_atari_env(env_id)


@pytest.mark.parametrize(
    ("env_id", "registered"),
    [
        ("PongNoFrameskip-v4", "PongNoFrameskip-v4"),
        ("PongNoFrameskip", "PongNoFrameskip-v4"),
        ("ALE/Pong", "ALE/Pong-v5"),
        ("ale_py:ALE/Pong-v5", "ALE/Pong-v5"),
    ],
)
def test_every_spelling_of_a_games_id_is_preprocessed(env_id: str, registered: str) -> None:
    assert registered_id(env_id) == registered
    assert make_env(env_id).observation_space.shape == (4, 84, 84)


def test_the_number_of_frames_is_passed_on() -> None:
    assert make_atari_env("PongNoFrameskip-v4", frame_stack=2).observation_space.shape == (2, 84, 84)


def test_a_cut_is_a_cut_with_all_preprocessing_and_a_new_game_follows() -> None:
    env = make_atari_env("BreakoutNoFrameskip-v4")
    emulator = env.unwrapped.ale  # type: ignore[attr-defined]
    emulator.setInt("max_num_frames_per_episode", 400)
    env.reset(seed=0)  # a seeded reset loads the game anew, with the new limit
    rng = np.random.default_rng(0)
    ends: list[tuple[bool, bool, bool]] = []
    while not ends or not ends[-1][1]:
        *_, terminated, truncated, info = env.step(int(rng.integers(4)))
        if terminated or truncated:
            ends.append((terminated, truncated, "episode" in info))
            if not truncated:
                env.reset()
    assert ends[-1] == (False, True, True)
    assert emulator.getEpisodeFrameNumber() == 400
    env.reset()
    assert emulator.getEpisodeFrameNumber() < 100
