"""Training runs that share a machine take turns if each computes with more than half of its cores.

Threads wait for each other at the end of each layer. Two runs with a thread per core mostly wait for threads that have
no core: together they make a tenth of the progress that one makes alone. In turns, they make as much.
"""

import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

from minirl.distributed import rank, world_size
from minirl.envs.vector import available_cores

if sys.platform != "win32":
    import fcntl

TURN = 0.1  # minimum seconds of a turn: changing takes one or two thousandths
NAP = 1e-3  # seconds between two checks of whose turn it is
PATIENCE = 60.0  # seconds; a run whose turn lasts longer may have been stopped, for example by Ctrl-Z
LOOK = 20.0  # seconds over which a run measures whether it has its cores
WAITED = 0.25  # the share of them without a core that is worth a warning


class Turns:
    """A run's turns at the cores; within the block it has one, and `pass_on` gives it to a run that waits.

    Only if `threads` are more than half of the cores: smaller runs fit side by side. The runs of one user on the same
    cores take turns, by two files in the directory for temporary files: the run that computes has locked one, the next
    run the other. (Without the second, the run that just computed would be back before a waiting one wakes up.) The
    system unlocks the files of a process that ends. The results do not depend on turns.

    It warns once if other processes have the cores for much of the time.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.turn = self.next = -1  # file descriptors
        self.began = 0.0  # when this turn began
        self.waited = 0.0  # seconds, for all turns so far
        self.looked: tuple[float, float] | None = None  # the time, and the seconds without a core, at the last check
        self.told = threads == 1 or rank() > 0

    def __enter__(self) -> "Turns":
        if available_cores() // 2 < self.threads > 1 and world_size() == 1 and sys.platform != "win32":
            try:
                self.turn = os.open(place("turn"), os.O_RDWR | os.O_CREAT, 0o600)
                self.next = os.open(place("next"), os.O_RDWR | os.O_CREAT, 0o600)
                self._wait()
            except OSError:  # no such directory, another user's file, no such locks there: then nobody waits
                self._leave()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def pass_on(self) -> None:
        """If the turn was long enough, let waiting runs compute, and wait for the next turn."""
        if time.monotonic() - self.began >= TURN:
            if self.turn >= 0:
                fcntl.flock(self.turn, fcntl.LOCK_UN)
            self._wait()
        self._look_at_cores()

    def _leave(self) -> None:
        for file in (self.turn, self.next):
            if file >= 0:
                os.close(file)
        self.turn = self.next = -1

    def _wait(self) -> None:
        """Wait until it is this run's turn."""
        asked = time.monotonic()
        if self.turn >= 0:
            mine = self._lock(self.next) and self._lock(self.turn)
            fcntl.flock(self.next, fcntl.LOCK_UN)
            if mine:
                os.utime(self.turn)  # the turn begins
        self.began = time.monotonic()
        self.waited += self.began - asked

    def _lock(self, file: int) -> bool:
        """Lock a file, or give up if another run has its turn for too long; return whether it is locked."""
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.time() - os.fstat(self.turn).st_mtime > PATIENCE:
                    return False
            time.sleep(NAP)

    def _look_at_cores(self) -> None:
        if self.told or (self.looked is not None and time.monotonic() - self.looked[0] < LOOK):
            return
        before, self.looked = self.looked, (time.monotonic(), self.waited + seconds_without_core())
        if before is None:
            return
        clock, waited = (now - then for now, then in zip(self.looked, before, strict=True))
        if waited > WAITED * clock:
            self.told = True
            why = f"its {self.threads} threads go on together or not at all"
            advice = "--num-threads 1 may be faster, at --resume, too"
            share = f"{waited / clock:.0%}"
            warnings.warn(f"others have this run's cores {share} of the time, and {why}; {advice}", stacklevel=1)


def place(name: str) -> Path:
    """Return the file of this user and these cores."""
    cores = sum(1 << core for core in os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return Path(tempfile.gettempdir()) / f"minirl-{os.getuid()}-{cores:x}.{name}"


def seconds_without_core() -> float:
    """Return for how long this thread was ready to run but had no core, since it began; 0.0 if the system does not say.

    Linux does. Waiting for something else, such as a message, does not count, nor does spinning, which has a core.
    """
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0
