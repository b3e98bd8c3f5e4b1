"""TensorBoard's event file: what TensorBoard reads in it, and when."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import Summary

from minirl.checks import ConfigError
from minirl.envs.vector import Episode
from minirl.runs.events import FLUSH_EVERY, Events
from minirl.runs.run import Run
from tests.test_runs import CONFIG


def scalar(value: float, tag: str = "charts/height") -> Summary:
    return Summary(value=[Summary.Value(tag=tag, simple_value=value)])


def seen(run_dir: Path) -> list[tuple[int, float]]:
    reader = EventAccumulator(str(run_dir))
    reader.Reload()
    if "charts/height" not in reader.Tags()["scalars"]:
        return []
    return [(point.step, point.value) for point in reader.Scalars("charts/height")]


def test_tensorboard_reads_what_was_written_and_when(tmp_path: Path) -> None:
    events = Events(tmp_path)
    before = time.time()
    for step in (3, 2**40):
        events.add(scalar(step / 4), step)
    events.close()
    after = time.time()
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    first, second = reader.Scalars("charts/height")
    assert (first.step, first.value) == (3, 0.75)
    assert (second.step, second.value) == (2**40, 2**38)
    assert before <= first.wall_time <= second.wall_time <= after


def test_a_later_file_takes_back_what_earlier_ones_say_of_its_steps(tmp_path: Path) -> None:
    for purge_step, steps in ((None, (10, 20, 30)), (20, (20, 25))):
        events = Events(tmp_path, purge_step)
        for step in steps:
            events.add(scalar(step + (0.5 if purge_step else 0)), step)
        events.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert seen(tmp_path) == [(10, 10), (20, 20.5), (25, 25.5)]


def test_what_was_flushed_is_there_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(tmp_path)
    events.add(scalar(1), 1)
    assert seen(tmp_path) == []
    events.flush()
    assert seen(tmp_path) == [(1, 1)]
    events.add(scalar(2), 2)
    assert seen(tmp_path) == [(1, 1)]
    now = time.time()
    monkeypatch.setattr("minirl.runs.events.time.time", lambda: now + FLUSH_EVERY)
    events.add(scalar(3), 3)
    assert seen(tmp_path) == [(1, 1), (2, 2), (3, 3)]
    events.close()


@pytest.mark.parametrize("value", [None, np.ones(2), torch.ones(2), "high"])
def test_what_is_no_number_is_named_by_its_tag(value: Any, tmp_path: Path) -> None:
    with Run("ppo", CONFIG, tmp_path / "run", total=100) as run, pytest.raises(TypeError, match="charts/own must be a"):
        run.log(1, {"charts/own": value})


def test_a_run_that_cant_log_any_more_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(writer: Any, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with Run("ppo", CONFIG, tmp_path / "run", total=100) as run:
        monkeypatch.setattr("minirl.runs.events.RecordWriter.write", full)
        with pytest.raises(
            ConfigError, match=r"run can't be written any more, and its last checkpoint is kept.*No space"
        ):
            run.log_episodes(1, [Episode(0, 1.0, 2)])
