"""Kills in the middle of writing, disks that are full, directories that can't be written: no checkpoint is lost."""

import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minirl.checks import ConfigError
from minirl.q_learning import QLearningConfig, train
from minirl.runs import progress
from minirl.runs.checkpoints import load_checkpoint
from minirl.runs.run import Run
from tests.test_resume import ROOT, assert_same

resource = pytest.importorskip("resource")  # Windows has no limits of this kind
DQN = "--total-timesteps 2000 --buffer-size 400 --batch-size 16 --learning-starts 100 --checkpoint-frequency 100"

# Runs a script in a process that kills itself at a moment of its eleventh atomic write: half of the file written, all
# of it but not flushed, flushed but not yet in its place, in its place. Memory files and checkpoints take turns.
SUICIDE = """
import os, runpy, signal, sys
from pathlib import Path

moment, sys.argv = sys.argv[1], sys.argv[2:]
replace, fsync, left = os.replace, os.fsync, [11]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def counted_fsync(file):
    left[0] -= 1
    if left[0] == 0 and moment == "half":
        os.ftruncate(file, os.fstat(file).st_size // 2)
        die()
    if left[0] == 0 and moment == "whole":
        die()
    fsync(file)
    if left[0] == 0 and moment == "flushed":
        die()

def counted_replace(source, target):
    replace(source, target)
    if left[0] == 0 and moment == "placed":
        die()

os.fsync, os.replace = counted_fsync, counted_replace
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(None, 141), (signal.SIGINT, 130)])
def test_when_nobody_reads_standard_error_any_more_a_run_saves_and_stops(
    number: signal.Signals | None, status: int, tmp_path: Path
) -> None:
    """For example, `tee` is ended by the same Ctrl-C just before, or ends by itself."""
    settings = "--num-episodes 10000000 --checkpoint-frequency 1000000000"
    script = [sys.executable, "train_q.py", *settings.split(), "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(script, cwd=ROOT, stderr=subprocess.PIPE)
    assert process.stderr is not None
    while b" of 10,000,000 episodes" not in process.stderr.readline():
        assert process.poll() is None
    process.stderr.close()
    if number is not None:
        process.send_signal(number)
    assert process.wait() == status
    assert load_checkpoint(tmp_path / "run", "q_learning")["global_step"] > 0


@pytest.mark.slow
def test_a_full_standard_error_saves_and_stops_a_run_and_nothing_else(tmp_path: Path) -> None:
    def status(command: str) -> tuple[int, str]:
        line = f"{shlex.quote(sys.executable)} {command} 2>/dev/full"
        result = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
        return result.returncode, result.stdout

    run_dir = shlex.quote(str(tmp_path / "run"))
    assert status(f"train_q.py --num-episodes 100 --run-dir {run_dir}") == (141, "")
    assert load_checkpoint(tmp_path / "run", "q_learning")["global_step"] == 0
    assert status(f"train_q.py --resume {run_dir}") == (141, "")
    assert status("train_q.py --gamma 3") == (2, "")
    code, table = status(f"-m minirl.evaluate {run_dir} --episodes 3 --json")
    assert code == 0
    assert '"episodes": 3' in table
    assert status(f"-m minirl.plots {run_dir} --kind q-values")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("streams", "status"), [("2>&-", 0), (">&- 2>&-", 0), (">/dev/full", 2)])
def test_streams_that_are_closed_or_full_end_in_no_traceback(streams: str, status: int, tmp_path: Path) -> None:
    for command in ("train_q.py --num-episodes 100 --run-dir", "-m minirl.evaluate"):
        line = f"{shlex.quote(sys.executable)} {command} {shlex.quote(str(tmp_path / 'run'))} {streams}"
        result = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == status, result.stderr
        assert load_checkpoint(tmp_path / "run", "q_learning")["global_step"] > 0
        assert "Traceback" not in result.stderr
        if status:
            error = result.stderr.splitlines()[-1]
            assert error.startswith("error: standard output must take the result, and can't be written: ")


class Full(io.StringIO):
    """A stream to a disk that is full."""

    def fileno(self) -> int:
        return 1

    def flush(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_stream_that_is_closed_leads_nowhere_and_a_full_one_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same within this process, whose own streams are left alone."""
    silenced: list[int] = []
    monkeypatch.setattr(progress, "silence", silenced.append)
    monkeypatch.setattr(sys, "stderr", None)
    progress.open_streams()
    assert sys.stderr is not None
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(ConfigError, match=r"^standard output must take the result, and can't be written: .*No space"):
        progress.answer("21")
    assert silenced == [2, 1]


