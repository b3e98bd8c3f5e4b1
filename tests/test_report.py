"""What a finished training run adds to TensorBoard, and that none of it can spoil the run."""

import dataclasses
import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from minirl.dqn import DQNConfig
from minirl.dqn import train as train_dqn
from minirl.evaluate import evaluate
from minirl.ppo import PPOConfig
from minirl.ppo import train as train_ppo
from minirl.q_learning import QLearningConfig
from minirl.q_learning import train as train_q
from minirl.runs.directory import lock
from minirl.scripts import report
from minirl.scripts.train import run_training
from tests.scalars import read_scalars

SHORT = "--num-episodes 200 --seed 3"


def read_events(run_dir: Path) -> Any:
    events = EventAccumulator(str(run_dir), size_guidance={"images": 0})
    events.Reload()
    return events


def train_on_grid(run_dir: Path, flags: str = "") -> Any:
    line = f"{SHORT} --run-dir {run_dir} {flags}"
    return run_training("q_learning", QLearningConfig, train_q, "", line.split())


def test_a_finished_run_ends_with_greedy_games_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, table = train_on_grid(tmp_path)
    scalars = read_scalars(tmp_path)
    last_step = scalars["charts/SPS"][-1][0]
    result = evaluate(tmp_path, episodes=10)
    ((step, mean_return),) = scalars["eval/mean_return"]
    assert step == last_step
    assert mean_return == pytest.approx(result["mean_return"])
    assert "10 of 10 games" in capsys.readouterr().err
    events = read_events(tmp_path)
    assert events.Tags()["images"] == ["pictures/q-values"]
    (image,) = events.Images("pictures/q-values")
    assert image.step == last_step
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert pixels.shape[1] > 1000
    assert pixels.std() > 40
    assert table.shape == (9, 4)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [], "no runs inside the run"


def test_a_run_that_another_process_goes_on_with_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_on_grid(tmp_path, "--final-games 0")
    held = lock(tmp_path)
    assert held is not None
    report.report(tmp_path, 3)
    os.close(held)
    assert "another process writes to" in capsys.readouterr().err
    assert "eval/mean_return" not in read_scalars(tmp_path)


@pytest.mark.parametrize(
    ("run", "kinds"),
    [
        ("grid", ["q-values"]),
        ("dqn", ["policy-map"]),
        ("ppo", ["policy-map"]),
        ("breakout", ["action-probabilities", "preprocessing"]),
    ],
)
def test_the_pictures_fit_the_run(
    run: str, kinds: list[str], small_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small_runs / run, tmp_path / "run")
    report.report(tmp_path / "run", 0, "cpu")
    assert read_events(tmp_path / "run").Tags()["images"] == [f"pictures/{kind}" for kind in kinds]


def row_of_hyperparameters(run_dir: Path) -> Any:
    content = read_events(run_dir).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams


def test_the_settings_are_one_row_of_the_table_of_hyperparameters(tmp_path: Path) -> None:
    config = DQNConfig(hidden_sizes=(8, 8), total_timesteps=300, learning_starts=200, eval_frequency=None)
    train_dqn(config, run_dir=tmp_path / "run", device="cpu")
    row = row_of_hyperparameters(tmp_path / "run")
    assert row["algorithm"].string_value == "dqn"
    assert row["env_id"].string_value == "CartPole-v1"
    assert row["hidden_sizes"].string_value == "(8, 8)"
    assert row["learning_rate"].number_value == 5e-3
    assert row["total_timesteps"].number_value == 300
    assert (row["anneal_lr"].string_value, row["huber"].string_value) == ("True", "False")
    assert "eval_frequency" not in row, "there the table shows nothing"
    more = dataclasses.replace(config, total_timesteps=310, num_workers=1)
    train_dqn(more, run_dir=tmp_path / "run", resume=True, device="cpu")
    row = row_of_hyperparameters(tmp_path / "run")
    assert (row["total_timesteps"].number_value, row["num_workers"].number_value) == (310, 1), "of the resumed run"


def test_a_finished_run_that_is_resumed_has_one_value_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def played(run_dir: Path, *, episodes: int, **_: Any) -> dict[str, Any]:
        mean = float(episodes)
        return {"episodes": episodes, "mean_return": mean, "std_return": 0.0, "min_return": mean, "max_return": mean}

    monkeypatch.setattr(report, "evaluate", played)
    train_on_grid(tmp_path)
    before = read_scalars(tmp_path)
    for games, mean_return in [(0, 10.0), (3, 3.0)]:
        line = f"--resume {tmp_path} --final-games {games}"
        run_training("q_learning", QLearningConfig, train_q, "", line.split())
        before["eval/mean_return"] = [(before["charts/SPS"][-1][0], mean_return)]
        assert read_scalars(tmp_path) == before
        assert len(read_events(tmp_path).Images("pictures/q-values")) == 1


