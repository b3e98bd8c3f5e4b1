"""What holds for every test."""

import signal
from collections.abc import Iterator
from types import FrameType

import pytest

PATIENCE = 240  # seconds; the slowest test takes a quarter of that


@pytest.fixture(autouse=True)
def _no_test_hangs() -> Iterator[None]:
    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the test hung for {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