def test_letters_that_an_encoding_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    progress.open_streams()
    progress.answer("a caf\u00e9")
    assert written.getvalue() == b"a caf\\xe9\n"


@pytest.mark.slow
def test_sigkill_in_the_middle_of_a_write(tmp_path: Path) -> None:
    script = [sys.executable, "train_dqn.py", "--device", "cpu"]
    settings = [*DQN.split(), "--eval-frequency", "none"]
    subprocess.run([*script, *settings, "--run-dir", str(tmp_path / "alone")], cwd=ROOT, check=True)
    run_dir = tmp_path / "killed"
    arguments = [*settings, "--run-dir", str(run_dir)]
    steps = []
    for moment in ("half", "placed", "whole", "flushed"):
        command = [sys.executable, "-c", SUICIDE, moment, "train_dqn.py", "--device", "cpu", *arguments]
        assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
        steps.append(load_checkpoint(run_dir, "dqn")["global_step"])
        arguments = ["--resume", str(run_dir)]
    assert 0 < steps[0] < steps[1] < steps[2] < steps[3] < 2000
    subprocess.run([*script, *arguments], cwd=ROOT, check=True)
    assert_same(load_checkpoint(tmp_path / "alone", "dqn"), load_checkpoint(run_dir, "dqn"))
    assert not list(run_dir.glob(".*")), "what a killed write left is gone"


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "file"), [(25_000, ""), (10_000, "checkpoint.pt ")])
def test_a_full_disk_ends_a_run_in_one_line(limit: int, file: str, tmp_path: Path) -> None:
    """A limit on the size of files simulates the disk; the events of this run take 32 kB, a checkpoint 20."""
    command = [sys.executable, "train_q.py", "--run-dir", str(tmp_path / "run"), "--num-episodes", "20000"]
    result = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 2
    # The disk is full when TensorBoard's thread finds it so: the training may have shown its progress by then.
    others = ("run directory: ", "20,000 of 20,000 episodes")
    errors = [line for line in result.stderr.splitlines() if not line.startswith(others)]
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("error: ")
    assert str(tmp_path / "run") in errors[0]
    assert errors[0].endswith("File too large")
    assert f"{file}can't be written" in errors[0].replace("run/", "")
    if not file:  # room is made, and the run goes on
        subprocess.run([*command[:2], "--resume", str(tmp_path / "run")], cwd=ROOT, check=True)


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Root can write everywhere: for a while, this process is nobody."""
    for parent in [directory, *directory.parents[: len(directory.parents) - 2]]:
        parent.chmod(0o755)
    directory.chmod(0o555)
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if was == 0:
            os.seteuid(0)
        directory.chmod(0o755)


def test_a_read_only_directory_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    config = QLearningConfig(num_episodes=20)
    with read_only(tmp_path), pytest.raises(ConfigError, match=r"--run-dir must be a directory that can be written"):
        train(config, run_dir=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_becomes_read_only_keeps_its_checkpoint(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = QLearningConfig(num_episodes=20, checkpoint_frequency=50)
    with Run("q_learning", config, run_dir, total=100) as run:
        run.checkpoint(0, dict)
        with read_only(run_dir), pytest.raises(ConfigError, match=r"run/checkpoint\.pt can't be written at agent step"):
            run.checkpoint(50, dict)
    saved = load_checkpoint(run_dir, "q_learning")
    assert saved["global_step"] == 0
    with read_only(run_dir), pytest.raises(ConfigError, match=r"run must be a directory that can be written"):
        Run("q_learning", config, run_dir, total=100, resumed=saved)
    assert (run_dir / "config.json").stat().st_size > 0
