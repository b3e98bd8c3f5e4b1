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
from pathlib import Path

import pytest

from minirl.runs.checkpoints import load_checkpoint
from tests.test_resume import ROOT, assert_same

EDITS = sorted(path.parent for path in ROOT.glob("edits/*/*.patch"))
PATIENCE = 3_600  # seconds; each line of flags.args is compiled three times
SHORT = 600  # agent steps of a training that is not compiled: to see that it can be
# Runs command lines in one process: loading PyTorch takes longer than most of them. If an agent step is given, the last
# command kills itself past it, so that the moment is the same on a busy machine.
IN_TURN = """
import os, runpy, signal, sys
from minirl.runs.run import Run

def killed(run, global_step, *arguments, **options):
    if global_step > int(step):
        os.kill(os.getpid(), signal.SIGKILL)
    checkpoint(run, global_step, *arguments, **options)

step, *lines = sys.argv[1:]
checkpoint = Run.checkpoint
for line in lines:
    if step and line is lines[-1]:
        Run.checkpoint = killed
    sys.argv = line.split()
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
edits = pytest.mark.parametrize("edit", EDITS, ids=[path.name for path in EDITS])


def environment(copy: Path) -> dict[str, str]:
    # git must see no repository above the copy: it would silently apply nothing.
    return {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "GIT_CEILING_DIRECTORIES": str(copy.parent)}


def run(copy: Path, *command: str, status: int = 0) -> str:
    """Run a command in the copy, which ends with a status, and return its output."""
    result = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True)
    said = f"{result.stdout[-6000:]}\n{result.stderr[-6000:]}"
    assert result.returncode == status, f"{shlex.join(command)}\nended with status {result.returncode}:\n{said}"
    return result.stdout


def patch_of(edit: Path) -> Path:
    return edit / f"{edit.name}.patch"


def added_lines(edit: Path) -> dict[str, int]:
    """Return how many lines the patch adds to each file."""
    said = run(edit, "git", "apply", "--numstat", str(patch_of(edit))).splitlines()
    return {path: int(added) for added, _, path in (line.split("\t") for line in said)}


def step_of(run_dir: Path, algorithm: str) -> int:
    """Return the agent step of the run's checkpoint."""
    return int(load_checkpoint(run_dir, algorithm)["global_step"])


def train_kill_resume_evaluate(copy: Path, lines: list[str]) -> None:
    """Do that with each line of `flags.args`: the runs up to the kill in one process, the rest in another."""
    algorithms = [line.split(" ")[0][len("train_") : -len(".py")] for line in lines]
    python = [sys.executable, "-W", "error:compilation", "-c", IN_TURN]  # a failed compilation is an error here
    afterwards = []
    for number, (line, algorithm) in enumerate(zip(lines, algorithms, strict=True)):
        command = f"{line} --device cpu --final-games 0"
        total = int(re.findall(r"--total-timesteps (\d+)", line)[0])
        kill_past = total * 3 // 8
        run(
            copy,
            *python,
            str(kill_past),
            f"{command} --no-compile --total-timesteps {min(total, SHORT)} --run-dir {number}-plain",
            f"{command} --compile --run-dir {number}-alone",
            f"{command} --compile --run-dir {number}-killed",
            status=-signal.SIGKILL,
        )
        saved = step_of(copy / f"{number}-killed", algorithm)
        assert 0 < saved <= kill_past, "flags.args needs a smaller --checkpoint-frequency"
        afterwards.append(f"{line.split()[0]} --resume {number}-killed --device cpu --final-games 0")
        afterwards.append(f"minirl/evaluate/__main__.py {number}-killed --episodes 2 --json --device cpu")
    said = run(copy, *python, "", *afterwards).splitlines()
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
