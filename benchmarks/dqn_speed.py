"""Double DQN's agent steps per second against Stable-Baselines3's DQN, in whole training runs with the same settings.

    python benchmarks/dqn_speed.py pong        batch 32, an update every 4 steps
    python benchmarks/dqn_speed.py cartpole    24 x 24, batch 32, an update every step

Both train in turn, each in its own process (`pairs.py`). The clock runs from one agent step to a later one of the same
run, so that start-up, the first steps without updates and compilation are not timed; they are printed separately. Exit
status 1 if the median ratio is below the goal.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from pairs import Timing, compare, report, seconds_between


class Work(NamedTuple):
    """What both sides train."""

    env_id: str
    train_frequency: int
    target_frequency: int
    learning_starts: int
    clock_from: int  # agent steps
    clock_to: int
    goal: float


WORKS = {
    "pong": Work("PongNoFrameskip-v4", 4, 1000, 500, 1000, 4000, goal=2.5),
    "cartpole": Work("CartPole-v1", 1, 500, 500, 2000, 12_000, goal=5.0),
}
BATCH_SIZE = 32
BUFFER_SIZE = 10_000
LEARNING_RATE = 1e-4
EPSILON = 0.05


def train_minirl(work: Work) -> Timing:
    """Train with this project, without evaluation games."""
    from minirl.dqn import DQNConfig, train

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as parent:
        config = DQNConfig(
            env_id=work.env_id,
            total_timesteps=work.clock_to,
            learning_rate=LEARNING_RATE,
            anneal_lr=False,
            huber=True,
            max_grad_norm=10.0,
            buffer_size=BUFFER_SIZE,
            batch_size=BATCH_SIZE,
            learning_starts=work.learning_starts,
            train_frequency=work.train_frequency,
            target_network_frequency=work.target_frequency,
            tau=1.0,
            start_epsilon=EPSILON,
            end_epsilon=EPSILON,
            eval_frequency=None,
            checkpoint_frequency=work.clock_to,
            compile=True,  # as a long run would; these are too short to choose it
        )
        train(config, run_dir=Path(parent) / "run")
        total = time.perf_counter() - started
        seconds = seconds_between(Path(parent) / "run", work.clock_from, work.clock_to)
    return Timing(seconds, total - seconds)


def train_sb3(work: Work) -> Timing:
    """Train with Stable-Baselines3."""
    from stable_baselines3 import DQN
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

    started = time.perf_counter()
    pixels = "NoFrameskip" in work.env_id
    env: VecEnv
    if pixels:
        import ale_py
        import gymnasium

        gymnasium.register_envs(ale_py)
        env = VecFrameStack(make_atari_env(work.env_id, n_envs=1, seed=0), n_stack=4)
    else:
        env = make_vec_env(work.env_id, n_envs=1, seed=0)
    model = DQN(
        "CnnPolicy" if pixels else "MlpPolicy",
        env,
        learning_rate=LEARNING_RATE,
        buffer_size=BUFFER_SIZE,
        learning_starts=work.learning_starts,
        batch_size=BATCH_SIZE,
        train_freq=work.train_frequency,
        gradient_steps=1,
        target_update_interval=work.target_frequency,
        exploration_initial_eps=EPSILON,
        exploration_final_eps=EPSILON,
        max_grad_norm=10.0,
        policy_kwargs=None if pixels else {"net_arch": [24, 24]},
        device="auto",
        seed=0,
    )
    times: dict[int, float] = {}

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps in (work.clock_from, work.clock_to):
                times[self.num_timesteps] = time.perf_counter()
            return True

    model.learn(work.clock_to, callback=Clock())
    return Timing(times[work.clock_to] - times[work.clock_from], times[work.clock_from] - started)


SIDES = {"minirl": train_minirl, "stable-baselines3": train_sb3}


def main() -> None:
    """Measure pairs in turn and print them."""
    parser = argparse.ArgumentParser(description="Double DQN's speed against Stable-Baselines3's.")
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="measure one side here")
    arguments = parser.parse_args()
    work = WORKS[arguments.work]
    if arguments.side:
        report(SIDES[arguments.side](work), work.clock_to - work.clock_from)
        return
    name = f"dqn-{arguments.work}"
    pairs = arguments.pairs
    if not compare(
        name, __file__, "stable-baselines3", work.goal, pairs, lambda side: [arguments.work, "--side", side]
    ):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
