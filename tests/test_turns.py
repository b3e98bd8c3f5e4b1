"""Training runs that share a machine: their turns are fair and never last for ever; and the warning about it."""

import contextlib
import math
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from minirl.dqn import DQNConfig
from minirl.dqn import train as train_dqn
from minirl.fast import machine, turns
from minirl.fast.machine import tuned
from minirl.fast.turns import Turns, seconds_without_core
from minirl.ppo import PPOConfig
from minirl.ppo import train as train_ppo
from minirl.rlhf import RLHFConfig
from minirl.rlhf import train as train_rlhf

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(turns, "available_cores", lambda: 2)
    monkeypatch.setattr(turns, "PATIENCE", 5.0)
    monkeypatch.setattr("minirl.fast.turns.tempfile.gettempdir", lambda: str(tmp_path))


def in_a_thread(work: Any) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_who_waits_comes_next_and_never_two_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TURN", 0.0)
    both, had, at_once = threading.Barrier(3), list[int](), list[int]()
    computing = threading.Lock()

    def training(number: int) -> None:
        both.wait()
        with Turns(2) as mine:
            for _ in range(10):
                mine.pass_on()
                if not computing.acquire(blocking=False):
                    at_once.append(number)
                    continue
                had.append(number)
                time.sleep(0.01)
                computing.release()

    threads = [in_a_thread(lambda number=number: training(number)) for number in range(3)]
    for thread in threads:
        thread.join(timeout=30)
    assert not at_once
    assert len(had) == 30
    assert all(had[i] != had[i + 1] for i in range(3, 20)), f"nobody twice in a row: {had}"


def test_a_turn_lasts_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waits = [0.0], [0]
    monkeypatch.setattr("minirl.fast.turns.time.monotonic", lambda: now[0])
    with Turns(2) as mine:
        monkeypatch.setattr(mine, "_wait", lambda: waits.append(1))
        for now[0], expected in ((0.09, 0), (0.1, 1)):
            mine.pass_on()
            assert sum(waits) == expected


def test_a_few_threads_have_room_beside_others_and_leave_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(turns, "available_cores", lambda: 4)
    with Turns(2), Turns(2), Turns(1):
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(turns, "available_cores", lambda: 1)
    with Turns(1), Turns(1):
        assert list(tmp_path.iterdir()) == []


def test_what_stands_still_is_waited_for_a_while_and_no_longer(tmp_path: Path) -> None:
    with contextlib.ExitStack() as leaving:
        still = leaving.enter_context(Turns(2))
        (turn,) = tmp_path.glob("*.turn")
        assert time.time() - turn.stat().st_mtime < 4, "when the turn began"
        os.utime(turn, (time.time() - 3.5,) * 2)
        began = time.monotonic()
        other = leaving.enter_context(Turns(2))
        assert 1.0 < time.monotonic() - began < 4.5
        other.began = -math.inf
        other.pass_on()
        assert time.monotonic() - began < 4.5, "it is not waited for once more"
        still.began = other.began = -math.inf
        still.pass_on()
        assert time.time() - turn.stat().st_mtime < 4, "it goes on"
        waiting = in_a_thread(other.pass_on)
        waiting.join(timeout=0.2)
        assert waiting.is_alive(), "and is waited for again"
        still.__exit__()
        waiting.join(timeout=10)
        assert not waiting.is_alive()


