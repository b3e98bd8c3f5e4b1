"""Recorded games: a video shows what was drawn, at the right speed, and recording does not change training."""

import dataclasses
import itertools
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

from minirl import dqn, ppo, q_learning
from minirl.checks import ConfigError
from minirl.envs.gridworld import GridWorld
from minirl.evaluate import evaluate
from minirl.results import video, window
from minirl.results.video import Picture, make_drawn_env, play_and_draw, record_game, write_gif, write_mp4
from minirl.results.window import at_game_speed, open_window
from minirl.runs.checkpoints import State, load_checkpoint
from minirl.runs.directory import save_config
from minirl.runs.run import Run
from minirl.scripts.train import resumed_config, run_training
from minirl.streams import Stream, derived_seed
from tests.fake_envs import Drawn
from tests.scalars import read_scalars
from tests.test_resume import DQN_CARTPOLE, PPO_CARTPOLE, PPO_PONG, assert_same, train_with_kills

DRAWN = "tests.fake_envs:Drawn-v0"
PPO = dataclasses.replace(PPO_CARTPOLE, env_id=DRAWN, total_timesteps=1024, video_frequency=512)
DQN = dataclasses.replace(DQN_CARTPOLE, env_id=DRAWN, total_timesteps=600, video_frequency=200)
Q = q_learning.QLearningConfig(num_episodes=300, checkpoint_frequency=50, video_frequency=1000)
RUNS: list[tuple[str, Any, Any]] = [
    ("ppo", ppo.train, PPO),
    ("dqn", dqn.train, DQN),
    ("q_learning", q_learning.train, Q),
]


def stripes(number: int, height: int = 40, width: int = 60) -> list[Picture]:
    """Pictures of three colours each, no two alike."""
    pictures = np.zeros((number, height, width, 3), np.uint8)
    pictures[:, :, :20] = 230, 40, 10
    pictures[:, :, 20:40] = 20, 60, 200
    for i, picture in enumerate(pictures):
        picture[:, 40:] = 5 * i, 255 - 5 * i, 128
    return list(pictures)


def read_mp4(path: Path) -> tuple[list[Picture], float]:
    """Return the pictures of a file and how many there are per second."""
    capture = cv2.VideoCapture(str(path))
    pictures: list[Any] = []
    readable, picture = capture.read()
    while readable:
        pictures.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
        readable, picture = capture.read()
    return pictures, capture.get(cv2.CAP_PROP_FPS)


def read_gif(path: Path) -> tuple[list[Picture], list[int]]:
    """Return the pictures of a file and for how many milliseconds each is shown."""
    readable, animation = cv2.imreadanimation(str(path))
    assert readable
    pictures: list[Any] = [cv2.cvtColor(frame[..., :3], cv2.COLOR_BGR2RGB) for frame in animation.frames]
    return pictures, [int(duration) for duration in animation.durations]


def shown_at(path: Path, seconds: list[float]) -> list[Picture]:
    """Return what a GIF shows at some moments."""
    pictures, durations = read_gif(path)
    ends = np.cumsum(durations) / 1000
    return [pictures[int(np.searchsorted(ends, moment, side="right"))] for moment in seconds]


def greedy_game(algorithm: str, learned: Any, config: Any, global_step: int) -> list[Picture]:
    policy: Any = {
        "ppo": lambda obs: ppo.choose_actions(learned, obs),
        "dqn": lambda obs: dqn.greedy_actions(learned, torch.device("cpu"), obs),
        "q_learning": lambda obs: q_learning.greedy_actions(learned, obs),
    }[algorithm]
    env = make_drawn_env(config.env_id, "--video", one_hot=algorithm != "q_learning")
    seed = derived_seed(config.seed, Stream.VIDEO, global_step)
    return list(play_and_draw(policy, env, seed, "--video", lambda: False))


def assert_same_end(tmp_path: Path, algorithm: str, one: str, other: str) -> State:
    """Check that two runs ended with the same checkpoint, random states included, and return it."""
    checkpoint = load_checkpoint(tmp_path / one, algorithm)
    assert_same(checkpoint, load_checkpoint(tmp_path / other, algorithm))
    return checkpoint


