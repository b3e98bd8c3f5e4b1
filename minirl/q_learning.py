"""Tabular Q-learning (Watkins 1989; Sutton and Barto 2018, section 6.5).

    repeat for each episode, for each step:
        a  <- a random action with probability epsilon, else argmax_a Q(s, a)        epsilon_greedy
        take a, see r and s'
        Q(s, a) <- Q(s, a) + alpha (r + gamma max_a' Q(s', a') - Q(s, a))            q_update

Nothing follows a terminal state, so nothing is added for s' there; an episode that a time limit truncates would have
gone on, and keeps its gamma max Q(s', a').
"""

import functools
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from minirl.checks import ConfigError, described
from minirl.distributed import require_one_process
from minirl.envs.guard import Guard
from minirl.envs.ids import spec_of
from minirl.envs.make import make_bare_env, time_limit
from minirl.envs.vector import VectorEnv
from minirl.fast.machine import select_device
from minirl.results.video import Videos
from minirl.runs.checkpoints import State, reading, require_finite_losses
from minirl.runs.resume import env_state, saved_run, start_envs
from minirl.runs.run import Run, seed_everything
from minirl.runs.settings import check_settings, setting
from minirl.streams import MAX_SEED, Stream, derived_seed

QTable = NDArray[np.float64]  # (S, A)
LOG_EVERY = 100  # episodes, averaged: they are too short to log each
MAX_SWEEPS = 1_000_000  # of value iteration


@dataclass(frozen=True)
class QLearningConfig:
    """The settings of a run; the defaults are the source notebook's for its grid, except `initial_value`."""

    env_id: str = setting("minirl/GridWorld-v0", "environment with Discrete observations and actions", group="task")
    seed: int = setting(42, "seed of every random number", at_least=0, at_most=MAX_SEED)
    num_episodes: int = setting(10_000, "episodes to train for", at_least=1)
    alpha: float = setting(0.3, "learning rate, the step towards the target", above=0, at_most=1, group="learning")
    anneal_alpha: bool = setting(False, "lower alpha linearly to 0 at the end; noisy environments need it")
    gamma: float = setting(0.99, "discount factor", at_least=0, at_most=1)
    # The notebook's table starts at 0: then 8 of 300 seeds never learn the values of the path that they do not take,
    # with errors of up to 96. If it starts at the best reward, every action looks good until tried (Sutton and Barto
    # 2018, section 2.6), and 300 of 300 seeds end within 1e-8 of Q* (benchmarks/q_learning_seeds.py).
    initial_value: float = setting(100.0, "what the table starts as; 0 is the notebook's, and fails on some seeds")
    epsilon: float = setting(0.3, "probability of a random action", at_least=0, at_most=1, group="exploration")
    anneal_epsilon: bool = setting(False, "lower epsilon linearly to 0 at the end")
    checkpoint_frequency: int = setting(1_000_000, "steps between checkpoints", at_least=1, group="files")
    video_frequency: int | None = setting(None, "agent steps between games recorded as videos; none: never", at_least=1)

    def __post_init__(self) -> None:
        check_settings(self)


def epsilon_greedy(q_values: NDArray[np.float64], epsilon: float, rng: np.random.Generator | random.Random) -> int:
    """Return a random action with probability `epsilon`, else the first of the best.

    One random number u decides both: u < epsilon explores, and u / epsilon is then uniform in [0, 1).

    Args:
        q_values: (A,) Q(s, .) of one state.
        epsilon: between 0 and 1.
        rng: the generator; Python's own takes a tenth of NumPy's time for a single number.
    """
    u = rng.random()
    if u < epsilon:
        return int(u / epsilon * len(q_values))
    values: list[float] = q_values.tolist()  # Python compares a handful of numbers in a quarter of NumPy's time
    return values.index(max(values))


def q_update(
    q_table: QTable,
    state: int,
    action: int,
    reward: float,
    next_state: int,
    terminated: bool,
    *,
    alpha: float,
    gamma: float,
) -> float:
    """Move Q(s, a) towards its target, in place: Q(s, a) += alpha (r + gamma max_a' Q(s', a') - Q(s, a)).

    Args:
        q_table: (S, A).
        state: s.
        action: a.
        reward: r.
        next_state: s'.
        terminated: the episode really ended here, so no future value is added; False if it was only truncated.
        alpha: learning rate.
        gamma: discount factor.

    Returns:
        The TD error before the update, r + gamma max_a' Q(s', a') - Q(s, a).
    """
    reward = float(reward)  # a NumPy float32 would round the target
    target = reward if terminated else reward + gamma * max(q_table[next_state].tolist())
    value: float = q_table.item(state, action)
    td_error = target - value
    q_table[state, action] = value + alpha * td_error
    return td_error