def test_on_a_full_disk_the_report_is_left_out_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_on_grid(tmp_path, "--final-games 0")
    before = sorted(tmp_path.iterdir())

    def full(self: RecordWriter, record: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    report.report(tmp_path, 2)
    said = capsys.readouterr().err
    assert "left out of TensorBoard: the games after the training: [Errno 28] No space left on device\n" in said
    assert "left out of TensorBoard: the picture q-values: [Errno 28] No space left on device\n" in said
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("games", [0, 3])
def test_the_number_of_games_is_a_flag(games: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_on_grid(tmp_path, f"--final-games {games}")
    assert ("eval/mean_return" in read_scalars(tmp_path)) == (games > 0)
    assert ("return over 3 games, greedy actions: mean " in capsys.readouterr().err) == (games > 0)
    assert read_events(tmp_path).Tags()["images"] == ["pictures/q-values"]


def test_games_that_nobody_asked_for_may_not_take_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "SHORTEST_PATIENCE", 0.0)
    monkeypatch.setattr(report, "LONGEST_PATIENCE", 0.0)
    train_on_grid(tmp_path / "run")
    assert "eval/mean_return" not in read_scalars(tmp_path / "run")
    assert (
        "left out of TensorBoard: the games after the training: they take more than 0 seconds"
        in capsys.readouterr().err
    )
    train_on_grid(tmp_path / "asked", "--final-games 2")
    assert "eval/mean_return" in read_scalars(tmp_path / "asked")


def test_double_dqn_has_played_its_games_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--total-timesteps 300 --learning-starts 200 --eval-frequency 150 --eval-episodes 2 --device cpu"
    line = f"{flags} --run-dir {tmp_path / 'run'}"
    run_training("dqn", DQNConfig, train_dqn, "", line.split())
    assert [step for step, _ in read_scalars(tmp_path / "run")["eval/mean_return"]] == [150, 300]
    assert read_events(tmp_path / "run").Tags()["images"] == ["pictures/policy-map"]
    line = f"{flags} --eval-frequency none --final-games 1 --run-dir {tmp_path / 'unjudged'}"
    run_training("dqn", DQNConfig, train_dqn, "", line.split())
    assert [step for step, _ in read_scalars(tmp_path / "unjudged")["eval/mean_return"]] == [300]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--final-games -1", "--final-games must be a whole number from 0 to 1000000000000, not -1"),
        ("--final-games x", "--final-games: must be a whole number, not 'x'"),
        ("--final-games 5", "--final-games must be 0 or left out with eval_frequency"),
    ],
)
def test_mistakes(flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_training("dqn", DQNConfig, train_dqn, "", [*flags.split(), "--run-dir", str(tmp_path / "run")])
    output = capsys.readouterr()
    assert (stop.value.code, output.out) == (2, "")
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert message in output.err
    assert not (tmp_path / "run").exists()


def test_what_goes_wrong_is_left_out_and_the_run_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise ArithmeticError("the screen\nis black")

    monkeypatch.setattr(report, "draw_picture", broken)
    monkeypatch.setattr(report, "evaluate", broken)
    _, table = train_on_grid(tmp_path)
    assert table.shape == (9, 4)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out")]
    assert lines == [
        "left out of TensorBoard: the games after the training: the screen is black",
        "left out of TensorBoard: the picture q-values: the screen is black",
    ]


def test_without_matplotlib_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    train_on_grid(tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if "extra `plot`" in line]
    assert lines == [
        "left out of TensorBoard: pictures: plots need matplotlib, the extra `plot`: pip install -e '.[plot]'"
    ]
    assert "eval/mean_return" in read_scalars(tmp_path)


def test_an_environment_that_dies_in_the_games_after_training_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests import fake_envs

    line = "--env-id tests.fake_envs:Counter-v0 --num-steps 8 --minibatch-size 8 --total-timesteps 64 --device cpu"

    def train(*arguments: Any, **options: Any) -> Any:
        result = train_ppo(*arguments, **options)
        monkeypatch.setattr(fake_envs.Counter, "step", fake_envs.Faulty("raise").step)
        return result

    run_training("ppo", PPOConfig, train, "", [*line.split(), "--run-dir", str(tmp_path / "run")])
    assert "left out of TensorBoard: the games after the training: " in capsys.readouterr().err


def test_a_run_that_is_done_gets_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Any] = []
    monkeypatch.setattr("minirl.scripts.train.report", lambda *arguments: reported.append(arguments))
    run_training("q_learning", QLearningConfig, train_q, "", [*SHORT.split(), "--run-dir", str(tmp_path / "run")])
    assert reported == [(tmp_path / "run", None, "auto")]
