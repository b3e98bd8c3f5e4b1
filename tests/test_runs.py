"""Checkpoints, signals, progress and what goes to TensorBoard."""

import collections
import contextlib
import errno
import functools
import io
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minirl.checks import ConfigError
from minirl.envs.vector import Episode
from minirl.ppo import PPOConfig
from minirl.runs.checkpoints import (
    CHECKPOINT_FILE,
    DivergedError,
    atomic_file,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from minirl.runs.directory import claim, default_run_dir
from minirl.runs.events import Events
from minirl.runs.progress import Progress
from minirl.runs.run import Run, Stopped, seed_everything

ROOT = Path(__file__).parents[1]
CONFIG = PPOConfig(checkpoint_frequency=30)
COMMON = {"algorithm": "ppo", "global_step": 0, "returns": [], "best_return": 0.0, "seconds": 0.0, "random_state": {}}


class Bomb:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_one_function_seeds_every_generator() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    seed_everything(1)
    first = draw()
    seed_everything(1)
    assert draw() == first
    seed_everything(2)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


@pytest.mark.parametrize("saved", [0, 1, 2, 3])
def test_random_states_of_as_many_gpus_as_there_are_come_back(saved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    put_back: dict[int, str] = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: put_back.update({device: state}))
    set_random_state({"random_state": {**random_state(), "cuda": ["a", "b", "c"][:saved]}})
    assert put_back == dict(zip(range(2), ["a", "b", "c"][:saved], strict=False))


def test_random_states_are_put_back() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.normal()), float(torch.rand(()))  # noqa: NPY002

    draw()
    state = random_state()
    first = [draw(), draw()]
    set_random_state({"random_state": state})
    assert [draw(), draw()] == first


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {**COMMON, "model": {"weight": torch.arange(3.0)}, "returns": [1.0, -2.5], "global_step": 7}
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    loaded = load_checkpoint(tmp_path, "ppo")
    assert torch.equal(loaded["model"].pop("weight"), state["model"].pop("weight"))  # type: ignore[attr-defined]
    assert loaded == {**state, "path": str(tmp_path / "checkpoint.pt")}
    load_checkpoint(tmp_path, "ppo", "model")
    with pytest.raises(ConfigError, match=r"checkpoint\.pt must be a whole checkpoint, and has no optimizer, wings"):
        load_checkpoint(tmp_path, "ppo", "model", "wings", "optimizer")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {**COMMON, "global_step": 1})
    with pytest.raises(OSError, match="full"), atomic_file(path) as temporary:
        temporary.write_bytes(b"half of a check")
        assert temporary.parent == tmp_path, "moving across file systems is not atomic"
        raise OSError("disk full")
    assert load_checkpoint(tmp_path, "ppo")["global_step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: events.append("flush"))
    replace = os.replace

    def spy(*paths: Path) -> None:
        events.append("replace")
        replace(*paths)

    monkeypatch.setattr(os, "replace", spy)
    save_checkpoint(tmp_path / "checkpoint.pt", {})
    assert events == ["flush", "replace"]


def test_a_file_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"algorithm": "ppo", "bomb": Bomb(tmp_path / "exploded")}, tmp_path / "checkpoint.pt")
    with pytest.raises(ConfigError, match="must be a checkpoint that minirl wrote"):
        load_checkpoint(tmp_path, "ppo")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [{"algorithm": "dqn"}, {}, [1, 2]])
def test_another_algorithms_checkpoint_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(ConfigError, match="must be a checkpoint of ppo, and is not"):
        load_checkpoint(tmp_path, "ppo")


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"algorithm": "ppo", "weights": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"checkpoint\.pt must be a checkpoint that minirl wrote, and can't be read"):
        load_checkpoint(tmp_path, "ppo")


def saved_steps(tmp_path: Path, steps: range) -> list[int]:
    """The steps at which a run of these steps saves."""
    saves: list[int] = []

    def state(step: int) -> dict[str, Any]:
        saves.append(step)
        return {}

    with Run("ppo", CONFIG, tmp_path / "run", total=100) as run:
        for step in steps:
            run.checkpoint(step, functools.partial(state, step), finished=step == 100)
    return saves


def test_checkpoints_come_at_the_start_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    assert saved_steps(tmp_path, range(0, 101, 10)) == [0, 30, 60, 90, 100]
    saved = load_checkpoint(tmp_path / "run", "ppo")
    assert saved["global_step"] == 100


