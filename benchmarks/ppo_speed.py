"""PPO's agent steps per second against Stable-Baselines3's, in whole training runs with the same settings.

    python benchmarks/ppo_speed.py pong            the source notebook's settings; bfloat16 if that is faster
    python benchmarks/ppo_speed.py pong-float32    the same in float32
    python benchmarks/ppo_speed.py cartpole        8 environments
    python benchmarks/ppo_speed.py pendulum        continuous actions, 4 environments
    python benchmarks/ppo_speed.py halfcheetah-1   MuJoCo, observations and rewards normalised, on both sides
    python benchmarks/ppo_speed.py halfcheetah-8   the same with 8 environments

Both train in turn, each in its own process (`pairs.py`). The clock runs from one agent step to a later one of the same
run, so that start-up and compilation are not timed; they are printed separately. Exit status 1 if the median ratio is
below the goal.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pairs import Timing, compare, report, seconds_between

if TYPE_CHECKING:
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecEnv

    from minirl.ppo import PPOConfig


class Work(NamedTuple):
    """What both sides train: minirl's settings, from which Stable-Baselines3's are derived."""

    settings: dict[str, Any]
    clock_from: int  # agent steps; with clock_to, multiples of num_envs * num_steps
    clock_to: int
    goal: float


CARTPOLE = {
    "env_id": "CartPole-v1",
    "num_steps": 32,
    "learning_rate": 1e-3,
    "gamma": 0.98,
    "gae_lambda": 0.8,
    "clip_coef": 0.2,
    "update_epochs": 10,
    "ent_coef": 0.0,
}
PENDULUM = {
    "env_id": "Pendulum-v1",
    "num_envs": 4,
    "num_steps": 1024,
    "minibatch_size": 64,
    "learning_rate": 1e-3,
    "gamma": 0.9,
    "gae_lambda": 0.95,
    "clip_coef": 0.2,
    "update_epochs": 10,
    "ent_coef": 0.0,
}
CHEETAH = {
    **PENDULUM,
    "env_id": "HalfCheetah-v5",
    "num_envs": 1,
    "num_steps": 2048,
    "learning_rate": 3e-4,
    "gamma": 0.99,
    "norm_obs": True,
    "norm_reward": True,
}
WORKS = {
    "pong": Work({}, 2 * 1024, 12 * 1024, goal=3.0),
    "pong-float32": Work({"precision": "float32"}, 2 * 1024, 12 * 1024, goal=1.6),
    "cartpole": Work(CARTPOLE, 10 * 256, 110 * 256, goal=3.0),
    "pendulum": Work(PENDULUM, 2 * 4096, 12 * 4096, goal=2.5),
    "halfcheetah-1": Work(CHEETAH, 2 * 2048, 12 * 2048, goal=2.5),
    "halfcheetah-8": Work({**CHEETAH, "num_envs": 8, "minibatch_size": 512}, 2 * 16384, 6 * 16384, goal=2.5),
}


def train_minirl(work: Work) -> Timing:
    """Train with this project."""
    from minirl.ppo import PPOConfig, train

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as parent:
        # Compiled as a long run would be: these are too short to choose it.
        config = PPOConfig(total_timesteps=work.clock_to, compile=True, **work.settings)
        train(config, run_dir=Path(parent) / "run")
        total = time.perf_counter() - started
        seconds = seconds_between(Path(parent) / "run", work.clock_from, work.clock_to)
    return Timing(seconds, total - seconds)


def train_sb3(work: Work) -> Timing:
    """Train with Stable-Baselines3."""
    from stable_baselines3.common.callbacks import BaseCallback

    from minirl.ppo import PPOConfig

    config = PPOConfig(total_timesteps=work.clock_to, **work.settings)
    started = time.perf_counter()
    model = sb3_ppo(config, sb3_envs(config, seed=0), seed=0)
    times: dict[int, float] = {}

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            times[self.num_timesteps] = time.perf_counter()

    model.learn(work.clock_to, callback=Clock())
    return Timing(time.perf_counter() - times[work.clock_from], times[work.clock_from] - started)


def sb3_envs(config: "PPOConfig", seed: int) -> "VecEnv":
    """Make Stable-Baselines3's environments, normalised as the settings say."""
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    if "NoFrameskip" in config.env_id:
        import ale_py
        import gymnasium

        gymnasium.register_envs(ale_py)
        return VecFrameStack(make_atari_env(config.env_id, n_envs=config.num_envs, seed=seed), n_stack=4)
    envs = make_vec_env(config.env_id, n_envs=config.num_envs, seed=seed)
    if not (config.norm_obs or config.norm_reward):
        return envs
    return VecNormalize(envs, norm_obs=config.norm_obs, norm_reward=config.norm_reward, gamma=config.gamma)


def sb3_ppo(config: "PPOConfig", envs: "VecEnv", seed: int) -> "PPO":
    """Make Stable-Baselines3's PPO with the same settings."""
    from stable_baselines3 import PPO
    from torch import nn

    rate, clip = config.learning_rate, config.clip_coef
    networks = {
        "net_arch": list(config.hidden_sizes),
        "activation_fn": {"tanh": nn.Tanh, "relu": nn.ReLU}[config.activation],
        "log_std_init": config.log_std_init,
    }
    pixels = len(envs.observation_space.shape or ()) == 3
    return PPO(
        "CnnPolicy" if pixels else "MlpPolicy",
        envs,
        learning_rate=(lambda remaining: rate * remaining) if config.anneal_lr else rate,
        n_steps=config.num_steps,
        batch_size=config.minibatch_size,
        n_epochs=config.update_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_range=(lambda remaining: clip * remaining) if config.anneal_clip else clip,
        ent_coef=config.ent_coef,
        vf_coef=config.vf_coef,
        max_grad_norm=config.max_grad_norm,
        policy_kwargs=None if pixels else networks,
        device="auto",
        seed=seed,
    )


SIDES = {"minirl": train_minirl, "stable-baselines3": train_sb3}


def main() -> None:
    """Measure pairs in turn and print them."""
    parser = argparse.ArgumentParser(description="PPO's speed against Stable-Baselines3's.")
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="measure one side here")
    arguments = parser.parse_args()
    work = WORKS[arguments.work]
    if arguments.side:
        report(SIDES[arguments.side](work), work.clock_to - work.clock_from)
        return
    name = f"ppo-{arguments.work}"
    pairs = arguments.pairs
    if not compare(
        name, __file__, "stable-baselines3", work.goal, pairs, lambda side: [arguments.work, "--side", side]
    ):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
