"""Double DQN's agent steps per second against Stable-Baselines3's DQN, whole training with the same settings.

    python benchmarks/dqn_speed.py pong        batch 32, an update every 4 steps
    python benchmarks/dqn_speed.py cartpole    24 x 24, batch 32, an update every step

Both train in turn, each in a process of its own. The clock runs from one agent step to a later one of the same run, so
that start-up, the first steps without updates and compilation drop out. The ratio is taken pair by pair. Exit status 1
if the median ratio is below the goal.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

PAIRS = 3


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
    "pong": Work("PongNoFrameskip-v4", 4, 1000, 500, 1000, 4000, goal=2.0),
    "cartpole": Work("CartPole-v1", 1, 500, 500, 2000, 12_000, goal=2.0),
}
BATCH_SIZE = 32
BUFFER_SIZE = 10_000
LEARNING_RATE = 1e-4
EPSILON = 0.05


def train_minirl(work: Work) -> float:
    """Train with this project and return the seconds; plays no games beside the training."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from minirl.dqn import DQNConfig, train

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
            compile=True,  # as a long run would; these are too short for it to be chosen
        )
        train(config, run_dir=f"{parent}/run")
        events = EventAccumulator(f"{parent}/run")
        events.Reload()
        minutes: dict[int, float] = {point.step: point.value for point in events.Scalars("charts/minutes")}
    return 60 * (minutes[work.clock_to] - minutes[work.clock_from])


def train_sb3(work: Work) -> float:
    """Train with Stable-Baselines3 and return the seconds."""
    from stable_baselines3 import DQN
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

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
    return times[work.clock_to] - times[work.clock_from]


SIDES = {"minirl": train_minirl, "sb3": train_sb3}


def steps_per_second(side: str, name: str) -> float:
    """Train in a process of its own and return its speed; a compilation that fails is an error here."""
    command = [sys.executable, "-W", "error:compilation failed", __file__, name, "--side", side]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(result.stdout.splitlines()[-1])


def main() -> None:
    """Measure pairs in turn and print them."""
    parser = argparse.ArgumentParser(description="Double DQN's speed against Stable-Baselines3's.")
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--side", choices=SIDES, help="measure one side here, and print its steps per second")
    arguments = parser.parse_args()
    work = WORKS[arguments.work]
    if arguments.side:
        print((work.clock_to - work.clock_from) / SIDES[arguments.side](work))
        return
    ratios = []
    for pair in range(1, PAIRS + 1):
        theirs, ours = (steps_per_second(side, arguments.work) for side in ("sb3", "minirl"))
        ratios.append(ours / theirs)
        print(f"pair {pair}: Stable-Baselines3 {theirs:,.0f}, minirl {ours:,.0f} steps a second: {ratios[-1]:.2f} x")
    median = statistics.median(ratios)
    print(f"median ratio {median:.2f} (goal: {work.goal})")
    if median < work.goal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
