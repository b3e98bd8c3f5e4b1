"""Trains, records the inputs and results of each update, and recomputes everything (`tests.reference`).

Every column of the rollouts or of the batches, every loss, moment, weight and buffer, and every TensorBoard tag but
the clock's (`charts/SPS`, `charts/minutes`) is compared.
"""

import functools
from pathlib import Path
from typing import Any

from minirl import dqn, ppo, q_learning
from tests.recompute.of_dqn import check_dqn
from tests.recompute.of_ppo import check_ppo
from tests.recompute.of_q_learning import check_q_learning
from tests.recompute.record import Case as Case
from tests.recompute.record import record
from tests.recompute.report import Report


def check(case: Case, folder: Path) -> Report:
    """Train, and recompute everything."""
    report = Report()
    recording = record(case, folder)
    checks: dict[Any, Any] = {
        ppo: check_ppo,
        dqn: functools.partial(check_dqn, log_every=case.log_every),
        q_learning: check_q_learning,
    }
    checks[case.module](case.config, recording, report)
    return report