def test_a_frequency_between_updates_saves_at_the_next_one(tmp_path: Path) -> None:
    assert saved_steps(tmp_path, range(0, 101, 25)) == [0, 50, 100]


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_stops(tmp_path: Path, number: signal.Signals) -> None:
    handlers = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(KeyboardInterrupt) as stop, Run("ppo", CONFIG, tmp_path / "run", total=100) as run:
        run.checkpoint(0, lambda: {"episodes": 0})
        signal.raise_signal(number)
        if number == signal.SIGHUP:
            signal.raise_signal(number)  # by the shell, and by the system
        run.checkpoint(1, lambda: {"episodes": 1})
    if number == signal.SIGINT:
        assert stop.type is KeyboardInterrupt  # or Python would end somebody's script with status 1, not 130
    else:
        assert isinstance(stop.value, Stopped)
        assert stop.value.number == number
    assert load_checkpoint(tmp_path / "run", "ppo")["episodes"] == 1
    assert [signal.getsignal(n) for n in SIGNALS] == handlers


def test_with_nohup_a_terminal_that_is_closed_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Run("ppo", CONFIG, None, total=100) as run:
            signal.raise_signal(signal.SIGHUP)
            run.checkpoint(5, dict)
    finally:
        signal.signal(signal.SIGHUP, before)


class Signalling(io.RawIOBase):
    """A stream that is hit by a signal in the middle of a line of progress."""

    def __init__(self) -> None:
        self.written = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if b" of 100 steps" in bytes(data):
            signal.raise_signal(signal.SIGTERM)
        self.written += bytes(data)
        return len(data)


def test_a_signal_in_the_middle_of_a_line_saves_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Signalling()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(stream), line_buffering=True))
    with pytest.raises(Stopped) as stop, Run("ppo", CONFIG, tmp_path / "run", total=100) as run:
        run.log(100, {})  # the last line is always said
        run.checkpoint(100, dict)
    assert stop.value.number == signal.SIGTERM
    assert load_checkpoint(tmp_path / "run", "ppo")["global_step"] == 100
    assert b"100 of 100 steps" in stream.written, "the line itself came through"


def test_ctrl_c_after_nobody_listens_any_more_is_the_first_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        with pytest.raises(KeyboardInterrupt) as stop, contextlib.ExitStack() as stack:
            with monkeypatch.context() as patch:  # while there still was somebody
                patch.setattr(sys, "stderr", io.StringIO())
                run = stack.enter_context(Run("ppo", CONFIG, tmp_path / "run", total=100))
            run.progress.stream = broken
            run.log(100, {})
            signal.raise_signal(signal.SIGINT)
            run.checkpoint(100, dict)
        print("to nowhere", file=broken, flush=True)
    assert stop.type is KeyboardInterrupt
    assert load_checkpoint(tmp_path / "run", "ppo")["global_step"] == 100


def test_a_signal_after_the_last_update_lets_the_run_end_well(tmp_path: Path) -> None:
    with Run("ppo", CONFIG, tmp_path / "run", total=100) as run:
        signal.raise_signal(signal.SIGINT)
        run.checkpoint(100, dict, finished=True)
    assert load_checkpoint(tmp_path / "run", "ppo")["global_step"] == 100


def test_a_directory_that_cannot_be_looked_into_is_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, *args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(ConfigError, match="--run-dir must be a directory that can be written"):
        Run("ppo", CONFIG, Path("secret"), total=100)


def test_speed_and_minutes_are_logged_and_pauses_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("minirl.runs.run.time.monotonic", lambda: now[0])
    with Run("ppo", CONFIG, tmp_path / "run", total=100) as run:
        now[0] = 120.0
        run.log(60, {})
        run.checkpoint(60, dict)
    now[0] = 9000.0
    saved = load_checkpoint(tmp_path / "run", "ppo")
    assert saved["seconds"] == 120.0
    with Run("ppo", CONFIG, tmp_path / "run", total=100, done=60, resumed=saved) as run:
        now[0] += 20.0
        run.log(100, {})
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [event.value for event in events.Scalars("charts/SPS")] == [0.5, 2.0]
    assert [event.value for event in events.Scalars("charts/minutes")] == pytest.approx([2.0, 140 / 60])


