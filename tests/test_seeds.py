"""`--seeds`: which seeds are meant, one run for each, a table, and what happens when some fail or all are stopped."""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from minirl import ppo, q_learning
from minirl.checks import ConfigError
from minirl.dqn import DQNConfig
from minirl.evaluate import TRAINING_SCRIPTS
from minirl.ppo import PPOConfig
from minirl.q_learning import QLearningConfig
from minirl.runs.checkpoints import load_checkpoint
from minirl.runs.directory import lock, save_config
from minirl.runs.flags import make_parser
from minirl.runs.seeds import Processes, _say_how_to_go_on, read_seeds, side_by_side, summary, train_seeds
from minirl.scripts.train import run_training

ROOT = Path(__file__).parent.parent


def start(script: str, line: str, directory: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, str(ROOT / script), *line.split()]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=directory, env=environment, start_new_session=True, **pipes)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("3", [3]),
        ("0-4", [0, 1, 2, 3, 4]),
        ("7,0,3", [7, 0, 3]),
        ("0-2,9", [0, 1, 2, 9]),
        ("5-5", [5]),
        ("0-999", list(range(1000))),
    ],
)
def test_seeds_are_read(text: str, seeds: list[int]) -> None:
    assert read_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be seeds as in"),
        ("a", "must be seeds as in"),
        ("-1", "must be seeds as in"),
        ("0-", "must be seeds as in"),
        ("0-4-9", "must be seeds as in"),
        ("0,,1", "must be seeds as in"),
        ("1.5", "must be seeds as in"),
        ("0 - 4", "must be seeds as in"),
        ("\u00b2", "must be seeds as in"),
        ("4-0", "must count up"),
        ("2147483648", "must count up, from 0 to 2147483647"),
        ("0-2147483647", "must be at most 1,000 seeds"),
        ("0-500,600-1200", "must be at most 1,000 seeds"),
        ("0-4,3", "must name each seed once"),
        ("1,1", "must name each seed once"),
    ],
)
def test_what_are_no_seeds(text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        read_seeds(text)


@pytest.mark.slow
def test_each_seed_has_a_run_as_if_it_were_alone(tmp_path: Path) -> None:
    lines = ["--num-episodes 300 --no-anneal-alpha --epsilon 0.2"] * 2
    lines[0] += " --seeds 0-1,5 --run-dir all"
    lines[1] += " --seed 5 --run-dir alone"
    several, alone = [start("train_q.py", line, tmp_path) for line in lines]
    output, progress = several.communicate()
    assert several.returncode == 0, progress
    assert (alone.wait(), sorted(path.name for path in (tmp_path / "all").iterdir())) == (
        0,
        ["seed0", "seed1", "seed5"],
    )
    one, other = (load_checkpoint(tmp_path / name, "q_learning") for name in ("alone", "all/seed5"))
    assert torch.equal(one["q_table"], other["q_table"])
    assert one["returns"] == other["returns"]

    tables = [load_checkpoint(tmp_path / "all" / f"seed{seed}", "q_learning") for seed in (0, 1, 5)]
    means = [sum(table["returns"]) / 100 for table in tables]
    head, *rows, mean, std = output.splitlines()
    assert head.split() == ["seed", "steps", "mean", "of", "the", "last", "100", "returns", "minutes", "directory"]
    for row, seed, table, value in zip(rows, ("0", "1", "5"), tables, means, strict=True):
        assert row.split()[:3] == [seed, f"{table['global_step']:,}", f"{value:.2f}"]
        assert row.split()[4] == str(tmp_path / "all" / f"seed{seed}")
    assert mean.split()[:2] == ["mean", f"{sum(means) / 3:.2f}"]
    variance = sum((value - sum(means) / 3) ** 2 for value in means) / 3
    assert std.split()[:2] == ["std", f"{variance**0.5:.2f}"]

    for row in rows:
        assert f"seed {row.split()[0]}: 300 of 300 episodes, " in progress
    assert "3 of 3 seeds done, 0:00:00 left" in progress
    for text in (output, progress):
        assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text) is None, "no control characters but line ends"


@pytest.mark.slow
def test_a_seed_that_fails_stops_no_other_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "all" / "seed1").mkdir(parents=True)
    (tmp_path / "all" / "seed1" / ".config.json.tmp").mkdir()  # so that its settings can't be written
    process = start("train_q.py", "--num-episodes 50 --seeds 0-2 --run-dir all", tmp_path)
    output, error = process.communicate()
    assert process.returncode == 1
    assert [line.split()[0] for line in output.splitlines()] == ["seed", "0", "2", "mean", "std"]
    assert "seed 1: failed with status" in error
    assert error.splitlines()[-1] == "error: 1 of 3 seeds failed: 1"


