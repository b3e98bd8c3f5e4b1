"""Evaluation during training: which games are played, how many, and when."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from minirl.dqn import DQNConfig
from minirl.envs.vector import VectorEnv
from minirl.results.play import Evaluator


def judge_of(episodes: int, more: int, frequency: int | None = 10) -> Evaluator:
    config = DQNConfig(eval_episodes=episodes, confirm_episodes=more, eval_frequency=frequency)
    return Evaluator(config, Path("run"))


def test_the_judges_games_are_new_each_time_and_not_those_reported() -> None:
    with judge_of(3, 0) as evaluator:
        seen = []

        def policy(obs: NDArray[Any]) -> NDArray[np.int64]:
            seen.append(obs[0].tolist())
            return np.zeros(len(obs), np.int64)

        starts = []
        for step in (10, 20, 10):
            seen.clear()
            evaluator.mean_return(policy, step, to_beat=0.0)
            starts.append(seen[0])
    assert starts[0] == starts[2] != starts[1]


@pytest.mark.parametrize(("to_beat", "games"), [(-math.inf, 7), (9.6, 7), (29 / 3, 3), (9.7, 3), (500.0, 3)])
def test_only_who_seems_better_than_the_best_plays_more_games(
    to_beat: float, games: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = []

    def play(policy: Any, envs: VectorEnv, episodes: int, seed: int) -> list[float]:
        played.append((episodes, seed))
        return [9.0, 10.0, 10.0] if episodes == 3 else [1.0, 2.0, 3.0, 7.0]

    monkeypatch.setattr("minirl.results.play.play_games", play)
    with judge_of(3, 4) as evaluator:
        mean_return = evaluator.mean_return(lambda obs: np.zeros(len(obs), np.int64), 10, to_beat=to_beat)
    assert mean_return == pytest.approx(29 / 3 if games == 3 else 42 / 7)
    assert sum(episodes for episodes, _ in played) == games
    assert len({seed for _, seed in played}) == len(played), "the same games would confirm anything"


def test_when_the_judge_is_due() -> None:
    with judge_of(1, 0) as evaluator:
        assert [evaluator.is_due(a, b, finished=False) for a, b in [(8, 9), (9, 10), (10, 11), (8, 12)]] == [0, 1, 0, 1]
        assert evaluator.is_due(10, 11, finished=True)
    with judge_of(1, 0, frequency=None) as never:
        assert not never.is_due(9, 10, finished=True)
    with Evaluator(DQNConfig(), None) as never:
        assert not never.is_due(9_999, 10_000, finished=True), "a best network without a place for it"