def test_one_directory_is_one_runs(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        tries = [pool.submit(claim, tmp_path / "run") for _ in range(8)]
    failures = [str(attempt.exception()) for attempt in tries if attempt.exception() is not None]
    assert len(failures) == 7
    assert all("it has no checkpoint yet: if it has been stopped, remove" in failure for failure in failures)
    (tmp_path / "run" / CHECKPOINT_FILE).touch()
    with pytest.raises(ConfigError, match="continue it with --resume"):
        claim(tmp_path / "run")


def test_a_default_directory_is_never_taken_and_goes_if_nothing_came_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minirl.runs.directory.time.strftime", lambda format: "20260102-030405")
    config = PPOConfig(env_id="ALE/Pong-v5")
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        tries = [pool.submit(stack.enter_context, default_run_dir("ppo", config)) for _ in range(8)]
        chosen = sorted(attempt.result() for attempt in tries)
        names = ["seed42", *(f"seed42-{number}" for number in range(2, 9))]
        assert chosen == [tmp_path / Path("runs/ppo/ALE-Pong-v5") / f"20260102-030405-{name}" for name in names]
        for run_dir in chosen[:3]:
            claim(run_dir)
    assert sorted(path.parent for path in tmp_path.rglob("config.json")) == chosen[:3]
    assert sorted((tmp_path / "runs/ppo/ALE-Pong-v5").iterdir()) == chosen[:3]
    with default_run_dir("dqn", config):
        pass
    assert not Path("runs/dqn").exists()


def test_events_are_on_the_disk_before_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def logged() -> int:
        events = EventAccumulator(str(tmp_path / "run"))
        events.Reload()
        return len(events.Scalars("charts/minutes"))

    seen: list[int] = []
    monkeypatch.setattr("minirl.runs.run.save_checkpoint", lambda path, state: seen.append(logged()))
    with Run("ppo", CONFIG, tmp_path / "run", total=100) as run:
        run.log(40, {})
        run.checkpoint(40, dict)
    assert seen == [1]


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Run("ppo", CONFIG, tmp_path / "run", total=100):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_without_a_directory_a_signal_still_stops() -> None:
    with pytest.raises(KeyboardInterrupt), Run("ppo", CONFIG, None, total=100) as run:
        signal.raise_signal(signal.SIGINT)
        run.checkpoint(5, dict)


TESTS = """
import itertools, os, signal, sys
import minirl.q_learning as q_learning

def test_that_trains(tmp_path, monkeypatch):
    count, play_episode = itertools.count(), q_learning.play_episode

    def interrupted(*arguments):
        if next(count) == 5:
            os.kill(os.getpid(), getattr(signal, os.environ["SENT"]))
        return play_episode(*arguments)

    monkeypatch.setattr(q_learning, "play_episode", interrupted)
    q_learning.train(q_learning.QLearningConfig(num_episodes=100), run_dir=tmp_path / "run")

def test_the_next():
    pass
"""


@pytest.mark.parametrize("number", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_a_signal_in_the_middle_of_a_training_test_stops_pytest(number: str, tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(TESTS)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--basetemp", "temporary", "test_mine.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SENT": number},
        capture_output=True,
        text=True,
    )
    assert result.returncode == pytest.ExitCode.INTERRUPTED, result.stdout + result.stderr
    assert "test_that_trains" in result.stdout
    assert "test_the_next" not in result.stdout
    assert load_checkpoint(tmp_path / "temporary/test_that_trains0/run", "q_learning")["episode"] == 6


def test_the_mean_return_is_over_the_last_100_episodes(tmp_path: Path) -> None:
    with Run("ppo", CONFIG, None, total=100) as run:
        run.log_episodes(0, [Episode(0, 1000.0, 1)] * 50 + [Episode(0, 7.0, 1)] * 100)
        assert run._note() == "mean return 7.0 (last 100)"


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_in_a_file_is_plain_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("minirl.runs.progress.time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    with contextlib.closing(Progress(20_000, done=5_000, stream=stream)) as progress:
        for done in range(6_000, 20_001, 1_000):
            clock[0] += 2.0
            progress.update(done, "so far so good")
    assert stream.getvalue().splitlines() == [
        "8,000 of 20,000 steps, 500 a second, 0:00:24 left, so far so good",
        "11,000 of 20,000 steps, 500 a second, 0:00:18 left, so far so good",
        "14,000 of 20,000 steps, 500 a second, 0:00:12 left, so far so good",
        "17,000 of 20,000 steps, 500 a second, 0:00:06 left, so far so good",
        "20,000 of 20,000 steps, 500 a second, 0:00:00 left, so far so good",
    ]


def test_progress_on_a_terminal_is_a_bar() -> None:
    stream = Terminal()
    with contextlib.closing(Progress(10, stream=stream)) as progress:
        progress.update(10, "mean return 3.0")
    assert "\r" in stream.getvalue()
    assert "10/10" in stream.getvalue()
    assert "mean return 3.0" in stream.getvalue()
    assert "steps/s" in stream.getvalue()


# What goes wrong while a run is written


def test_two_processes_never_write_into_one_directory(tmp_path: Path) -> None:
    with Run("ppo", CONFIG, tmp_path / "run", total=100) as run:
        run.checkpoint(0, dict)
        saved = load_checkpoint(tmp_path / "run", "ppo")
        with pytest.raises(ConfigError, match="--resume must name a run that has stopped: another process writes to"):
            Run("ppo", CONFIG, tmp_path / "run", total=100, resumed=saved)
    with Run("ppo", CONFIG, tmp_path / "run", total=100, resumed=saved) as run:
        run.checkpoint(100, dict, finished=True)
    with pytest.raises(ConfigError, match=r"--resume must name a run that has stopped: .*run went on; try again"):
        Run("ppo", CONFIG, tmp_path / "run", total=100, resumed=saved)  # which was read before it went on


@pytest.mark.parametrize("file", ["checkpoint.pt", "best.pt"])
def test_what_is_left_of_another_run_is_not_taken_for_this_ones(file: str, tmp_path: Path) -> None:
    (tmp_path / file).touch()
    with pytest.raises(ConfigError, match=f"--run-dir must be a new directory: .* holds {file} of another run"):
        Run("ppo", CONFIG, tmp_path, total=100)
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_a_file_system_without_locks_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("minirl.runs.directory.fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match=r"run can't be locked, .*No locks available") as seen:
        run = Run("ppo", CONFIG, tmp_path / "run", total=100)
    assert len(seen) == 1
    with run:
        run.checkpoint(0, dict)
    assert load_checkpoint(tmp_path / "run", "ppo")["global_step"] == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_run_that_cannot_be_set_up_leaves_its_directory_free(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    for part in ("lock", "save_config", "Events"):
        with monkeypatch.context() as patch:
            patch.setattr(f"minirl.runs.run.{part}", fail)
            with pytest.raises((ConfigError, KeyboardInterrupt)):
                Run("ppo", CONFIG, tmp_path / "run", total=100)
        assert not list((tmp_path / "run").iterdir())
    with Run("ppo", CONFIG, tmp_path / "run", total=100):
        pass


def test_a_full_disk_is_an_error_that_names_the_file_and_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    with Run("ppo", CONFIG, tmp_path / "run", total=100) as run:
        run.checkpoint(0, dict)
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match=r"checkpoint\.pt can't be written at agent step 50.*No space"):
            run.checkpoint(50, dict)
    assert load_checkpoint(tmp_path / "run", "ppo")["global_step"] == 0
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_run_closes_its_files_does_not_cut_them(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close, closed = Events.close, []

    def struck(events: Events) -> None:
        signal.raise_signal(number)
        close(events)
        closed.append(events)

    monkeypatch.setattr(Events, "close", struck)
    handler = signal.getsignal(number)
    with Run("ppo", CONFIG, tmp_path / "run", total=100):
        pass
    assert len(closed) == 1
    assert signal.getsignal(number) is handler


def test_any_kind_of_dictionary_is_saved_as_a_plain_one(tmp_path: Path) -> None:
    counts = collections.Counter({"a": 3})
    counts["a"] = np.int64(3)  # type: ignore[assignment]
    nested = collections.defaultdict(list, b=[np.zeros(2), None, (np.float32(0.5),)])
    save_checkpoint(tmp_path / "checkpoint.pt", {"counts": counts, "nested": nested})
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["counts"] == {"a": 3}
    assert [type(value) for value in saved.values()] == [dict, dict]
    assert torch.equal(saved["nested"]["b"][0], torch.zeros(2, dtype=torch.float64))
    assert saved["nested"]["b"][1:] == [None, (0.5,)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(bad: float, tmp_path: Path) -> None:
    weights = {"actor.weight": torch.ones(2), "critic.bias": torch.tensor([0.0, bad])}
    with Run("ppo", CONFIG, tmp_path / "run", total=100) as run:
        run.checkpoint(0, dict)
        with pytest.raises(DivergedError, match=r"diverged: critic\.bias not finite at agent step 50"):
            run.checkpoint(50, lambda: {"model": weights})
    assert load_checkpoint(tmp_path / "run", "ppo")["global_step"] == 0


def test_a_disk_that_fills_up_at_the_very_end_is_told_and_hides_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(writer: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minirl.runs.run.Events.close", full)
    run = Run("ppo", CONFIG, tmp_path / "one", total=100)
    with pytest.raises(ConfigError, match=r"one can't be written any more.*No space"), run:
        pass
    with pytest.raises(DivergedError, match="lost"), Run("ppo", CONFIG, tmp_path / "other", total=100):
        raise DivergedError("lost")