def value_iteration(env: gym.Env[Any, Any], gamma: float, tolerance: float = 1e-12) -> QTable:
    """Return the exact Q* (S, A), the fixed point of Q(s, a) = sum_s' p(s'|s, a) (r + gamma max_a' Q(s', a')).

    Args:
        env: an environment with its model in `env.P[s][a] = [(probability, next_state, reward, terminated), ...]`.
        gamma: discount factor.
        tolerance: the largest change of an entry at which to stop, relative to the largest entry if that is above 1.

    Raises:
        ValueError: if the environment has no model, or the values grow without bound (gamma 1 and a rewarding loop).
    """
    model = getattr(env.unwrapped, "P", None)
    if model is None:
        raise ValueError(f"{env} has no model P: value iteration needs one")
    shape = len(model), len(model[0])
    # One row per possible outcome: its entry (s, a), its probability, and so on.
    outcomes = [(s * shape[1] + a, *outcome) for s, a in np.ndindex(shape) for outcome in model[s][a]]
    entry, probability, next_state, reward, terminated = (np.array(column) for column in zip(*outcomes, strict=True))
    goes_on = gamma * ~terminated.astype(bool)
    q_table: QTable = np.zeros(shape)
    for _ in range(MAX_SWEEPS):
        values = probability * (reward + goes_on * q_table.max(axis=1)[next_state])
        improved: QTable = np.zeros(shape)
        np.add.at(improved.reshape(-1), entry, values)
        if np.abs(improved - q_table).max() <= tolerance * max(1.0, np.abs(improved).max()):
            return improved
        q_table = improved
    raise ValueError("value iteration did not converge: with gamma 1, the best policy must come to an end")


def greedy_actions(q_table: QTable, states: NDArray[Any]) -> NDArray[np.int64]:
    """The first of the best actions: states (N,) -> (N,)."""
    actions: NDArray[np.int64] = q_table[states].argmax(axis=1)
    return actions


class Played(NamedTuple):
    """The totals of an episode: its return, its length in steps, and the sum of its |TD errors|."""

    episodic_return: float
    length: int
    total_error: float


def play_episode(
    env: Guard,
    q_table: QTable,
    rng: random.Random,
    alpha: float,
    gamma: float,
    epsilon: float,
    max_steps: int,
) -> Played:
    """Play one episode of at most `max_steps` and learn from each step. The table is updated in place."""
    episodic_return, length, total_error = 0.0, 0, 0.0
    state, _ = env.reset()
    ended = False
    while not ended:
        action = epsilon_greedy(q_table[state], epsilon, rng)
        next_state, reward, terminated, truncated, _ = env.step(action)
        td_error = q_update(q_table, state, action, reward, next_state, terminated, alpha=alpha, gamma=gamma)
        state = next_state
        episodic_return += reward
        length += 1
        total_error += abs(td_error)
        ended = terminated or truncated or length == max_steps
    return Played(episodic_return, length, total_error)


def means(played: Iterable[Played]) -> dict[str, float]:
    """Return the mean return, length and |TD error| of some episodes, by TensorBoard tag."""
    returns, lengths, total_errors = zip(*played, strict=True)
    return {
        "charts/episodic_return": sum(returns) / len(returns),
        "charts/episodic_length": sum(lengths) / len(lengths),
        "losses/td_error": sum(total_errors) / sum(lengths),
    }


def make_tabular_env(env_id: str) -> gym.Env[int, int]:
    """Make an environment whose observations and actions are integers from 0.

    Raises:
        ConfigError: if there is no such environment, or its observations or actions are something else.
    """
    env = make_bare_env(env_id)
    for name, space in [("observations", env.observation_space), ("actions", env.action_space)]:
        if not isinstance(space, gym.spaces.Discrete) or space.start != 0:
            raise ConfigError(f"--env-id must have Discrete {name} that count from 0 for a Q-table, not {space}")
    return env