def test_what_is_killed_holds_nobody_up(tmp_path: Path) -> None:
    code = f"""
import tempfile
import time
from minirl.fast import turns
turns.available_cores, tempfile.tempdir = lambda: 2, {str(tmp_path)!r}
with turns.Turns(2):
    print(flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        waiting = in_a_thread(lambda: Turns(2).__enter__())
        waiting.join(timeout=0.2)
        assert waiting.is_alive()
        other.kill()
    waiting.join(timeout=30)
    assert not waiting.is_alive()


def test_where_no_file_can_be_locked_nobody_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("minirl.fast.turns.tempfile.gettempdir", lambda: str(tmp_path / "missing"))
    with Turns(2) as one, Turns(2):
        one.began = -math.inf
        one.pass_on()

    def no_locks(file: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("minirl.fast.turns.tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("minirl.fast.turns.fcntl.flock", no_locks)
    with Turns(2) as one, Turns(2):
        one.began = -math.inf
        one.pass_on()


def test_each_algorithm_passes_its_turn_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(Turns, "pass_on", lambda self: calls.append(self.threads))
    monkeypatch.setattr(machine, "threads", lambda number: contextlib.nullcontext())  # they would be waited for
    train_ppo(PPOConfig(env_id="CartPole-v1", num_steps=16, minibatch_size=64, total_timesteps=640, num_threads=2))
    assert calls == [2] * 5, "every update"
    train_dqn(DQNConfig(env_id="CartPole-v1", total_timesteps=20, learning_starts=1, batch_size=1, eval_frequency=None))
    assert calls[5:] == [1] * 20, "every step"
    train_rlhf(RLHFConfig(stage="lm", lm_steps=5, num_threads=3))
    assert calls[25:] == [3] * 5, "every batch"


def test_a_gpu_is_shared_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    network = nn.Linear(500, 400)
    with tuned(network, 2):
        assert len(list(tmp_path.iterdir())) == 2
    for file in tmp_path.iterdir():
        file.unlink()
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
    with tuned(network, 2):
        assert list(tmp_path.iterdir()) == []


def test_a_run_that_waits_for_cores_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now, no_core = [1000.0], [7.0]
    monkeypatch.setattr("minirl.fast.turns.time.monotonic", lambda: now[0])
    monkeypatch.setattr(turns, "seconds_without_core", lambda: no_core[0])

    def said(threads: int, waits: list[float], turns_of_others: float = 0.0, each_update: float = 10.0) -> list[str]:
        with warnings.catch_warnings(record=True) as caught, Turns(threads) as mine:
            warnings.simplefilter("always")
            mine.waited = 50.0  # for the first turn: it had not begun
            for each in [0.0, *waits]:
                no_core[0] += each
                mine.waited += turns_of_others
                for _ in range(2):
                    now[0] += each_update
                    mine.pass_on()
        return [str(warning.message) for warning in caught]

    line = "others have this run's cores 30% of the time, and its 2 threads go on together or not at all; "
    line += "--num-threads 1 may be faster, at --resume, too"
    assert said(2, [5.0, 5.0, 5.0]) == [], "a quarter"
    assert said(2, [0.0, 6.0, 9.0, 0.0]) == [line]
    assert said(2, [0.0, 0.0, 0.0], turns_of_others=6.0) == [line]
    assert said(2, [7.0, 7.0, 7.0], each_update=30.0) == [], "of the time that it was, not of 20 seconds"
    assert said(1, [9.0, 9.0, 9.0]) == []


def test_time_without_a_core_is_the_second_number_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: "7000000000 2000000000 3\n")
    assert seconds_without_core() == 2.0
    monkeypatch.setattr(Path, "read_text", lambda path: "")
    assert seconds_without_core() == 0.0

    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert seconds_without_core() == 0.0


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="only Linux counts it")
def test_time_without_a_core_is_that_of_others_on_it() -> None:
    cores = os.sched_getaffinity(0)
    command = [sys.executable, "-c", "print(flush=True)\nwhile 1: 1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            for process in (0, other.pid):
                os.sched_setaffinity(process, {min(cores)})
            before, clock, used = seconds_without_core(), time.monotonic(), time.thread_time()
            while time.monotonic() - clock < 0.3:
                pass
            away = time.monotonic() - clock - (time.thread_time() - used)
            assert 0.05 <= seconds_without_core() - before <= away + 0.05
        finally:
            other.kill()
            os.sched_setaffinity(0, cores)
