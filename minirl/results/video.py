"""Games as videos: played, drawn and written to `.mp4` or `.gif` files, during training and after."""

import contextlib
import io
import itertools
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

# Pillow comes with tensorboard, which can't log a picture without it. OpenCV's own GIF writer is no substitute: in
# version 5.0 the colours of Pong are off by up to 78 of 255, in a file twenty times the size.
from PIL import Image

from minirl.checks import ConfigError, described
from minirl.distributed import broadcast_from_rank_0
from minirl.envs.episode import statistics_of
from minirl.envs.guard import Guard
from minirl.envs.ids import is_atari
from minirl.envs.make import env_options, make_env
from minirl.results.play import Policy
from minirl.runs.checkpoints import atomic_file, untouched_random_state
from minirl.runs.events import picture_summary
from minirl.runs.run import Run
from minirl.streams import Stream, derived_seed

LONGEST_VIDEO = 3_000  # agent steps, more than three minutes of an Atari game: some policies never end a game
ATARI_STEPS_PER_SECOND = 15.0  # 60 frames, 4 per agent step
DEFAULT_STEPS_PER_SECOND = 30.0  # for environments that do not say how fast they are
GIF_PICTURES_PER_SECOND = 25  # at most: many viewers slow down pictures shown for less than 20 ms

Picture = NDArray[np.uint8]  # (H, W, 3), red first


def record_game(
    policy: Policy, env_id: str, seed: int, path: Path, *, stopped: Callable[[], bool] = lambda: False, **shown: Any
) -> bool:
    """Play a game and write it, in colour and at its own speed, to an `.mp4` or `.gif` file.

    Args:
        policy: the policy that plays.
        env_id: the environment.
        seed: of the game.
        path: the file; its suffix says which kind.
        stopped: called after each step; once it returns True, the video ends.
        shown: for `make_env`.

    Returns:
        Whether the game came to its end, within `LONGEST_VIDEO` agent steps.

    Raises:
        ConfigError: if the environment can't be drawn, or the file can't be written.
    """
    write, flag = write_gif if path.suffix == ".gif" else write_mp4, "--video"
    with contextlib.closing(make_drawn_env(env_id, flag, **shown)) as env:
        game = play_and_draw(policy, env, seed, flag, stopped)
        try:
            write(path, itertools.islice(game, 1 + LONGEST_VIDEO), steps_per_second(env_id))  # 1 before the first step
        except OSError as error:
            raise ConfigError(f"{flag} must be a file that can be written, and {path} can't: {error}") from error
        return next(game, None) is None


def make_drawn_env(env_id: str, flag: str, **shown: Any) -> gym.Env[Any, Any]:
    """Make an environment whose `render` returns pictures; `shown` is for `make_env`.

    Raises:
        ConfigError: naming `flag`, if it can't be drawn.
    """
    require_render_mode(env_id, flag, "rgb_array")
    return make_env(env_id, render_mode="rgb_array", **shown)


