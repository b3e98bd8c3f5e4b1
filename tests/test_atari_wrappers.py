"""Each preprocessing step alone, against the scripted emulator."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from numpy.typing import NDArray

from minirl.envs.atari import (
    ClipReward,
    EpisodicLife,
    FireReset,
    FrameStack,
    Grayscale,
    MaxAndSkip,
    NoopReset,
    Normalize,
    Resize,
    make_atari_env,
)
from minirl.envs.episode import EpisodeStatistics
from tests.fake_atari import SCREEN, FakeAtari


class FixedScreens(FakeAtari):
    """Shows given screens in turn, the first at each reset."""

    def __init__(self, *screens: NDArray[Any], **script: Any) -> None:
        super().__init__(**script)
        self.screens = screens
        kind = screens[0].dtype
        self.observation_space = gym.spaces.Box(0 if kind == np.uint8 else -1, 255, screens[0].shape, kind.type)

    def _screen(self) -> NDArray[Any]:
        return self.screens[self.frame % len(self.screens)]


# NoopReset


def test_noop_reset_draws_1_to_noop_max_frames_and_does_nothing_meanwhile() -> None:
    emulator = FakeAtari()
    env = NoopReset(emulator, noop_max=5)
    env.reset(seed=0)
    counts = []
    for _ in range(200):
        before = len(emulator.actions)
        obs, _ = env.reset()
        counts.append(len(emulator.actions) - before)
        assert emulator.frame == counts[-1]
        assert obs[0, 0, 0] == (emulator.game * 50 + counts[-1]) % 256
    assert set(counts) == {1, 2, 3, 4, 5}
    assert set(emulator.actions) == {0}


def test_noop_reset_is_the_same_for_the_same_seed_only() -> None:
    def frames(seed: int) -> list[int]:
        emulator = FakeAtari()
        env = NoopReset(emulator, noop_max=30)
        env.reset(seed=seed)
        result = [emulator.frame]
        for _ in range(5):
            env.reset()
            result.append(emulator.frame)
        return result

    assert frames(3) == frames(3)
    assert frames(3) != frames(4)


@pytest.mark.parametrize("seed", [0, 1, 3])  # 26, 15 and 25 presses
def test_noop_reset_starts_again_when_the_game_ends_meanwhile_and_keeps_what_was_paid(seed: int) -> None:
    emulator = FakeAtari(ends_at=3, rewards={1: 5.0, 2: 7.0})
    env = NoopReset(emulator, noop_max=30)
    env.reset(seed=seed)
    presses = len(emulator.actions)
    assert presses > 3, "the seed must press beyond the end"
    assert emulator.seeds == [seed] + [None] * (presses // 3), "only the first reset is seeded"
    assert emulator.frame == presses % 3
    assert env.reset_reward == {0: 0.0, 1: 5.0, 2: 12.0}[presses % 3]


# MaxAndSkip


def test_max_and_skip_repeats_the_action_sums_rewards_and_takes_the_maximum_of_the_last_two_frames() -> None:
    screens = [np.zeros(SCREEN, np.uint8) for _ in range(5)]
    screens[1][:] = 255  # frames 1 and 2 of the four must not be seen
    screens[2][:] = 254
    screens[3][0] = 7
    screens[4][1] = 9
    emulator = FixedScreens(*screens, rewards={1: 1.0, 2: 10.0, 3: 100.0, 4: 1000.0, 5: 5.0})
    env = MaxAndSkip(emulator)
    env.reset()
    obs, reward, terminated, truncated, _ = env.step(3)
    assert emulator.actions == [3, 3, 3, 3]
    assert reward == 1111.0
    assert not terminated
    assert not truncated
    np.testing.assert_array_equal(obs[0], 7)
    np.testing.assert_array_equal(obs[1], 9)
    np.testing.assert_array_equal(obs[2:], 0)


@pytest.mark.parametrize(("skip", "expected"), [(1, 1), (2, 2), (3, 3)])
def test_max_and_skip_with_other_skips_shows_the_newest_frames(skip: int, expected: int) -> None:
    env = MaxAndSkip(FakeAtari(), skip=skip)
    env.reset()
    obs, *_ = env.step(0)
    np.testing.assert_array_equal(obs, expected)


def test_max_and_skip_of_one_frame_is_that_frame_below_zero_too() -> None:
    env = MaxAndSkip(FixedScreens(np.full((2, 2), -0.5, np.float32)), skip=1)
    env.reset()
    np.testing.assert_array_equal(env.step(0)[0], -0.5)


@pytest.mark.parametrize("ends_at", [5, 6, 7])
def test_max_and_skip_stops_at_an_end_inside_the_skip(ends_at: int) -> None:
    emulator = FakeAtari(ends_at=ends_at, rewards={5: 1.0, 6: 10.0, 7: 100.0, 8: 1000.0})
    env = MaxAndSkip(emulator)
    env.reset()
    env.step(0)
    obs, reward, terminated, truncated, _ = env.step(0)
    assert emulator.frame == ends_at
    assert (terminated, truncated) == (True, False)
    assert reward == {5: 1.0, 6: 11.0, 7: 111.0}[ends_at]
    np.testing.assert_array_equal(obs, {5: 4, 6: 4, 7: 7}[ends_at])  # frames of the step before, but for the 3rd


def test_max_and_skip_reports_a_cut_as_a_cut() -> None:
    env = MaxAndSkip(FakeAtari(cut_at=2))
    env.reset()
    assert env.step(0)[2:4] == (False, True)


# EpisodicLife


def test_episodic_life_ends_the_episode_but_not_the_game() -> None:
    emulator = FakeAtari(lives=3, life_lost_at=(2, 5, 8), ends_at=8)
    env = EpisodicLife(emulator)
    env.reset()
    ends = []
    for _ in range(6):
        obs, _, terminated, _, _ = env.step(2)
        if terminated:
            ends.append(int(obs[0, 0, 0]))
            env.reset()
    # Lives are lost at frames 2 and 5; each reset plays one no-op, frames 3 and 6; the game ends at 8.
    assert ends == [2, 5, 8]
    assert emulator.actions == [2, 2, 0, 2, 2, 0, 2, 2]
    assert emulator.game == 1, "only the end of the game resets it"
    assert emulator.frame == 0


def test_episodic_life_does_not_report_zero_lives_twice_nor_a_life_won() -> None:
    env = EpisodicLife(FakeAtari(lives=1, life_won_at=(1,), life_lost_at=(3, 5), ends_at=7))
    env.reset()
    assert [env.step(0)[2] for _ in range(4)] == [False, False, True, False]  # won at 1, lost at 3: one left
    assert [env.step(0)[2] for _ in range(3)] == [False, False, True]  # none left at 5, over only at 7


def test_episodic_life_resets_a_game_that_ends_in_the_no_op_and_keeps_its_score() -> None:
    emulator = FakeAtari(lives=2, life_lost_at=(2,), ends_at=3, rewards={3: 4.0})
    env = EpisodicLife(EpisodeStatistics(emulator))
    env.reset()
    env.step(1)
    assert env.step(1)[2]
    obs, info = env.reset()
    assert emulator.game == 1
    np.testing.assert_array_equal(obs, 50)
    assert info["episode"] == {"r": 4.0, "l": 3}


def test_episodic_life_obeys_a_seed_in_the_middle_of_a_game() -> None:
    emulator = FakeAtari(lives=2)
    env = EpisodicLife(emulator)
    env.reset(seed=1)
    env.step(0)
    env.reset(seed=5)
    assert emulator.seeds == [1, 5]


def test_episodic_life_starts_a_new_game_after_a_cut() -> None:
    emulator = FakeAtari(lives=2, cut_at=2)
    env = EpisodicLife(emulator)
    env.reset()
    env.step(1)
    assert env.step(1)[2:4] == (False, True)
    obs, _ = env.reset()
    assert (emulator.game, emulator.frame) == (1, 0)
    np.testing.assert_array_equal(obs, 50)


def test_episodic_life_notices_a_life_lost_in_the_first_step_and_not_one_lost_in_the_no_op() -> None:
    env = EpisodicLife(FakeAtari(lives=4, life_lost_at=(1, 2, 4)))
    env.reset()
    assert env.step(1)[2], "lost at frame 1, right after the reset"
    env.reset()  # the no-op loses another at frame 2
    assert not env.step(1)[2]
    assert env.step(1)[2]


# FireReset


def test_fire_reset_presses_fire_and_the_next_button() -> None:
    emulator = FakeAtari()
    obs, _ = FireReset(emulator).reset()
    assert emulator.actions == [1, 2]
    np.testing.assert_array_equal(obs, 2)


@pytest.mark.parametrize(("ends_at", "game"), [(1, 2), (2, 1)])
def test_fire_reset_resets_when_a_press_ends_the_game(ends_at: int, game: int) -> None:
    emulator = FakeAtari(ends_at=ends_at, rewards={ends_at: 3.0})
    obs, info = FireReset(EpisodeStatistics(emulator)).reset()
    assert (emulator.game, emulator.frame) == (game, 0), "where the first frame ends games, both presses do"
    np.testing.assert_array_equal(obs, game * 50)
    assert info["episode"] == {"r": 3.0, "l": ends_at}


def test_fire_reset_keeps_the_score_of_a_game_that_ended_in_the_reset_below() -> None:
    env = FireReset(EpisodicLife(EpisodeStatistics(FakeAtari(lives=2, life_lost_at=(3,), ends_at=4, rewards={4: 2.0}))))
    env.reset()  # frames 1 and 2 are the presses
    assert env.step(3)[2]
    _, info = env.reset()  # the no-op of the next life, frame 4, ends the game
    assert info["episode"] == {"r": 2.0, "l": 4}


def test_fire_reset_refuses_a_game_without_fire() -> None:
    with pytest.raises(ValueError, match="FIRE"):
        FireReset(FakeAtari(meanings=("NOOP", "UP", "DOWN")))


@pytest.mark.parametrize(
    ("env_id", "wrapped"), [("PongNoFrameskip-v4", True), ("FreewayNoFrameskip-v4", False), ("ALE/Qbert-v5", True)]
)
def test_fire_is_pressed_only_where_the_game_has_it(env_id: str, wrapped: bool) -> None:
    env: Any = make_atari_env(env_id)
    layers = []
    while isinstance(env, gym.Wrapper):
        layers.append(type(env))
        env = env.env
    assert (FireReset in layers) == wrapped
    assert ("FIRE" in env.get_action_meanings()) == wrapped


# Grayscale, Resize, ClipReward, Normalize


def test_grayscale_weighs_colours_by_luminance() -> None:
    screen = np.zeros((1, 5, 3), np.uint8)
    screen[0] = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (10, 200, 30)]
    env = Grayscale(FixedScreens(screen))
    obs, _ = env.reset()
    # 0.299 R + 0.587 G + 0.114 B: 76.2, 149.7, 29.1, 255, 2.99 + 117.4 + 3.42 = 123.8
    assert obs.tolist() == [[76, 150, 29, 255, 124]]
    assert env.observation_space == gym.spaces.Box(0, 255, (1, 5), np.uint8)


def test_resize_takes_the_mean_of_each_area() -> None:
    screen = np.zeros((6, 6), np.uint8)
    screen[0, :3], screen[:3, 3:], screen[5, 0], screen[3:, 3:] = 90, 7, 45, np.arange(9).reshape(3, 3)
    env = Resize(FixedScreens(screen), size=2)
    obs, _ = env.reset()
    assert obs.tolist() == [[30, 7], [5, 4]]
    assert env.observation_space == gym.spaces.Box(0, 255, (2, 2), np.uint8)


def test_resize_to_84_whatever_the_screen_and_keeps_colours() -> None:
    env = Resize(FixedScreens(np.full((210, 160, 3), 9, np.uint8)))
    obs, _ = env.reset()
    assert obs.shape == (84, 84, 3) == env.observation_space.shape
    np.testing.assert_array_equal(obs, 9)


def test_wrappers_show_what_they_say_whatever_the_order() -> None:
    screen = np.full((210, 160, 3), 51, np.uint8)
    floats = Resize(Grayscale(Normalize(FixedScreens(screen))), size=42)
    one_channel = Resize(FixedScreens(screen[..., :1]), size=42)
    for env, shape, value in ((floats, (42, 42), 0.2), (one_channel, (42, 42, 1), 51)):
        obs, _ = env.reset()
        assert obs in env.observation_space
        assert obs.shape == shape
        np.testing.assert_allclose(obs, value, rtol=1e-6)


@pytest.mark.parametrize(("reward", "clipped"), [(30.0, 1.0), (0.25, 1.0), (0.0, 0.0), (-0.5, -1.0), (-7.0, -1.0)])
def test_clip_reward_keeps_the_sign(reward: float, clipped: float) -> None:
    env = ClipReward(FakeAtari(rewards={1: reward}))
    env.reset()
    assert env.step(0)[1] == clipped


def test_normalize_divides_by_255_in_float32() -> None:
    env = Normalize(FixedScreens(np.array([[0, 51, 255]], np.uint8)))
    obs, _ = env.reset()
    assert obs.dtype == np.float32
    np.testing.assert_allclose(obs, [[0.0, 0.2, 1.0]], rtol=1e-7)
    assert env.observation_space == gym.spaces.Box(0.0, 1.0, (1, 3), np.float32)


# FrameStack


def test_frame_stack_starts_as_copies_and_drops_the_oldest() -> None:
    emulator = FakeAtari()
    env = FrameStack(emulator, num_frames=4)
    first, _ = env.reset()
    assert env.observation_space == gym.spaces.Box(0, 255, (4, *SCREEN), np.uint8)
    seen = [first, *(env.step(0)[0] for _ in range(5))]
    newest_last = [obs[:, 0, 0, 0].tolist() for obs in seen]
    assert newest_last == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]
    again, _ = env.reset()
    np.testing.assert_array_equal(again, 50)
    again[:] = 0
    stepped = env.step(0)[0]
    np.testing.assert_array_equal(stepped[:3], 50, "what was shown may be changed")
    stepped[:] = 0
    np.testing.assert_array_equal(env.step(0)[0][:2], 50)


# EpisodeStatistics


def test_episode_statistics_count_whole_games_unclipped() -> None:
    emulator = FakeAtari(lives=2, life_lost_at=(4,), ends_at=12, rewards={2: 5.0, 6: -3.0, 9: 7.0})
    env = ClipReward(EpisodicLife(EpisodeStatistics(MaxAndSkip(emulator))))
    env.reset()
    _, reward, terminated, _, info = env.step(0)
    assert terminated
    assert reward == 1.0
    assert "episode" not in info, "a lost life is not the end of the game"
    env.reset()  # one agent step of no-op: frames 5 to 8
    _, _, terminated, _, info = env.step(0)
    assert terminated
    assert info["episode"] == {"r": 9.0, "l": 3}


@pytest.mark.parametrize("end", [{"ends_at": 2}, {"cut_at": 2}])
def test_a_score_has_in_it_what_the_no_ops_were_paid(end: dict[str, Any]) -> None:
    env = EpisodeStatistics(NoopReset(FakeAtari(rewards={1: 5.0, 2: 7.0}, **end), noop_max=1))
    env.reset(seed=0)
    assert env.step(0)[4]["episode"] == {"r": 12.0, "l": 1}


@pytest.mark.parametrize(
    "make",
    [
        lambda env: NoopReset(env, noop_max=0),
        lambda env: MaxAndSkip(env, skip=0),
        lambda env: Resize(env, size=0),
        lambda env: FrameStack(env, num_frames=0),
    ],
)
def test_sizes_below_1_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        make(FakeAtari())
