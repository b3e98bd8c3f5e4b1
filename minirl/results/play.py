"""Playing games with a fixed policy, without learning: for evaluation, during training and after."""

import statistics
import time
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from minirl.envs.make import make_envs_of
from minirl.envs.vector import VectorEnv
from minirl.runs.checkpoints import untouched_random_state
from minirl.runs.progress import Progress
from minirl.runs.run import seed_everything
from minirl.streams import Stream, derived_seed

Policy = Callable[[NDArray[Any]], NDArray[Any]]  # observations (N, ...) -> actions (N, ...)

SIDE_BY_SIDE = 8  # games played at once; fixed, so that a seed gives the same games on every machine


def play_games(
    policy: Policy, envs: VectorEnv, episodes: int, seed: int, progress: Progress | None = None, patience: float = inf
) -> list[float]:
    """Play `episodes` games in the environments and return their returns, environment by environment.

    Each environment plays its fixed share. Taking whichever games end first would favour short ones.

    Raises:
        TimeoutError: if they take longer than `patience`, in seconds.
    """
    deadline = time.monotonic() + patience
    shares = [len(range(i, episodes, envs.num_envs)) for i in range(envs.num_envs)]
    returns: list[list[float]] = [[] for _ in shares]
    obs = envs.reset(seed=seed)
    while (played := sum(map(len, returns))) < episodes:
        if time.monotonic() > deadline:
            raise TimeoutError(f"they take more than {patience:.0f} seconds")
        if progress is not None:
            progress.update(played)
        step = envs.step(policy(obs))
        for episode in step.episodes:
            if len(returns[episode.env_index]) < shares[episode.env_index]:
                returns[episode.env_index].append(episode.episodic_return)
        obs = step.observations
    if progress is not None:
        progress.update(episodes)
    return [value for games in returns for value in games]


class Evaluator:
    """Plays a few games at intervals during training, to tell how good the policy is without exploration.

    It has its own environments and changes nothing in the training. The games are new each time, and not those that
    `minirl.evaluate` reports: a network that is picked for its luck in them gains nothing there.

    A network that beats the best so far must confirm it in more games. Of networks that fail one game in twenty, a
    third win twenty games in a row, and of many that are evaluated, the best-looking one is likely to be one of those.

    Args:
        config: the training's settings. Every `eval_frequency` agent steps (None: never) it plays `eval_episodes`
            games, and `confirm_episodes` more.
        run_dir: where the best network is saved; None for no games at all.
    """

    def __init__(self, config: Any, run_dir: Path | None) -> None:
        self.config = config
        self.frequency: int | None = None if run_dir is None else config.eval_frequency
        self.envs: VectorEnv | None = None
        if self.frequency is not None:
            side_by_side = min(max(config.eval_episodes, config.confirm_episodes), SIDE_BY_SIDE)
            with untouched_random_state():  # environments may draw while they are made
                self.envs = make_envs_of(config, side_by_side)

    def __enter__(self) -> "Evaluator":
        return self

    def __exit__(self, *_: object) -> None:
        if self.envs is not None:
            self.envs.close()

    def is_due(self, step_before: int, global_step: int, *, finished: bool) -> bool:
        """Whether a multiple of the frequency was reached since `step_before`, or training ends here."""
        if self.frequency is None:
            return False
        return finished or global_step // self.frequency > step_before // self.frequency

    def mean_return(self, policy: Policy, global_step: int, *, to_beat: float) -> float:
        """Play, with more games if the mean return is above `to_beat`; return the mean over all of them."""
        assert self.envs is not None
        purposes = (Stream.EVALUATION, Stream.CONFIRMATION)
        seed, more_seed = (derived_seed(self.config.seed, purpose, global_step) for purpose in purposes)
        with untouched_random_state():  # or games that draw from the global generators would change the training
            seed_everything(seed)
            returns = play_games(policy, self.envs, self.config.eval_episodes, seed)
            if statistics.fmean(returns) > to_beat:
                returns += play_games(policy, self.envs, self.config.confirm_episodes, more_seed)
        return statistics.fmean(returns)
