"""What a long piece of work says while it lasts, on standard error: how far it is, and a line here and there."""

import datetime
import os
import sys
import time
from typing import TextIO

from tqdm import tqdm

from minirl.checks import ConfigError


def say(text: str) -> bool:
    """Write a line to standard error, from any thread or signal handler; return whether it can still be written.

    A signal may come while another line is on its way, which Python answers with "reentrant call": then it is not said.
    """
    try:
        print(f"{text}\n", end="", file=sys.stderr, flush=True)  # in one piece: several threads may speak
    except RuntimeError:
        return True
    except OSError:
        silence(sys.stderr.fileno())
        return False
    return True


def silence(number: int) -> None:
    """Let standard error or output, by its number, lead nowhere: it can't be written, and Python would go on trying."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    if nowhere != number:  # it was closed
        os.close(nowhere)


def open_streams() -> None:
    """Let standard output and error lead nowhere where they are closed: a file would get their number, and be written.

    Some job schedulers and `pythonw` start programs in that way.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            silence(number)
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115 - for good


def answer(text: object) -> None:
    """Print a result to standard output.

    Raises:
        ConfigError: if it can't be written: it is full, say.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        silence(sys.stdout.fileno())
        raise ConfigError(f"standard output must take the result, and can't be written: {error}") from error


class Progress:
    """Show progress on standard error: a bar on a terminal, a plain line every few seconds anywhere else.

    `update` raises OSError where that can't be written any more; a bar on a terminal that was closed just ends.

    Args:
        total: when the work is done, in `unit`.
        done: how much of it an earlier session did.
        unit: what is counted, "steps" say.
        interval: seconds between plain lines.
        stream: where to.
        shown: whether anything is.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        unit: str = "steps",
        interval: float = 5.0,
        stream: TextIO | None = None,
        shown: bool = True,
    ) -> None:
        self.total = total
        self.done = self.done_at_start = done
        self.unit = unit
        self.interval = interval
        open_streams()
        self.stream = sys.stderr if stream is None else stream
        self.started = self.last_line = time.monotonic()
        self.shown = shown
        self.bar = None
        if shown and self.stream.isatty():
            self.bar = tqdm(total=total, initial=done, unit=f" {unit}", file=self.stream, dynamic_ncols=True)

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Say that `done` of the total, which may be another one from now on, is done; `note` follows on the line."""
        self.total = self.total if total is None else total
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(done - self.done)
        just_finished = done >= self.total > self.done
        self.done = done
        if self.shown and self.bar is None and (just_finished or time.monotonic() - self.last_line >= self.interval):
            self.last_line = time.monotonic()
            print(self._line(note), file=self.stream, flush=True)

    def per_second(self) -> float:
        """Return how much was done a second since this session began."""
        return (self.done - self.done_at_start) / max(time.monotonic() - self.started, 1e-9)

    def _line(self, note: str) -> str:
        speed = self.per_second()
        clock = datetime.timedelta(seconds=int(max(self.total - self.done, 0) / speed)) if speed > 0 else "unknown time"
        line = f"{self.done:,} of {self.total:,} {self.unit}, {self.per_second():,.0f} a second, {clock} left"
        return f"{line}, {note}" if note else line

    def close(self) -> None:
        """Leave the bar as it is and go to a new line."""
        if self.bar is not None:
            self.bar.close()
