"""Q-learning, recomputed."""

import math
from collections import defaultdict
from typing import Any

import torch

from tests import reference
from tests.recompute.record import Recording
from tests.recompute.report import UNLIKELY, Report, Series


def check_q_learning(config: Any, recording: Recording, report: Report, log_every: int = 100) -> None:
    """Compare a run of Q-learning, step by step: float64 on both sides."""
    table = torch.full((8, 3), config.initial_value, dtype=torch.float64)
    expected: Series = defaultdict(list)
    explored, chance, variance = 0, 0.0, 0.0
    games: list[tuple[float, list[float]]] = []  # the return and the TD errors of each
    total, errors = 0.0, list[float]()
    for now, step in enumerate(recording.steps[0], start=1):
        remaining = 1 - len(games) / config.num_episodes
        alpha = config.alpha * (remaining if config.anneal_alpha else 1)
        epsilon = config.epsilon * (remaining if config.anneal_epsilon else 1)
        values = table[step.obs]
        explored += bool(values[step.action] < values.max())
        other = epsilon * (1 - 1 / len(values))
        chance, variance = chance + other, variance + other * (1 - other)
        transition = (step.obs, step.action, step.reward, step.next_obs, step.terminated)
        errors += reference.q_learning(table, [transition], [alpha], config.gamma)
        total += step.reward
        if not (step.terminated or step.truncated):
            continue
        games.append((total, errors))
        total, errors = 0.0, []
        if len(games) % log_every == 0 or len(games) == config.num_episodes:
            returns, of_steps = zip(*games[-log_every:], strict=True)
            all_errors = [abs(error) for of_game in of_steps for error in of_game]
            expected["charts/episodic_return"].append((now, sum(returns) / len(returns), 1e-9))
            expected["charts/episodic_length"].append((now, len(all_errors) / len(returns), 1e-9))
            expected["losses/td_error"].append((now, sum(all_errors) / len(all_errors), 1e-9))
    report.same("episodes", len(games), config.num_episodes)
    # Among equal values the first is taken: the exploration that can be recognised may be less than there was.
    report.compare("explored", explored, chance, UNLIKELY * math.sqrt(variance) + 1e-9)
    report.compare("table", recording.result, table, 1e-9 * (1 + table.abs()))
    report.series(recording.logged, expected)
