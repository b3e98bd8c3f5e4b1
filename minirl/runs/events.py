"""A file of TensorBoard events, written by the training thread itself.

`SummaryWriter` has its own thread, which opens and closes the file for each record and blocks the training thread
meanwhile: for a tenth of the time if episodes are short.
"""

import dataclasses
import io
import os
import socket
import time
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams

from minirl.runs.checkpoints import atomic_file

FLUSH_EVERY = 10.0  # seconds: TensorBoard looks for new events every 30
FILE_VERSION = "brain.Event:2"
# The first in order of name: TensorBoard keeps the first settings that it reads.
SETTINGS_FILE = "events.out.tfevents.0.settings"


def new_name() -> str:
    """Return the name of a new event file: TensorBoard reads the files of a directory in the order of their names."""
    return f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"


def write_events(path: Path, *events: Event) -> None:
    """Write a whole event file, or nothing.

    Raises:
        OSError: if it can't be written.
    """
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        records = RecordWriter(file)
        for event in (Event(file_version=FILE_VERSION), *events):
            event.wall_time = time.time()
            records.write(event.SerializeToString())


class Events:
    """An event file in a run directory.

    Args:
        run_dir: where; the directory must exist.
        purge_step: TensorBoard drops the events of earlier files from this step on.

    Raises:
        OSError: from every call, if the file can't be written.
    """

    def __init__(self, run_dir: Path, purge_step: int | None = None) -> None:
        self.file = (run_dir / new_name()).open("wb")
        self.records = RecordWriter(self.file)
        self.flush_at = 0.0
        self._write(Event(file_version=FILE_VERSION))
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, summary: Summary, global_step: int | None = None) -> None:
        """Write a summary of this agent step."""
        self._write(Event(step=global_step, summary=summary))

    def flush(self) -> None:
        """Hand everything to the operating system: from now on it is kept, even if the process is killed."""
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


def picture_summary(tag: str, encoded: bytes) -> Summary:
    """Return the summary that shows an encoded picture, a PNG or a GIF, among TensorBoard's images."""
    with Image.open(io.BytesIO(encoded)) as opened:
        width, height = opened.size
    shown = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=encoded)
    return Summary(value=[Summary.Value(tag=tag, image=shown)])


def save_settings_row(run_dir: Path, algorithm: str, config: Any) -> None:
    """Write all settings to a separate event file; TensorBoard's table "HPARAMS" then has a row for this run.

    The file replaces the previous one: a resumed run may have other settings. `SummaryWriter.add_hparams` would make a
    second run of it, in another directory; the table needs only the start of a session. Settings that are None are left
    out, and the table shows nothing there.

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
    write_events(run_dir / SETTINGS_FILE, Event(summary=session_start))