# Files


@pytest.mark.parametrize(("height", "width"), [(40, 60), (41, 61)])
def test_an_mp4_shows_what_was_drawn(height: int, width: int, tmp_path: Path) -> None:
    drawn = stripes(30, height, width)
    write_mp4(tmp_path / "a.mp4", iter(drawn), 15.0)
    seen, per_second = read_mp4(tmp_path / "a.mp4")
    assert per_second == pytest.approx(15.0)
    assert len(seen) == 30
    for one, other in zip(seen, drawn, strict=True):
        assert one.shape == (height + height % 2, width + width % 2, 3)
        middles = np.abs(one[5:35, [10, 30, 52]].astype(int) - other[5:35, [10, 30, 52]])  # edges are soft
        assert middles.max() < 25


@pytest.mark.parametrize("per_second", [4.0, 15.0, 25.0])
def test_a_gif_shows_what_was_drawn_when_it_was(per_second: float, tmp_path: Path) -> None:
    drawn = stripes(31)
    drawn.insert(7, drawn[6])  # may become one picture, shown for twice as long
    write_gif(tmp_path / "a.gif", drawn, per_second)
    seen = shown_at(tmp_path / "a.gif", [(i + 0.5) / per_second for i in range(32)])
    assert all(np.array_equal(*pair) for pair in zip(seen, drawn, strict=True))
    assert sum(read_gif(tmp_path / "a.gif")[1]) == pytest.approx(32_000 / per_second, abs=10)


@pytest.mark.parametrize(("per_second", "every"), [(30.0, 2), (50.0, 2), (60.0, 3), (100.0, 4)])
def test_a_gif_of_a_fast_game_skips_pictures_and_keeps_its_speed(per_second: float, every: int, tmp_path: Path) -> None:
    drawn = stripes(48)
    write_gif(tmp_path / "a.gif", drawn, per_second)
    seen, durations = read_gif(tmp_path / "a.gif")
    assert all(np.array_equal(*pair) for pair in zip(seen, drawn[::every], strict=True))
    assert min(durations) >= 40, "many viewers slow down what is shown for less than 20 ms"
    assert sum(durations) == pytest.approx(48_000 / per_second, abs=10)


def test_a_gif_of_many_colours_is_close(tmp_path: Path) -> None:
    row = np.linspace(0, 255, 64).astype(np.uint8)
    picture = np.stack([*np.meshgrid(row, row), np.full((64, 64), 90, np.uint8)], axis=-1)  # 4,096 colours
    write_gif(tmp_path / "a.gif", [picture, picture[::-1]], 5.0)
    for one, other in zip(read_gif(tmp_path / "a.gif")[0], [picture, picture[::-1]], strict=True):
        error = np.abs(one.astype(int) - other)
        assert error.mean() < 6
        assert error.max() < 40


@pytest.mark.parametrize("ending", ["gif", "mp4"])
def test_a_game_that_does_not_end_is_cut(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def always_1(obs: NDArray[Any]) -> NDArray[np.int64]:
        return np.ones(len(obs), np.int64)

    monkeypatch.setattr(video, "LONGEST_VIDEO", 20)
    path = tmp_path / f"a.{ending}"
    assert not record_game(always_1, "tests.fake_envs:DrawnForEver-v0", 0, path)
    pictures = (read_mp4 if ending == "mp4" else read_gif)(path)[0]
    assert len(pictures) == 21
    assert record_game(always_1, DRAWN, 0, path), "20 steps, drawn after the picture before the first, are a whole game"
    assert len((read_mp4 if ending == "mp4" else read_gif)(path)[0]) == 21


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    for name in ("a.gif", "a.mp4"):
        (tmp_path / name).mkdir()
        with pytest.raises(ConfigError, match=r"--video must be a file that can be written, and .* can't"):
            record_game(lambda obs: np.zeros(1, np.int64), DRAWN, 0, tmp_path / name)


def first_action(obs: NDArray[Any]) -> NDArray[np.int64]:
    return np.zeros(len(obs), np.int64)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of files are POSIX's")
@pytest.mark.parametrize("ending", ["gif", "mp4"])
def test_a_video_that_has_no_room_is_an_error_and_no_file(ending: str, tmp_path: Path) -> None:
    import resource

    path = tmp_path / f"a.{ending}"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))  # bytes; as a disk that becomes full
    try:
        with pytest.raises(ConfigError, match=r"--video must be a file that can be written, and .* can't"):
            record_game(first_action, DRAWN, 0, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ["gif", "mp4"])