@pytest.mark.slow
def test_ctrl_c_saves_every_seed_and_says_how_to_go_on(tmp_path: Path) -> None:
    settings = "--env-id CartPole-v1 --num-steps 16 --minibatch-size 128 --no-compile"
    tmp_path = tmp_path / "of mine"
    tmp_path.mkdir()
    process = start("train_ppo.py", f"{settings} --seeds 0-7 --run-dir all", tmp_path)
    checkpoint = tmp_path / "all" / "seed0" / "checkpoint.pt"
    wait_until_under_way(process, [0])
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: it reaches every process of the group
    output, error = process.communicate()
    assert process.returncode == 130
    assert output == ""
    assert "stopped: 0 of 8 seeds done" in error
    assert f"go on with seed 0: python {ROOT / 'train_ppo.py'} --resume '{checkpoint.parent}'" in error
    assert re.search(r"not begun: --seeds [\d,]*7$", error, re.MULTILINE)
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*.tmp"))
    assert load_checkpoint(tmp_path / "all" / "seed0", "ppo")["global_step"] > 0, "saved when it was stopped"


@pytest.mark.slow
@pytest.mark.parametrize("number", [None, signal.SIGINT, signal.SIGKILL])
def test_when_nobody_listens_any_more_every_seed_saves_and_stops(number: signal.Signals | None, tmp_path: Path) -> None:
    """For example, `tee` has ended, by the same Ctrl-C or by itself, or this process is killed."""
    settings = "--num-episodes 10000000 --checkpoint-frequency 1000000000 --seeds 0-1 --run-dir all"
    process = start("train_q.py", settings, tmp_path)
    wait_until_under_way(process, [0, 1])
    assert process.stderr is not None
    process.stderr.close()
    if number is not None:
        process.send_signal(number)
    process.wait()
    assert process.returncode == {None: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    for seed in (0, 1):
        run_dir = tmp_path / "all" / f"seed{seed}"
        wait_until_stopped(run_dir)
        assert load_checkpoint(run_dir, "q_learning")["global_step"] > 0


def wait_until_under_way(process: subprocess.Popen[str], seeds: list[int]) -> None:
    """Wait until each of these seeds has reported its progress."""
    assert process.stderr is not None
    heard = ""
    while not all(re.search(rf"seed {seed}: [\d,]+ of", heard) for seed in seeds):
        heard += process.stderr.readline()
        assert process.poll() is None


def wait_until_stopped(run_dir: Path) -> None:
    """Wait until no process writes to the run any more."""
    while True:
        try:
            directory = lock(run_dir)
        except ConfigError:
            time.sleep(0.1)
        else:
            assert directory is not None
            os.close(directory)
            return


def test_a_signal_that_comes_between_two_starts_leaves_no_process_behind(tmp_path: Path) -> None:
    processes = Processes({})
    processes.stopped_by = signal.SIGTERM
    assert processes.run({1: ["no-such-program"], 2: ["no-such-program"]}, 1) == {1: None, 2: None}


def test_each_seed_has_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    gigabyte = 1 << 30
    monkeypatch.setattr("minirl.runs.seeds.available_cores", lambda: 6)
    monkeypatch.setattr("minirl.runs.seeds.memory", lambda: 100 * gigabyte)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    alone, cartpole = {"OMP_NUM_THREADS": "1"}, PPOConfig(env_id="CartPole-v1")
    pong, cheetah = PPOConfig(), PPOConfig(env_id="HalfCheetah-v5")
    assert side_by_side(cartpole, 9) == (6, [], alone)
    assert side_by_side(cartpole, 4) == (4, [], alone)
    assert side_by_side(PPOConfig(env_id="CartPole-v1", num_workers=4), 9) == (1, [], {"OMP_NUM_THREADS": "6"})
    assert side_by_side(QLearningConfig(), 9) == (6, [], alone)
    assert side_by_side(cheetah, 9) == (6, ["--num-workers=1"], alone)
    assert side_by_side(pong, 9) == (6, ["--num-workers=1", "--num-threads=1"], alone)
    assert side_by_side(pong, 2) == (2, ["--num-workers=3", "--num-threads=3"], {"OMP_NUM_THREADS": "3"})
    assert side_by_side(PPOConfig(num_workers=2, num_threads=1), 9) == (3, [], {"OMP_NUM_THREADS": "2"})
    assert side_by_side(PPOConfig(num_threads=3), 9) == (2, ["--num-workers=3"], {"OMP_NUM_THREADS": "3"})
    # A replay memory of 100,000 frames of 84 x 84 bytes is 0.66 GB.
    atari = DQNConfig(env_id="PongNoFrameskip-v4", buffer_size=100_000)
    for memory, at_once in ((100, 6), (5, 3), (1, 1)):
        monkeypatch.setattr("minirl.runs.seeds.memory", lambda memory=memory: memory * gigabyte)
        assert side_by_side(atari, 9)[0] == at_once
        assert side_by_side(cartpole, 9)[0] == 6
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert side_by_side(pong, 1) == (1, ["--num-workers=6"], {}), "somebody has chosen the threads"


def test_threads_are_set_in_the_processes(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        f"import os; open({str(tmp_path / 'n')!r}, 'w').write(os.environ['OMP_NUM_THREADS'])",
    ]
    assert Processes({"OMP_NUM_THREADS": "1"}).run({0: command}, 1) == {0: 0}
    assert (tmp_path / "n").read_text() == "1"


def test_the_table_has_greedy_returns_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {
        Path("a"): {"global_step": 1000, "returns": [1.0, 2.0], "best_return": 9.5, "seconds": 90.0},
        Path("b"): {"global_step": 1200, "returns": [], "best_return": 11.5, "seconds": 30.0},
    }
    monkeypatch.setattr("minirl.runs.seeds.load_checkpoint", lambda run_dir, algorithm: runs[run_dir])
    assert summary("dqn", {3: Path("a"), 14: Path("b")}).splitlines() == [
        "seed  steps  mean of the last 100 returns  best greedy return  minutes  directory",
        "   3  1,000                          1.50                9.50     1.50  a",
        "  14  1,200                                             11.50     0.50  b",
        "mean                                                    10.50     1.00",
        " std                                                     1.00     0.50",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--seeds 0-1 --seed 3", "--seeds can't go with --seed"),
        ("--seeds 0-1 --resume run", "--seeds can't go with --resume, which goes on with one run"),
        ("--seeds 0-1 --alpha 7", "--alpha must be a number above 0 and of at most 1, not 7.0"),
        ("--seeds 0-1 --env-id NoSuch-v1", "--env-id must be an environment that Gymnasium can make"),
        ("--seeds 0-1 --run-dir taken", "--run-dir must be new: taken/seed1 holds a run; continue it with --resume"),
        ("--seeds 0-1 --run-dir a-file/in", "--run-dir must be a directory that can be written, and a-file is none"),
        ("--seeds 4-0", "--seeds: must count up, from 0 to 2147483647, and 4-0 does not"),
        ("--seeds", "--seeds: expected one argument"),
    ],
)
def test_mistakes(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken" / "seed1").mkdir(parents=True)
    (tmp_path / "a-file").touch()
    save_config(tmp_path / "taken" / "seed1", "q_learning", QLearningConfig())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run_training("q_learning", QLearningConfig, q_learning.train, "", line.split())
    output = capsys.readouterr()
    assert (stop.value.code, output.out) == (2, "")
    assert output.err.replace(f"{tmp_path}/", "").startswith(f"error: {message}")
    assert output.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_default_directories_are_the_usual_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def spy(algorithm: str, config: Any, flags: list[str], run_dirs: dict[int, Path]) -> int:
        seen.update(flags=flags, run_dirs=run_dirs)
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minirl.scripts.train.train_seeds", spy)
    flags = (
        "--seeds 0,7 --env-id ALE/Pong-v5 --anneal-lr --no-norm-adv --target-kl none --learning-rate 1e-3 --device cpu"
    )
    with pytest.raises(SystemExit) as stop:
        run_training("ppo", PPOConfig, ppo.train, "", flags.split())
    assert stop.value.code == 0
    for seed, run_dir in seen["run_dirs"].items():
        assert re.fullmatch(rf"{tmp_path}/runs/ppo/ALE-Pong-v5/\d+-\d+-seed{seed}", str(run_dir))
    assert list(seen["run_dirs"]) == [0, 7]
    assert not list(tmp_path.iterdir()), "nothing came of them"
    parser = make_parser(PPOConfig, "", TRAINING_SCRIPTS)
    assert vars(parser.parse_args(seen["flags"])) == vars(parser.parse_args(flags.split()[2:]))


def test_a_taken_directory_is_refused_before_anything_starts(tmp_path: Path) -> None:
    save_config(tmp_path, "q_learning", QLearningConfig())
    with pytest.raises(ConfigError, match="holds a run; continue it with --resume"):
        train_seeds("q_learning", QLearningConfig(), [], {0: tmp_path / "new", 1: tmp_path})
    assert not (tmp_path / "new").exists()


def test_how_to_go_on_is_a_command_that_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dirs = {seed: tmp_path / "two words" / f"seed{seed}" for seed in (0, 1)}
    run_dirs[0].mkdir(parents=True)
    (run_dirs[0] / "checkpoint.pt").touch()
    _say_how_to_go_on(run_dirs)
    line = capsys.readouterr().err.splitlines()[0].removeprefix("go on with seed 0: ")
    assert shlex.split(line)[2:] == ["--resume", str(run_dirs[0])]
