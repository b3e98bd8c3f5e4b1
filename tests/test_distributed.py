"""Several ranks are one training: the same gradients, weights and files; and what ends one of them ends all."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from minirl import distributed
from minirl.checks import ConfigError
from minirl.distributed import (
    RankError,
    all_gather,
    average_gradients,
    broadcast_from_rank_0,
    gather_to_rank_0,
    max_over_ranks,
    mean_over_ranks,
    my_share,
    require_one_process,
    require_shares,
)
from minirl.envs.vector import available_cores
from minirl.ppo import PPOConfig, normalized
from minirl.runs.checkpoints import load_checkpoint
from minirl.runs.resume import of_this_rank
from minirl.runs.run import Run, require_same_parts
from tests.conftest import PATIENCE
from tests.ranks import MINIBATCH, NUM_ENVS
from tests.scalars import read_scalars
from tests.test_resume import ROOT, assert_same

CARTPOLE = (
    f"--env-id CartPole-v1 --num-envs {NUM_ENVS} --num-steps 16 --minibatch-size {MINIBATCH} --device cpu --no-compile "
    "--final-games 0"
)
LONG = f"{CARTPOLE} --total-timesteps {10 * 16 * NUM_ENVS} --checkpoint-frequency 256"  # 10 updates, saved after 2


@pytest.fixture
def one_of_one() -> Iterator[None]:
    """A group with this process in it, and no other."""
    store: Any = vars(dist)["HashStore"]()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)


def test_alone_a_process_gets_back_what_it_gave() -> None:
    values = torch.tensor([[1.0, 2.0]])
    weight = nn.Parameter(values)
    weight.grad = values
    average_gradients(torch.optim.SGD([weight]))
    assert all_gather(values) is mean_over_ranks(values) is weight.grad is values
    assert (my_share(8), max_over_ranks(7), gather_to_rank_0("x"), broadcast_from_rank_0(lambda: 3)) == (
        slice(0, 8),
        7,
        ["x"],
        3,
    )


def test_a_share_is_a_part_of_the_whole_that_no_other_rank_has(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        shares += list(range(12))[my_share(12)]
    assert shares == list(range(12))


@pytest.mark.parametrize(("total", "would"), [(8, "6 or 9"), (2, "3"), (256, "255 or 258")])
def test_totals_that_do_not_divide_are_told_what_would(total: int, would: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 0, 3)
    with pytest.raises(
        ConfigError, match=f"--num-envs must divide into the 3 ranks of torchrun: {would}, not {total}$"
    ):
        require_shares(minibatch_size=9, num_envs=total)


def test_the_other_algorithms_run_on_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    require_one_process("Double DQN")
    for name in distributed.LAUNCHED:
        monkeypatch.setenv(name, "2")
    with pytest.raises(
        ConfigError, match="Double DQN must run on one process: start it with python, not with torchrun"
    ):
        require_one_process("Double DQN")


def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    assert available_cores() == 64
    for ranks, share in ((4, 16), (3, 21), (100, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert available_cores() == share


@pytest.mark.usefixtures("one_of_one")
def test_what_goes_through_a_group_comes_back_in_its_shape() -> None:
    values = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(all_gather(values), values)
    assert torch.equal(all_gather(values > 3), values > 3)
    weights = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (), (4,))]
    weights[0].grad, weights[2].grad = torch.arange(6.0).reshape(2, 3), torch.full((4,), 7.0)
    weights[0].grad = weights[0].grad.T.contiguous().T  # as channels-last images lie
    average_gradients(torch.optim.SGD(weights))
    assert weights[0].grad.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert weights[1].grad is None
    assert weights[2].grad.tolist() == [7] * 4
    assert (max_over_ranks(7), gather_to_rank_0("x"), broadcast_from_rank_0(lambda: 3)) == (7, ["x"], 3)
    with pytest.raises(ConfigError, match="so it is"):
        broadcast_from_rank_0(raise_error)


def raise_error() -> None:
    raise ConfigError("so it is")


def test_advantages_are_normalised_over_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, others = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
    monkeypatch.setattr("minirl.distributed.all_gather", lambda values: torch.cat([others, values]))
    # All four: mean 3, squared distances 0, 9, 4, 1, sum 14, divided by 3.
    torch.testing.assert_close(normalized(mine), torch.tensor([-2.0, -1.0]) / (14 / 3) ** 0.5)
    monkeypatch.setattr("minirl.distributed.all_gather", lambda values: torch.full((6,), 0.1))
    assert normalized(torch.full((2,), 0.1)).tolist() == [0, 0], "to the last bit"


def test_environments_are_dealt_out_to_another_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = {
        "envs": {"states": list("abcdef"), "generators": [["w"], ["v"]]},
        "obs": torch.arange(6),
        "ranks": [{"cpu": "first"}, {"cpu": "second"}],
        "random_state": {"cpu": "first"},
        "global_step": 5,
    }
    for ranks, states in ((2, "def"), (3, "cd")):
        monkeypatch.setattr("minirl.runs.resume.world_size", lambda ranks=ranks: ranks)
        monkeypatch.setattr("minirl.runs.resume.rank", lambda: 1)
        as_rank(monkeypatch, 1, ranks)
        mine = of_this_rank(saved, 1)
        assert mine["envs"]["states"] == list(states)
        assert len(mine["obs"]) == len(states)
        assert (mine["random_state"] == {"cpu": "second"}) == (ranks == 2)
        assert mine["envs"]["generators"] == (["v"] if ranks == 2 else [])
    monkeypatch.setattr("minirl.runs.resume.rank", lambda: 0)
    of_this_rank(saved, 1)
    assert capsys.readouterr().err == ("2 ranks saved this run, and 3 go on with it: its bits differ from here on\n")


@pytest.mark.parametrize(("change", "status"), [(0.0, "same"), (1e-7, "other")])
def test_a_checkpoint_is_of_parts_that_all_ranks_have(
    change: float, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.tensor([1.0, 2.0]), torch.tensor([1.0 + 2 * change, 2.0])
    checksums = [zlib.crc32(weight.numpy().tobytes()) for weight in weights]
    monkeypatch.setattr("minirl.runs.run.world_size", lambda: 2)
    monkeypatch.setattr(
        "minirl.runs.run.max_over_ranks", lambda mine: max(mine, checksums[1] if mine > 0 else -checksums[1])
    )
    with (
        contextlib.nullcontext() if status == "same" else pytest.raises(RankError, match="the same 'mine' in `learned`")
    ):
        require_same_parts({"envs": {"states": object()}, "mine": {"weight": weights[0]}})


def test_a_signal_that_comes_while_ranks_agree_on_one_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PPOConfig()
    with Run("ppo", config, None, total=100) as run:

        def agree(number: int) -> int:
            run._on_signal(signal.SIGINT, None)
            return number

        monkeypatch.setattr(run, "several", True)
        monkeypatch.setattr("minirl.runs.run.some_rank_failed", lambda: False)
        monkeypatch.setattr("minirl.runs.run.max_over_ranks", agree)
        run.checkpoint(1, dict)
        with pytest.raises(KeyboardInterrupt):
            run.checkpoint(2, dict)


# From here on, with ranks.


def start(deed: str, out: Path, flags: str, *options: str, ranks: int = 2) -> "subprocess.Popen[str]":
    """Start `tests/ranks.py` by torchrun, in a session of its own; alone without ranks."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options] if ranks else []
    )
    command = [sys.executable, *torchrun, str(ROOT / "tests" / "ranks.py"), deed, str(out), *shlex.split(flags)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = str(ROOT)
    signal.alarm(2 * PATIENCE)  # ranks start slowly, and a test starts several
    return subprocess.Popen(command, cwd=out.parent, env=environment, stderr=subprocess.PIPE, text=True)


def ended(process: "subprocess.Popen[str]", status: int = 0) -> str:
    """Wait for it; return what it and its ranks have said."""
    _, said = process.communicate(timeout=400)
    assert process.returncode == status, said
    assert "outlive the training" not in said
    return said


def by_ranks(text: str) -> list[str]:
    """The lines that are not torchrun's own."""
    own = text.split('Traceback (most recent call last):\n  File "<frozen runpy>"')[0]
    return [line for line in own.splitlines() if not re.match(r"[WE]\d{4} |\*\*\*|Setting OMP|$", line)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        CARTPOLE.replace("--num-steps 16", "--num-steps 32 --norm-obs --norm-reward --target-kl 1"),
        CARTPOLE.replace("CartPole-v1", "PongNoFrameskip-v4").replace("--num-steps 16", "--num-steps 8")
        + " --update-epochs 2 --precision float32 --num-workers 1",
    ],
    ids=["cartpole", "pong"],
)
def test_two_ranks_learn_what_one_process_learns_from_the_same_minibatches(flags: str, tmp_path: Path) -> None:
    steps = 5 * NUM_ENVS * int(flags.split("--num-steps ")[1].split()[0])
    for name, ranks in (("two", 2), ("one", 0)):
        ended(start("same", tmp_path / name, f"{flags} --total-timesteps {steps} --run-dir {name}-run", ranks=ranks))
    one, two, other = (torch.load(tmp_path / name) for name in ("one.0", "two.0", "two.1"))
    assert_same(two["weights"], other["weights"])
    # Adam divides by the size of a gradient: where that is tiny, rounding shows. So each weight matrix as a whole.
    for name, weight in one["weights"].items():
        assert (two["weights"][name] - weight).norm() <= 1e-4 * weight.norm(), name
    for gradient, mean in zip(one["gradients"], two["gradients"], strict=True):
        assert (mean - gradient).norm() <= 1e-3 * gradient.norm()
    logged, apart = (read_scalars(tmp_path / f"{name}-run") for name in ("one", "two"))
    assert logged.keys() == apart.keys()
    for tag in logged.keys() - {"charts/SPS", "charts/minutes"}:
        assert [step for step, _ in logged[tag]] == [step for step, _ in apart[tag]], tag
        numbers, others = [value for _, value in logged[tag]], [value for _, value in apart[tag]]
        assert numbers == pytest.approx(others, rel=1e-3, abs=1e-5), tag


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_ranks_hold_the_same_weights_after_20_updates(compiled: bool, tmp_path: Path) -> None:
    flags = f"{CARTPOLE} --total-timesteps {20 * 16 * NUM_ENVS}".replace(
        "--no-compile", "--compile" if compiled else ""
    )
    said = ended(start("plain", tmp_path / "out", f"{flags} --run-dir run"))
    assert "not compiled" not in said
    one, other = (torch.load(tmp_path / f"out.{number}") for number in range(2))
    assert_same(one["weights"], other["weights"])
    assert one["threads"] == other["threads"] == max(1, available_cores() // 2)
    files = sorted(path.name for path in (tmp_path / "run").iterdir() if "tfevents" not in path.name)
    assert files == ["checkpoint.pt", "config.json"]
    assert len(
        [path for path in (tmp_path / "run").glob("events*") if path.suffix == ".0" or "settings" not in path.name]
    )
    assert load_checkpoint(tmp_path / "run", "ppo")["optimizer"]["param_groups"][0].get("compiled", False) == compiled


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of `LONG` by two ranks, to its end."""
    path = tmp_path_factory.mktemp("alone")
    ended(start("plain", path / "out", f"{LONG} --run-dir run"))
    return path / "run"


def assert_as_left_alone(path: Path, left_alone: Path) -> None:
    assert_same(load_checkpoint(path, "ppo"), load_checkpoint(left_alone, "ppo"))
    logged, others = read_scalars(path), read_scalars(left_alone)
    for tag in others.keys() - {"charts/SPS", "charts/minutes"}:
        assert logged[tag] == others[tag], tag


@pytest.mark.slow
def test_ranks_that_torchrun_starts_again_go_on_by_themselves(left_alone: Path, tmp_path: Path) -> None:
    ended(start("die", tmp_path / "out", LONG, "--max-restarts", "1"))
    (run_dir,) = tmp_path.glob("runs/ppo/*/*")  # the default directory is found again
    assert_as_left_alone(run_dir, left_alone)


@pytest.mark.slow
def test_ranks_that_were_killed_and_resumed_end_as_ranks_left_alone(left_alone: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start("plain", tmp_path / "out", f"{LONG} --run-dir run")
    while not (run_dir / "checkpoint.pt").exists():
        assert process.poll() is None
    for pid in (process.pid, *children(process.pid)):
        os.kill(pid, signal.SIGKILL)
    ended(process, status=-signal.SIGKILL)
    ended(start("plain", tmp_path / "out", "--resume run --final-games 0 --device cpu"))
    assert_as_left_alone(run_dir, left_alone)


@pytest.mark.slow
def test_ranks_that_were_stopped_go_on_and_other_numbers_of_ranks_can(tmp_path: Path) -> None:
    said = ended(start("stop", tmp_path / "out", f"{LONG} --run-dir run"), status=1)
    assert "Traceback" not in "".join(by_ranks(said))
    saved = load_checkpoint(tmp_path / "run", "ppo")
    assert saved["global_step"] == 4 * 16 * NUM_ENVS, "all stop where one was asked to"
    for ranks, before in ((0, 2), (4, 1)):
        flags = f"--resume run --total-timesteps {(15 + ranks) * 16 * NUM_ENVS} --final-games 0 --device cpu"
        said = ended(start("plain", tmp_path / "out", flags, ranks=ranks))
        line = f"{before} ranks saved this run, and {ranks or 1} go on with it: its bits differ from here on"
        assert said.count(line) == 1
        saved = load_checkpoint(tmp_path / "run", "ppo")
        assert saved["global_step"] == (15 + ranks) * 16 * NUM_ENVS
        assert len(saved["envs"]["states"]) == NUM_ENVS


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_once_and_stops_all(number: signal.Signals, tmp_path: Path) -> None:
    flags = f"{CARTPOLE} --total-timesteps 10000000 --checkpoint-frequency 1000000000 --run-dir run"
    process = start("plain", tmp_path / "out", flags)
    assert process.stderr is not None
    while " of 10,000,000 steps" not in process.stderr.readline():
        assert process.poll() is None
    ranks = children(process.pid)
    assert len(ranks) == 2
    process.send_signal(number)
    said = ended(process, status=1)
    assert "Traceback" not in "".join(by_ranks(said))
    assert load_checkpoint(tmp_path / "run", "ppo")["global_step"] > 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "line"),
    [
        ("raise", "LookupError: of rank 1"),
        ("die", "error: another rank has ended; the last checkpoint is kept"),
        ("hang", "error: another rank has not answered for 25 seconds; the last checkpoint is kept"),
    ],
)
def test_a_rank_that_fails_ends_all_within_a_minute_with_one_error(
    deed: str, line: str, left_alone: Path, tmp_path: Path
) -> None:
    process = start(deed, tmp_path / "out", f"{LONG} --run-dir run")
    assert process.stderr is not None
    while (said := process.stderr.readline()) and f"rank 1 will {deed}" not in said:
        pass
    began = float(said.split()[-1])
    ranks = children(process.pid)
    lines = by_ranks(ended(process, status=1))
    assert time.time() - began < 60
    assert [text for text in lines if "rror" in text and "Traceback" not in text][-1].endswith(line)
    assert len([text for text in lines if "Traceback" in text]) == (deed == "raise"), lines
    assert len([text for text in lines if "error: " in text]) == (deed != "raise"), lines
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert load_checkpoint(tmp_path / "run", "ppo")["global_step"] == 2 * 16 * NUM_ENVS
    if deed == "die":
        ended(start("plain", tmp_path / "out", "--resume run --final-games 0 --device cpu"))
        assert_as_left_alone(tmp_path / "run", left_alone)


@pytest.mark.slow
def test_a_mistake_is_one_line_of_one_rank(tmp_path: Path) -> None:
    mistakes = {
        CARTPOLE.replace("-envs 8", "-envs 7").replace(
            "-size 64", "-size 56"
        ): "--num-envs must divide into the 2 ranks of",
        f"{CARTPOLE} --seeds 0-1": "--seeds can't go with torchrun",
    }
    for flags, line in mistakes.items():
        (said,) = by_ranks(ended(start("plain", tmp_path / "out", flags), status=1))
        assert said.startswith(f"error: {line}")
        assert not (tmp_path / "runs").exists(), "nothing is written"