def test_pictures_that_change_their_size_are_an_error(ending: str, tmp_path: Path) -> None:
    message = r"--video needs an environment whose pictures keep their size: .* \(35, 51\), .* \(36, 51\)"
    with pytest.raises(ConfigError, match=message):
        record_game(first_action, "tests.fake_envs:Growing-v0", 0, tmp_path / f"a.{ending}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["pong-12:30.mp4", "%d.mp4", os.fsdecode(b"\xff/a.mp4")])
def test_a_video_may_have_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    assert record_game(first_action, DRAWN, 0, Path(name))
    copy = Path(name).rename(tmp_path / "copy.mp4")
    assert len(read_mp4(copy)[0]) == 21


# During training


@pytest.mark.parametrize(("algorithm", "train", "config"), RUNS)
def test_videos_change_nothing(algorithm: str, train: Any, config: Any, tmp_path: Path) -> None:
    train(config, run_dir=tmp_path / "with", device="cpu")
    train(dataclasses.replace(config, video_frequency=None), run_dir=tmp_path / "without", device="cpu")
    end = assert_same_end(tmp_path, algorithm, "with", "without")
    assert not (tmp_path / "without" / "videos").exists()
    frequency = config.video_frequency
    steps = [int(path.stem.removeprefix("step-")) for path in sorted((tmp_path / "with" / "videos").iterdir())]
    assert [step // frequency for step in steps] == list(range(1, end["global_step"] // frequency + 1))
    assert all(step % frequency < 100 for step in steps), "as soon as it is due"


@pytest.mark.slow
def test_videos_of_pong_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "LONGEST_VIDEO", 20)
    config = dataclasses.replace(PPO_PONG, total_timesteps=144, video_frequency=48, num_workers=1)
    ppo.train(config, run_dir=tmp_path / "with", device="cpu")
    ppo.train(dataclasses.replace(config, video_frequency=None), run_dir=tmp_path / "without", device="cpu")
    assert_same_end(tmp_path, "ppo", "with", "without")
    files = sorted((tmp_path / "with" / "videos").iterdir())
    assert [file.name for file in files] == ["step-000000048.gif", "step-000000096.gif", "step-000000144.gif"]
    pictures, _ = read_gif(files[0])
    assert pictures[0].shape == (210, 160, 3)
    assert pictures[0][100, 80].tolist() == [144, 72, 17], "the colour of Pong's table"


@pytest.mark.parametrize(("algorithm", "train", "config"), RUNS)
def test_a_video_is_the_greedy_game_of_its_moment_and_tensorboard_has_it(
    algorithm: str, train: Any, config: Any, tmp_path: Path
) -> None:
    if algorithm == "q_learning":  # it ends with an episode, at whichever step that is
        train(config, run_dir=tmp_path / "before", device="cpu")
        last_step = load_checkpoint(tmp_path / "before", algorithm)["global_step"]
        config = dataclasses.replace(config, video_frequency=last_step)
    learned = train(config, run_dir=tmp_path / "run", device="cpu")
    *_, last = sorted((tmp_path / "run" / "videos").iterdir())
    last_step = load_checkpoint(tmp_path / "run", algorithm)["global_step"]
    assert last.name == f"step-{last_step:09}.gif"
    expected = greedy_game(algorithm, learned, config, last_step)
    speed = 4 if algorithm == "q_learning" else 15
    seen = shown_at(last, [(i + 0.5) / speed for i in range(len(expected))])
    assert all(np.array_equal(*pair) for pair in zip(seen, expected, strict=True))

    events = EventAccumulator(str(tmp_path / "run"), size_guidance={IMAGES: 0}).Reload()
    image = events.Images("videos/game")[-1]
    assert (image.step, image.encoded_image_string) == (last_step, last.read_bytes())
    assert (image.height, image.width) == expected[0].shape[:2]


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "train", "config"), RUNS)
def test_a_killed_run_with_videos_ends_as_one_left_alone(
    algorithm: str, train: Any, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config, run_dir=tmp_path / "alone", device="cpu")
    kills = {"ppo": [4, 1], "dqn": [201, 150], "q_learning": [150, 100]}[algorithm]
    train_with_kills(train, config, tmp_path / "killed", kills, monkeypatch)
    assert_same_end(tmp_path, algorithm, "alone", "killed")
    alone, killed = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "videos").iterdir()}
        for name in ("alone", "killed")
    )
    assert alone == killed