def table_shape(env: gym.Env[int, int] | VectorEnv) -> tuple[int, int]:
    """Return the number of states and of actions."""
    states: Any = env.observation_space
    actions: Any = env.action_space
    return int(states.n), int(actions.n)


def new_table(env: gym.Env[int, int], value: float) -> QTable:
    """Return a Q-table (S, A) filled with this value.

    Raises:
        ConfigError: if it is larger than the machine's memory.
    """
    try:
        return np.full(table_shape(env), value)
    except (MemoryError, ValueError) as error:  # ValueError if its size in bytes overflows
        wanted = "so few states that a table of them fits into this machine's memory"
        raise ConfigError(f"--env-id must have {wanted}, not {table_shape(env)[0]:,}: {described(error)}") from error


def load_table(saved: State, env: gym.Env[int, int] | VectorEnv) -> QTable:
    """Return the Q-table of a checkpoint.

    Raises:
        ConfigError: if it does not have this environment's size.
    """
    with reading(saved):
        table: QTable = saved["q_table"].double().numpy()
        if table.shape != table_shape(env):
            raise ValueError(f"the environment has {table_shape(env)} states and actions, its table {table.shape}")
    return table


def train(
    config: QLearningConfig, *, run_dir: str | Path | None = None, resume: bool = False, device: str = "auto"
) -> QTable:
    """Train and return the Q-table (S, A).

    Args:
        config: the settings.
        run_dir: where checkpoints and TensorBoard events go; None writes nothing.
        resume: continue from the checkpoint in `run_dir`, as if the run had not stopped.
        device: checked as in the other algorithms but not used: the table is in the CPU's memory.

    Raises:
        ConfigError: if the environment or the run directory can't be used.
        EnvError: if the environment fails.
        KeyboardInterrupt: on Ctrl-C, after saving; its subclass `Stopped` on SIGTERM, SIGHUP or a closed stderr.
    """
    require_one_process("Q-learning")
    select_device(device)
    keys = ("q_table", "episode", "recent", "rng", "envs", "obs")
    run_dir, saved = saved_run("q_learning", config, run_dir, resume, *keys)
    seed_everything(config.seed)
    # A vector of one, because checkpoints save that; the loop steps the environment inside directly, which is faster.
    envs = VectorEnv(functools.partial(make_tabular_env, config.env_id), 1, num_workers=1)
    guard, max_steps = envs.local_envs[0], time_limit(spec_of(config.env_id))
    env = guard.env
    q_table = new_table(env, config.initial_value)
    # Not the seed itself, which is the environment's: exploration would correlate with its noise.
    rng = random.Random(derived_seed(config.seed, Stream.EXPLORATION))
    episode = global_step = 0
    recent: deque[Played] = deque(maxlen=LOG_EVERY)
    if saved is not None:
        with reading(saved):
            q_table = load_table(saved, env)
            rng.setstate((random.Random.VERSION, tuple(saved["rng"].tolist()), None))
            episode, global_step = int(saved["episode"]), saved["global_step"]
            recent.extend(Played(*numbers) for numbers in saved["recent"])
    videos = Videos(config, run_dir, global_step, one_hot=False)
    obs = start_envs(envs, config.seed, saved)
    greedy = functools.partial(greedy_actions, q_table)

    def state() -> State:
        return {
            "q_table": torch.tensor(q_table),
            "episode": episode,
            "recent": [list(played) for played in recent],
            "rng": np.array(rng.getstate()[1], np.uint32),
            **env_state(envs, obs),
        }

    total = config.num_episodes
    with envs, Run("q_learning", config, run_dir, total=total, done=episode, unit="episodes", resumed=saved) as run:
        run.checkpoint(global_step, state)
        while episode < total:
            remaining = 1 - episode / total
            alpha = config.alpha * (remaining if config.anneal_alpha else 1)
            epsilon = config.epsilon * (remaining if config.anneal_epsilon else 1)
            played = play_episode(guard, q_table, rng, alpha, config.gamma, epsilon, max_steps)
            episode += 1
            require_finite_losses({"losses/td_error": played.total_error}, "episode", episode)
            global_step += played.length
            recent.append(played)
            run.returns.append(played.episodic_return)
            if episode % LOG_EVERY == 0 or episode == total:
                run.log(global_step, means(recent), done=episode)
            videos.record(run, global_step, greedy)
            run.checkpoint(global_step, state, finished=episode == total)
    return q_table
