"""What a long job prints to standard error while it runs: its progress, and single lines."""

import datetime
import io
import os
import sys
import time
from typing import TextIO

from tqdm import tqdm

from minirl.checks import ConfigError

INTERVAL = 5.0  # seconds between plain lines


def say(text: str) -> bool:
    """Write a line to standard error, from any thread or signal handler; return whether it can still be written.

    If a signal comes while another line is being written, Python raises "reentrant call", and this line is dropped.
    """
    try:
        print(f"{text}\n", end="", file=sys.stderr, flush=True)  # in one piece: several threads may write
    except RuntimeError:
        return True
    except OSError:
        silence(sys.stderr.fileno())
        return False
    return True


def silence(number: int) -> None:
    """Send standard output or error, by its number, nowhere: it can't be written, and Python would keep trying."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    if nowhere != number:  # the stream was closed
        os.close(nowhere)


def open_streams() -> None:
    """Send standard output and error nowhere if they are closed: a file would get their number and their output.

    Some job schedulers and `pythonw` start programs with them closed. What standard output's encoding lacks is escaped,
    as Python does in standard error.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            silence(number)
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115 - for good
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def answer(text: object) -> None:
    """Print a result to standard output.

    Raises:
        ConfigError: if it can't be written, for example because the disk is full.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        silence(sys.stdout.fileno())
        raise ConfigError(f"standard output must take the result, and can't be written: {error}") from error


class Progress:
    """Show progress on standard error: a bar on a terminal, a plain line every few seconds anywhere else.

    A bar on a terminal that was closed just ends.

    Args:
        total: the whole amount of work, in `unit`.
        done: how much of it an earlier session did.
        unit: what is counted, such as "steps".
        stream: where to write.
        shown: whether anything is shown.
    """

    def __init__(
        self, total: int, *, done: int = 0, unit: str = "steps", stream: TextIO | None = None, shown: bool = True
    ) -> None:
        self.total = total
        self.done = self.done_at_start = done
        self.unit = unit
        open_streams()
        self.stream = sys.stderr if stream is None else stream
        self.started = self.last_line = time.monotonic()
        self.shown = shown
        self.bar = None
        if shown and self.stream.isatty():
            self.bar = tqdm(total=total, initial=done, unit=f" {unit}", file=self.stream, dynamic_ncols=True)

    def update(self, done: int, note: str = "", total: int | None = None) -> bool:
        """Show that `done` of the total is done, with `note` at the end of the line; `total` changes the total.

        Returns:
            Whether it can still be written.
        """
        try:
            self._show(done, note, total)
        except OSError:
            silence(self.stream.fileno())
            return False
        return True

    def _show(self, done: int, note: str, total: int | None) -> None:
        self.total = self.total if total is None else total
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.done)
        just_finished = done >= self.total > self.done
        self.done = done
        if self.shown and self.bar is None and (just_finished or time.monotonic() - self.last_line >= INTERVAL):
            self.last_line = time.monotonic()
            print(self._line(note), file=self.stream, flush=True)

    def _line(self, note: str) -> str:
        speed = (self.done - self.done_at_start) / max(time.monotonic() - self.started, 1e-9)
        clock = datetime.timedelta(seconds=int(max(self.total - self.done, 0) / speed)) if speed > 0 else "unknown time"
        line = f"{self.done:,} of {self.total:,} {self.unit}, {speed:,.0f} a second, {clock} left"
        return f"{line}, {note}" if note else line

    def close(self) -> None:
        """Leave the bar as it is and go to a new line."""
        if self.bar is not None:
            self.bar.close()
