"""A file of TensorBoard events, written by the training's own thread.

`SummaryWriter` has a thread of its own, which opens and closes the file for each record and holds up the training's
meanwhile: where episodes are short, for a tenth of the time.
"""

import dataclasses
import os
import socket
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams

from minirl.runs.checkpoints import atomic_file

FLUSH_EVERY = 10.0  # seconds: TensorBoard looks for news every 30
FILE_VERSION = "brain.Event:2"
# TensorBoard reads the files of a directory by name, and believes what it first reads of the settings.
SETTINGS_FILE = "events.out.tfevents.0.settings"


class Events:
    """An event file in a run directory.

    Args:
        run_dir: where; the directory is there already.
        purge_step: TensorBoard shall forget what earlier files of the directory say of this step and later ones.

    Raises:
        OSError: from every call, if the file can't be written.
    """

    def __init__(self, run_dir: Path, purge_step: int | None = None) -> None:
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = (run_dir / name).open("wb")
        self.records = RecordWriter(self.file)
        self.flush_at = 0.0
        self._write(Event(file_version=FILE_VERSION))
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, summary: Summary, global_step: int | None = None) -> None:
        """Write what happened by this agent step."""
        self._write(Event(step=global_step, summary=summary))

    def flush(self) -> None:
        """Hand everything to the operating system: from now on it is there, even if the process is killed."""
        self.file.flush()

    def close(self) -> None:
        """Flush and close."""
        self.file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self.records.write(event.SerializeToString())
        if event.wall_time >= self.flush_at:
            self.flush()
            self.flush_at = event.wall_time + FLUSH_EVERY


def save_settings_row(run_dir: Path, algorithm: str, config: Any) -> None:
    """Write all settings to a file of events of their own; TensorBoard's table "HPARAMS" then has a row for this run.

    The file takes the place of the one before: a resumed run may have other settings. `SummaryWriter.add_hparams` would
    make a second run of it, in a directory of its own; the start of a session is all that the table needs. Settings
    that are None are left out: there the table shows nothing.

    Raises:
        OSError: if the file can't be written.
    """
    settings = {"algorithm": algorithm, **dataclasses.asdict(config)}
    shown = {
        name: value if type(value) in (int, float) else str(value)  # True would be shown as 1
        for name, value in settings.items()
        if value is not None
    }
    _, session_start, _ = hparams(shown, {})
    with atomic_file(run_dir / SETTINGS_FILE) as temporary, temporary.open("wb") as file:
        records = RecordWriter(file)
        for event in (Event(file_version=FILE_VERSION), Event(summary=session_start)):
            event.wall_time = time.time()
            records.write(event.SerializeToString())