def require_render_mode(env_id: str, flag: str, *modes: str) -> None:
    """Raise a ConfigError, naming `flag`, if an environment has none of these render modes."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # pygame greets on standard output, where results go
    with contextlib.closing(make_env(env_id)) as env:
        if not set(modes) & set(env.metadata.get("render_modes", [])):
            raise ConfigError(f"{flag} needs an environment that can be drawn, and {env_id} can't")


def steps_per_second(env_id: str) -> float:
    """Return the speed of a game, in agent steps."""
    if is_atari(env_id):
        return ATARI_STEPS_PER_SECOND
    with contextlib.closing(make_env(env_id)) as env:
        return float(env.metadata.get("render_fps") or DEFAULT_STEPS_PER_SECOND)


def play_and_draw(
    policy: Policy, env: gym.Env[Any, Any], seed: int, flag: str, stopped: Callable[[], bool]
) -> Iterator[Picture]:
    """Play one whole game; yield its picture at the start and after each agent step.

    Raises:
        ConfigError: naming `flag`, if it can't be drawn, or its pictures differ in size.
    """
    guard, statistics = Guard(env), statistics_of(env)
    assert statistics is not None
    obs, _ = guard.reset(seed=seed)
    first = draw(guard, flag)
    yield first
    while not statistics.finished and not stopped():
        obs, _, terminated, truncated, _ = guard.step(policy(np.asarray(obs)[None])[0])
        if (terminated or truncated) and not statistics.finished:
            obs, _ = guard.reset()  # a life was lost; the game goes on
        picture = draw(guard, flag)
        if picture.shape != first.shape:  # no file can hold them
            sizes = f"the first is {first.shape[:2]}, a later one {picture.shape[:2]}"
            raise ConfigError(f"{flag} needs an environment whose pictures keep their size: {sizes}")
        yield picture


def draw(env: Guard, flag: str) -> Picture:
    """Return a picture of the environment (H, W, 3).

    Raises:
        ConfigError: naming `flag`, if it can't be drawn, for example because a package for that is missing.
        EnvError: if it raises.
    """
    try:
        picture = env.render()
    except gym.error.Error as error:
        raise ConfigError(f"{flag} needs an environment that can be drawn: {described(error)}") from error
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.shape[2:] != (3,):
        raise ConfigError(f"{flag} needs an environment that can be drawn: `render` gives no bytes of shape (H, W, 3)")
    return picture


def write_mp4(path: Path, pictures: Iterator[Picture], per_second: float) -> None:
    """Write pictures as MPEG-4 video.

    Raises:
        OSError: if that fails.
    """
    # OpenCV takes some file names for addresses, crashes at others and does not report a full disk: it writes under a
    # plain name, and Python copies the file if it can be read again.
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "game.mp4"
        written = _encode_mp4(plain, pictures, per_second)
        capture = cv2.VideoCapture(str(plain))
        if (read := sum(1 for _ in iter(capture.grab, False))) != written:
            raise OSError(f"of {written} pictures that were written, {read} can be read again")
        with atomic_file(path) as temporary:
            shutil.copyfile(plain, temporary)


def _encode_mp4(path: Path, pictures: Iterator[Picture], per_second: float) -> int:
    """Write pictures with OpenCV, and return how many."""
    first = next(pictures)
    height, width = first.shape[:2]
    odd_row, odd_column = height % 2, width % 2  # are doubled: the codec takes only even sizes
    size = (width + odd_column, height + odd_row)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), per_second, size)
    number = 0
    try:
        if not writer.isOpened():
            raise OSError("OpenCV can't open it")
        for picture in itertools.chain([first], pictures):
            even = cv2.copyMakeBorder(picture, 0, odd_row, 0, odd_column, cv2.BORDER_REPLICATE)
            writer.write(cv2.cvtColor(even, cv2.COLOR_RGB2BGR))
            number += 1
    finally:
        writer.release()
    return number


def write_gif(path: Path, pictures: Iterable[Picture], per_second: float) -> None:
    """Write pictures as an animated GIF that repeats for ever.

    For games faster than `GIF_PICTURES_PER_SECOND`, only every second or third picture is shown, for longer.

    Raises:
        OSError: if that fails.
    """
    every = math.ceil(per_second / GIF_PICTURES_PER_SECOND)
    images = gif_images(itertools.islice(pictures, 0, None, every), per_second / every)
    content = io.BytesIO()  # Python writes it to the disk, as its errors say what is wrong with that
    next(images).save(content, format="GIF", save_all=True, append_images=images, loop=0)
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.getvalue())


def gif_images(pictures: Iterable[Picture], per_second: float) -> Iterator[Image.Image]:
    """Yield pictures with their palettes and durations, multiples of 10 ms that are right on average."""
    for i, picture in enumerate(pictures):
        image = with_palette(picture)
        start, end = (int(100 * number / per_second) for number in (i, i + 1))
        image.info["duration"] = 10 * (end - start)
        yield image


def with_palette(picture: Picture) -> Image.Image:
    """Return a picture of at most 256 colours: its own if there are no more, otherwise those that fit best."""
    image = Image.fromarray(picture)
    colours: Any = image.getcolors(256)  # [(how often, (r, g, b)), ...], or None if there are more
    if colours is None:
        return image.convert("P", palette=Image.Palette.ADAPTIVE)
    # Pillow would do this by itself, in ten times the time. Colours that are almost the same may become one.
    palette = Image.new("P", (1, 1))
    palette.putpalette(bytes(itertools.chain.from_iterable(sorted(colour for _, colour in colours))))
    return image.quantize(palette=palette, dither=Image.Dither.NONE)


class Videos:
    """Records a game at intervals during training, and changes nothing in the training.

    The policy plays a new game without exploration, for at most `LONGEST_VIDEO` agent steps. The video goes to the run
    directory, as `videos/step-000100352.gif`, named after the agent step, and to TensorBoard, as the image
    `videos/game`.

    Args:
        config: the settings; `env_id`, `seed` and `video_frequency` (agent steps, None for never) are read here.
        run_dir: where to write; None to record nothing.
        first_step: how many agent steps earlier sessions did.
        one_hot: as in `make_env`.

    Raises:
        ConfigError: if the environment can't be drawn.
    """

    def __init__(self, config: Any, run_dir: Path | None, first_step: int, *, one_hot: bool = True) -> None:
        self.config = config
        self.shown = {**env_options(vars(config)), "one_hot": one_hot}
        self.folder = None if run_dir is None or config.video_frequency is None else run_dir / "videos"
        self.last_step = first_step
        if self.folder is not None:
            flag = "--video-frequency"
            with untouched_random_state(), contextlib.closing(make_drawn_env(config.env_id, flag)) as env:
                guard = Guard(env)
                guard.reset()
                draw(guard, flag)

    def record(self, run: Run, global_step: int, policy: Policy) -> None:
        """Record a game if one is due; Ctrl-C cuts it short. A failure only warns: no video is worth the run."""
        if self.folder is None:
            return
        before, self.last_step = self.last_step, global_step
        if global_step // self.config.video_frequency > before // self.config.video_frequency:
            broadcast_from_rank_0(lambda: self._record(run, global_step, policy))

    def _record(self, run: Run, global_step: int, policy: Policy) -> None:
        assert self.folder is not None
        path = self.folder / f"step-{global_step:09}.gif"
        env_id, seed = self.config.env_id, derived_seed(self.config.seed, Stream.VIDEO, global_step)
        with run.paused(), untouched_random_state():
            try:
                self.folder.mkdir(exist_ok=True)
                record_game(policy, env_id, seed, path, stopped=lambda: run.stop_signal is not None, **self.shown)
                log_gif(run, global_step, path)
            except Exception as error:
                warnings.warn(f"the game of agent step {global_step:,} is not recorded: {error}", stacklevel=2)


def log_gif(run: Run, global_step: int, path: Path) -> None:
    """Show a GIF among TensorBoard's images. `SummaryWriter.add_video` would need moviepy."""
    assert run.events is not None
    run.events.add(picture_summary("videos/game", path.read_bytes()), global_step)