def test_ctrl_c_cuts_a_recording_short_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = itertools.count()
    draw = video.draw

    def interrupted(env: Any, flag: str) -> Picture:
        if next(drawn) == 5:  # the first was at the start, to see whether it can be drawn
            os.kill(os.getpid(), signal.SIGINT)
        return draw(env, flag)

    monkeypatch.setattr(video, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ppo.train(PPO, run_dir=tmp_path / "run", device="cpu")
    assert load_checkpoint(tmp_path / "run", "ppo")["global_step"] == 512
    assert len(read_gif(tmp_path / "run" / "videos" / "step-000000512.gif")[0]) == 5
    ppo.train(PPO, run_dir=tmp_path / "run", resume=True, device="cpu")
    ppo.train(dataclasses.replace(PPO, video_frequency=None), run_dir=tmp_path / "alone", device="cpu")
    assert_same_end(tmp_path, "ppo", "run", "alone")


def test_a_game_that_cannot_be_recorded_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: Run, global_step: int, path: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(video, "log_gif", fails)
    once = dataclasses.replace(PPO, video_frequency=1024)
    with pytest.warns(UserWarning, match="the game of agent step 1,024 is not recorded: No space left on device"):
        ppo.train(once, run_dir=tmp_path / "run", device="cpu")
    assert load_checkpoint(tmp_path / "run", "ppo")["global_step"] == 1024


def test_an_environment_that_cannot_be_drawn_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pygame", None)
    run_dir = tmp_path / "run"
    for config_class, train, env_id, message in [
        (ppo.PPOConfig, ppo.train, "tests.fake_envs:Counter-v0", "tests.fake_envs:Counter-v0 can't"),
        (dqn.DQNConfig, dqn.train, "CartPole-v1", "drawn: DependencyNotInstalled: pygame is not installed, run"),
        (
            q_learning.QLearningConfig,
            q_learning.train,
            "FrozenLake-v1",
            "drawn: DependencyNotInstalled: pygame is not installed",
        ),
    ]:
        flags = ["--env-id", env_id, "--video-frequency", "100", "--run-dir", str(run_dir)]
        with pytest.raises(SystemExit) as stop:
            run_training("any", config_class, train, "", flags)  # type: ignore[arg-type]
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: --video-frequency needs an environment that can be drawn")
        assert message in error
        assert error.count("\n") == 1
        assert not run_dir.exists()


def test_a_resumed_run_may_be_filmed_more_or_less(tmp_path: Path) -> None:
    save_config(tmp_path, "ppo", PPO)
    assert resumed_config("ppo", ppo.PPOConfig, tmp_path, {"video_frequency": None}).video_frequency is None


def test_without_a_run_directory_nothing_is_recorded_or_asked_for() -> None:
    ppo.train(dataclasses.replace(PPO, env_id="tests.fake_envs:Counter-v0", total_timesteps=512), device="cpu")


def test_recording_is_left_out_of_the_minutes_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("minirl.runs.run.time.monotonic", lambda: now[0])
    with Run("ppo", PPO, tmp_path / "run", total=10) as run:
        now[0] += 60
        with run.paused():
            now[0] += 600
        now[0] += 60
        run.log(240, {})
    for tag in ("charts/minutes", "charts/SPS"):
        ((_, value),) = read_scalars(tmp_path / "run")[tag]
        assert value == pytest.approx(2.0)


# After it


def test_ppo_chooses_the_likeliest_action_or_draws_one() -> None:
    torch.manual_seed(0)
    agent = ppo.ActorCritic(gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(3))
    agent.actor.bias = torch.nn.Parameter(torch.tensor([0.5, 0.7, 0.6]))
    obs = np.zeros((3000, 4))
    assert ppo.choose_actions(agent, obs).tolist() == [1] * 3000
    shares = np.bincount(ppo.choose_actions(agent, obs, sample=True)) / 3000
    assert shares == pytest.approx(np.exp([0.5, 0.7, 0.6]) / np.exp([0.5, 0.7, 0.6]).sum(), abs=0.03)


@pytest.mark.parametrize(("algorithm", "train", "config"), RUNS)
def test_evaluate_records_the_games_of_every_algorithm(
    algorithm: str, train: Any, config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(dataclasses.replace(config, video_frequency=None), run_dir=tmp_path / "run", device="cpu")
    result = evaluate(tmp_path / "run", episodes=1, video=tmp_path / "a.gif")
    assert result == evaluate(tmp_path / "run", episodes=1, video=tmp_path / "a.mp4")
    length = 4 if algorithm == "q_learning" else 20
    speed = 4 if algorithm == "q_learning" else 15
    seen = shown_at(tmp_path / "a.gif", [(i + 0.5) / speed for i in range(length + 1)])
    filmed, per_second = read_mp4(tmp_path / "a.mp4")
    assert per_second == pytest.approx(speed)
    assert len(filmed) == length + 1
    for one, other in zip(seen, filmed, strict=True):
        height, width = one.shape[:2]
        assert np.abs(one.astype(int) - other[:height, :width]).mean() < 12, "the same game, but for the codec"
    if algorithm == "q_learning":
        start: Any = GridWorld(render_mode="rgb_array").render()
        assert np.array_equal(seen[0], start)
        assert seen[-1][160, 160].tolist() == [220, 60, 50], "the agent is at the goal"
    else:
        assert [picture[0, 0, 0] for picture in seen] == [10 * step for step in range(21)]
    assert "longer game" not in capsys.readouterr().err


def test_evaluate_says_that_a_video_is_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "LONGEST_VIDEO", 3)
    q_learning.train(dataclasses.replace(Q, video_frequency=None), run_dir=tmp_path / "run")
    evaluate(tmp_path / "run", episodes=1, video=tmp_path / "a.gif")
    assert "agent steps of a longer game" in capsys.readouterr().err


def test_the_last_network_is_only_dqns_to_ask_for(tmp_path: Path) -> None:
    for algorithm, train, config in RUNS:
        train(dataclasses.replace(config, video_frequency=None), run_dir=tmp_path / algorithm, device="cpu")
        if algorithm == "dqn":
            evaluate(tmp_path / algorithm, episodes=1, last=True)
        else:
            with pytest.raises(ConfigError, match=f"--last must go with a run of dqn: one of {algorithm} keeps"):
                evaluate(tmp_path / algorithm, episodes=1, last=True)


# In a window


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> list[Picture]:
    """A display with a pygame that keeps what it is shown: the real one is no requirement of these tests."""
    shown: list[Picture] = []

    class Surface:
        def blit(self, picture: Picture, place: tuple[int, int]) -> None:
            shown.append(np.swapaxes(picture, 0, 1).copy())

    class Clock:
        def tick(self, per_second: float) -> None:
            assert per_second == 4

    fake: Any = ModuleType("pygame")
    for name in ("display", "time", "surfarray", "event"):
        setattr(fake, name, ModuleType(name))
    fake.display.init = fake.display.flip = fake.display.quit = fake.quit = fake.event.pump = lambda: None
    fake.display.set_mode = lambda size: Surface()
    fake.time.Clock = Clock
    fake.surfarray.make_surface = lambda picture: picture
    monkeypatch.setitem(sys.modules, "pygame", fake)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    return shown


def test_games_are_played_in_a_window_one_after_the_other(
    tmp_path: Path, screen: list[Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    q_learning.train(dataclasses.replace(Q, video_frequency=None), run_dir=tmp_path / "run")
    waited: list[float] = []
    monkeypatch.setattr("minirl.results.window.time.sleep", waited.append)
    result = evaluate(tmp_path / "run", episodes=2, render=True)
    assert result == evaluate(tmp_path / "run", episodes=2)
    at_start, *_, at_goal = evaluate_pictures(tmp_path)
    starts = [np.array_equal(picture, at_start) for picture in screen]
    goals = [np.array_equal(picture, at_goal) for picture in screen]
    # To see whether a window opens, then two games of four steps, and the start of a third.
    assert starts == [True, *[True, False, False, False, False] * 2, True]
    assert goals == [False, *[False, False, False, False, True] * 2, False]
    assert len(waited) == 8
    assert sum(waited) > 7 * 0.2


def evaluate_pictures(tmp_path: Path) -> list[Picture]:
    evaluate(tmp_path / "run", episodes=1, video=tmp_path / "a.gif")
    return shown_at(tmp_path / "a.gif", [(i + 0.5) / 4 for i in range(5)])


def test_a_policy_waits_for_the_game(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("minirl.results.window.time.monotonic", lambda: now[0])
    monkeypatch.setattr("minirl.results.window.time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    times = []

    def policy(obs: NDArray[Any]) -> NDArray[np.int64]:
        times.append(now[0])
        now[0] += 0.1 if len(times) < 4 else 5.0  # then slower than the game
        return np.zeros(len(obs), np.int64)

    slow = at_game_speed(policy, 2.0)
    for _ in range(6):
        slow(np.zeros((1, 4)))
    assert times == pytest.approx([100.0, 100.5, 101.0, 101.5, 106.5, 111.5])


def test_an_atari_game_opens_its_own_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setenv("SDL_AUDIODRIVER", "dummy")
    env = open_window("PongNoFrameskip-v4")
    assert env.render_mode == "human"
    assert env.step(0)[0].shape == (4, 84, 84)
    env.close()


@pytest.mark.parametrize(
    ("env_id", "display", "message"),
    [
        ("PongNoFrameskip-v4", None, "--render needs a display, and there is none: DISPLAY is not set"),
        ("PongNoFrameskip-v4", "no-such-driver", "--render can't open a window: RuntimeError: Failed to"),
        ("CartPole-v1", "dummy", "--render can't open a window: DependencyNotInstalled: pygame is not"),
        ("minirl/GridWorld-v0", "dummy", "--render can't open a window: DependencyNotInstalled: pygame is not"),
        ("tests.fake_envs:Counter-v0", "dummy", "--render needs an environment that can be drawn"),
    ],
)
def test_no_window(env_id: str, display: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pygame", None)
    for name in (*window.DISPLAY_VARIABLES, "PYGAME_HIDE_SUPPORT_PROMPT"):
        monkeypatch.delenv(name, raising=False)
    if display is not None:
        monkeypatch.setenv("SDL_VIDEODRIVER", display)
    with pytest.raises(ConfigError) as caught:
        open_window(env_id)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert os.environ["PYGAME_HIDE_SUPPORT_PROMPT"], "standard output is for results"


def test_the_fake_environment_draws_what_it_says() -> None:
    env = Drawn(ends_at=3, render_mode="rgb_array")
    env.reset(seed=7)
    env.step(1)
    picture = env.render()
    assert picture[0, [0, 20, 40]].tolist() == [[10, 200, 30], [80, 200, 60], [20, 7, 0]]
