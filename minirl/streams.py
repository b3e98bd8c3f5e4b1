"""Seeds: one for a run, and independent random streams derived from it, one for each purpose."""

from enum import IntEnum

import numpy as np

MAX_SEED = 2**31 - 1


class Stream(IntEnum):
    """What random numbers are for: the first number of a stream's spawn key."""

    EXPLORATION = 1
    EVALUATION = 2
    RESUMED = 3  # new episodes of a run whose environments could not be saved
    VIDEO = 4
    CONFIRMATION = 5  # further games of a network that may be the best so far
    SPACES = 6  # samples of an environment's spaces
    PAIR_ORDER = 7
    TEXTS = 8
    RANK = 9
    WORKER = 10


def derived_seed(seed: int, purpose: Stream, *numbers: int) -> int:
    """Return a seed for a purpose, independent of `seed`, of the seeds near it and of those for other purposes."""
    sequence = np.random.SeedSequence(seed, spawn_key=(purpose, *numbers))
    return int(sequence.generate_state(1)[0]) % MAX_SEED
