"""The gallery of research edits: each patch is applied to a copy, then tested, trained, killed, resumed, evaluated."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minirl.checks import ConfigError
from minirl.runs.checkpoints import load_checkpoint
from tests.test_resume import ROOT, assert_same

EDITS = sorted(path.parent for path in ROOT.glob("edits/*/*.patch"))
PATIENCE = 3_600  # seconds; each line of flags.args is compiled three times
# Runs command lines in turn: to load PyTorch takes longer than most of them.
IN_TURN = """
import runpy, sys

for line in sys.argv[1:]:
    sys.argv = line.split()
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
edits = pytest.mark.parametrize("edit", EDITS, ids=[path.name for path in EDITS])


def environment(copy: Path) -> dict[str, str]:
    # Above the copy git must see no repository: it would apply nothing, and say nothing.
    return {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "GIT_CEILING_DIRECTORIES": str(copy.parent)}


def run(copy: Path, *command: str) -> str:
    """Run a command in the copy, and return its output."""
    result = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True)
    said = f"{result.stdout[-6000:]}\n{result.stderr[-6000:]}"
    assert result.returncode == 0, f"{shlex.join(command)}\nended with status {result.returncode}:\n{said}"
    return result.stdout


def patch_of(edit: Path) -> Path:
    return edit / f"{edit.name}.patch"


def added_lines(edit: Path) -> dict[str, int]:
    """Return how many lines the patch adds to each file."""
    said = run(edit, "git", "apply", "--numstat", str(patch_of(edit))).splitlines()
    return {path: int(added) for added, _, path in (line.split("\t") for line in said)}


def step_of(run_dir: Path, algorithm: str) -> int:
    """Return the agent step of the run's checkpoint, -1 while there is none."""
    try:
        return int(load_checkpoint(run_dir, algorithm)["global_step"])
    except ConfigError:
        return -1


def kill_after(copy: Path, command: list[str], run_dir: Path, algorithm: str, step: int) -> None:
    """Start a training, wait until its checkpoint is past an agent step, and kill it."""
    with (copy / "killed.txt").open("w+") as output:
        process = subprocess.Popen(command, cwd=copy, env=environment(copy), stdout=output, stderr=subprocess.STDOUT)
        try:
            while step_of(run_dir, algorithm) <= step and process.poll() is None:
                time.sleep(0.002)
        finally:
            process.kill()
            status = process.wait()
        said = (copy / "killed.txt").read_text()[-6000:]
    assert status == -signal.SIGKILL, (
        f"{shlex.join(command)}\nended with status {status} before it could be killed past agent step {step} "
        f"(0: flags.args needs more --total-timesteps):\n{said}"
    )


def train_kill_resume_evaluate(copy: Path, lines: list[str]) -> None:
    """Do that with each line of `flags.args`: the trainings that are left alone in one process, and what follows."""
    commands = [f"{line} --device cpu --final-games 0" for line in lines]
    algorithms = [line.split(" ")[0][len("train_") : -len(".py")] for line in lines]
    python = [sys.executable, "-W", "error:compilation"]  # one that fails is an error here
    alone = [
        f"{command} {choice} --run-dir {number}-{name}"
        for number, command in enumerate(commands)
        for choice, name in (("--no-compile", "plain"), ("--compile", "alone"))
    ]
    run(copy, *python, "-c", IN_TURN, *alone)

    for number, (command, algorithm) in enumerate(zip(commands, algorithms, strict=True)):
        last_step, killed = step_of(copy / f"{number}-alone", algorithm), copy / f"{number}-killed"
        start = [*python, *command.split(), "--compile", "--run-dir", killed.name]
        kill_after(copy, start, killed, algorithm, last_step // 4)
        assert step_of(killed, algorithm) < last_step, "it was killed too late: it needs more --total-timesteps"

    afterwards = []
    for number, line in enumerate(lines):
        afterwards.append(f"{line.split()[0]} --resume {number}-killed --device cpu --final-games 0")
        afterwards.append(f"minirl/evaluate/__main__.py {number}-killed --episodes 2 --json --device cpu")
    said = run(copy, *python, "-c", IN_TURN, *afterwards).splitlines()
    for number, algorithm in enumerate(algorithms):
        one, other = (load_checkpoint(copy / f"{number}-{name}", algorithm) for name in ("alone", "killed"))
        assert_same(one, other)
    assert len(said) == len(lines), said
    for result in said:
        returns = json.loads(result)["returns"]
        assert len(returns) == 2, f"two games have two returns, not {returns}"
        assert all(math.isfinite(number) for number in returns), f"returns are finite, not {returns}"


@pytest.mark.slow
@edits
def test_an_edit_holds(edit: Path, tmp_path: Path) -> None:
    signal.alarm(PATIENCE)
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copytree(ROOT / "minirl", copy / "minirl", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("train_*.py"), edit / "test_maths.py"]:
        shutil.copy(path, copy)

    files = added_lines(edit)
    assert 1 <= len(files) <= 2, f"an edit is of one or two files, not of {sorted(files)}"
    assert all(path.startswith("minirl/") for path in files), f"an edit is of files of minirl/, not of {sorted(files)}"
    run(copy, "git", "apply", str(patch_of(edit)))

    (copy / "pytest.ini").write_text("[pytest]\n")  # the repository's own settings are none of its business
    run(copy, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_maths.py")

    train_kill_resume_evaluate(copy, (edit / "flags.args").read_text().splitlines())


@edits
def test_its_page_says_what_it_is(edit: Path) -> None:
    page, added = (edit / "README.md").read_text(), sum(added_lines(edit).values())
    assert re.search(rf"\b{added}\s+lines?\b", page), f"{edit.name}'s README.md must say: it adds {added} lines"
    assert re.search(r"https://(arxiv|doi|www\.nature)\.\S+\w", page), f"{edit.name}'s README.md must link its paper"
    assert f"git apply edits/{edit.name}/{edit.name}.patch" in page, f"{edit.name}'s README.md must have its command"
    assert "python train_" in page, f"{edit.name}'s README.md must have the command that trains it"
