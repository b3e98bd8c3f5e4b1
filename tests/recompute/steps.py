"""What the algorithms have in common: columns of raw steps, episodes, one step of Adam."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests import recorded, reference
from tests.recompute.record import Recording, Update
from tests.recompute.report import Report, Series
from tests.reference import BFLOAT16, SINGLE, Numbers


def products(config: Any) -> float:
    """The unit roundoff of the factors in matrix products."""
    return BFLOAT16 if config.precision == "bfloat16" else SINGLE


def columns(recording: Recording) -> tuple[dict[str, NDArray[Any]], int]:
    """The raw steps as arrays (steps, N, ...), and how many steps there are."""
    rows = [
        {
            **dict(zip(("obs", "next_obs"), recorded.shown(steps), strict=True)),
            "action": np.array([step.action for step in steps]),
            "reward": np.array([step.reward for step in steps]),
            "terminated": np.array([step.terminated for step in steps]),
            "truncated": np.array([step.truncated for step in steps]),
        }
        for steps in recording.steps
    ]
    return {name: np.stack([row[name] for row in rows], axis=1) for name in rows[0]}, len(recording.steps[0])


def episodes(recording: Recording) -> Series:
    """The return and the length of each episode."""
    series: Series = {"charts/episodic_return": [], "charts/episodic_length": []}
    for steps in recording.steps:
        total = 0.0
        for t, step in enumerate(steps):
            total = step.reward + (total if step.number else 0.0)
            if step.terminated or step.truncated:
                now = (t + 1) * len(recording.steps)
                series["charts/episodic_return"].append((now, total, 1e-12 * (1 + abs(total))))
                series["charts/episodic_length"].append((now, step.number + 1.0, 0.0))
    return {tag: points for tag, points in series.items() if points}


def check_chain(report: Report, earlier: Update | None, update: Update) -> None:
    """Between two gradient steps nothing changes the network or the moments, whether acting, evaluation or resuming.

    (Statistics of observations do change: see `tests.recompute.of_ppo.check_statistics`.)
    """
    if earlier is None:
        return
    for name, value in update.before.networks[0].items():
        if not name.startswith("normalize."):
            report.same("weights from step to step", value, earlier.after.networks[0][name])
    for name, (m, v) in update.before.moments.items():
        report.same("moments from step to step", torch.stack([m, v]), torch.stack(earlier.after.moments[name]))


def check_step(
    report: Report,
    update: Update,
    learned: Numbers,
    learning_rate: float,
    eps: float,
    numbers: Any,
) -> None:
    """Compare the results, moments, weights and buffers of one gradient step with the expected ones.

    Args:
        learned: weights that are not frozen, before.
        numbers: `with_bounds` of all these.
    """
    for tag, result in update.result.items():
        if tag in numbers:  # not somebody's own
            report.compare(f"returned {tag}", result, *numbers[tag])
    after = update.after.networks[0]
    for name, weight in update.before.networks[0].items():
        if name in learned:
            m, v = update.after.moments[name]
            for kind, moment in (("m", m), ("v", v)):
                expected, bound = numbers[f"{kind} {name}"]
                if kind == "v":  # the square of a gradient that is all rounding, as a bias before a normalisation has
                    slope = numbers[f"m {name}"][1] / (1 - reference.BETA_1)
                    bound += (1 - reference.BETA_2) * slope**2
                report.compare(f"moment {kind}", (moment - expected).norm(), 0.0, bound)
            report.compare(
                "weights",
                after[name],
                *reference.adam_weights(weight, m, v, update.after.step, learning_rate, eps),
            )
        elif name in numbers:
            expected, bound = numbers[name]
            report.compare("buffers", (after[name] - expected).norm(), 0.0, bound)
        else:
            report.same("frozen weights", after[name], weight)


def check_result(report: Report, recording: Recording) -> None:
    """What `train` returns is the network after the last step."""
    for name, value in recording.updates[-1].after.networks[0].items():
        if not name.startswith("normalize."):
            report.same("the network that is returned", recording.result.state_dict()[name], value)
