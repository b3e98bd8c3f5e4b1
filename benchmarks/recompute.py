"""Trains with random settings on random code paths, and recomputes everything in float64, until the time is up.

    python benchmarks/recompute.py --minutes 60
    python benchmarks/recompute.py --seed 17 --minutes 0     # repeat only this one

`tests/test_recomputed.py` does this on some paths, this script on any. It prints a line for each: its seed, its
settings, and which number came closest to its bound. Status 1 if one exceeds it. Every tenth path is compiled, which
takes most of the time.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from minirl import dqn, ppo, q_learning
from minirl.dqn import DQNConfig
from minirl.ppo import PPOConfig
from minirl.q_learning import QLearningConfig

sys.path.append(str(Path(__file__).parents[1]))
from tests import recorded
from tests.recompute import Case, check


class Draw:
    """Random choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def one_of(self, *options: Any) -> Any:
        """One of the options."""
        return options[self.rng.integers(len(options))]

    def number(self, low: int, high: int) -> int:
        """A number from `low` to `high`."""
        return int(self.rng.integers(low, high + 1))

    def kills(self, calls: int) -> list[int]:
        """After how many calls of `Run.checkpoint` a run is killed, for each kill, if any."""
        return [self.number(1, max(1, calls)) for _ in range(self.one_of(0, 0, 1, 2))]

    def shared(self, *kinds: str) -> dict[str, Any]:
        """Settings that PPO and Double DQN have in common."""
        env_id = self.one_of("frames", *(f"tests.recorded:{kind}-v0" for kind in kinds))
        num_envs = self.number(1, 4)
        return {
            "env_id": env_id,
            "seed": self.number(0, 1000),
            "num_envs": num_envs,
            "num_workers": self.number(1, min(2, num_envs)),
            "gamma": self.one_of(0.0, 0.9, 0.99, 1.0),
            "learning_rate": self.one_of(1e-4, 1e-3, 1e-2),
            "anneal_lr": self.one_of(True, False),
            "checkpoint_frequency": self.number(10, 90),
            "compile": bool(self.rng.random() < 0.1),
            "precision": self.one_of("float32", "float32", "float32", "bfloat16"),
        }


def draw_ppo(draw: Draw) -> Case:
    """A random path of PPO."""
    shared, num_steps = draw.shared("Vectors", "Tiny", "Constant"), draw.number(2, 16)
    batch_size = shared["num_envs"] * num_steps
    config = PPOConfig(
        **shared,
        num_steps=num_steps,
        total_timesteps=draw.number(1, 4) * batch_size,
        minibatch_size=draw.one_of(*(size for size in range(2, batch_size + 1) if batch_size % size == 0)),
        update_epochs=draw.number(1, 3),
        gae_lambda=draw.one_of(0.0, 0.9, 1.0),
        norm_adv=draw.one_of(True, False),
        anneal_clip=draw.one_of(True, False),
        clip_coef=draw.one_of(0.01, 0.2),
        max_grad_norm=draw.one_of(0.05, 0.5, 1e3),
        target_kl=draw.one_of(None, None, 1e-4),
        vf_coef=draw.one_of(0.0, 0.5),
        value_clip_coef=draw.one_of(None, 0.2),
        ent_coef=draw.one_of(0.0, 0.01),
    )
    return Case(ppo, config, own=own(draw, config, recorded.OwnActorCritic), kills=draw.kills(config.num_updates))


def draw_dqn(draw: Draw) -> Case:
    """A random path of Double DQN."""
    shared = draw.shared("Vectors", "Tiny")  # not constant observations: each batch is traced back to its steps
    envs = shared["num_envs"]
    often, episodes = draw.number(1, 40), draw.one_of(None, None, 3)
    config = DQNConfig(
        **shared,
        total_timesteps=draw.number(120, 400),
        buffer_size=draw.number(20, 120) * envs,
        batch_size=draw.number(2, 20),
        learning_starts=draw.number(0, 60),
        train_frequency=draw.number(1, 6),
        gradient_steps=draw.number(1, 3),
        target_network_frequency=often if episodes is None else 1,
        target_network_episodes=episodes,
        tau=draw.one_of(0.01, 0.5, 1.0),
        huber=draw.one_of(True, False),
        max_grad_norm=draw.one_of(None, 0.5),
        epsilon_decay=draw.one_of(None, 0.9),
        eval_frequency=draw.one_of(None, None, 100),
        eval_episodes=3,
        confirm_episodes=4,
    )
    calls = config.total_timesteps // envs
    own_network = own(draw, config, recorded.OwnQNetwork)
    return Case(dqn, config, own=own_network, kills=draw.kills(calls // 2), log_every=draw.number(20, 100))


def own(draw: Draw, config: Any, network: Any) -> Any:
    """Sometimes a user's own network, on images and in float32, in which its values are."""
    return network if config.env_id == "frames" and config.precision == "float32" and draw.one_of(True, False) else None


def draw_q_learning(draw: Draw) -> Case:
    """A random path of Q-learning."""
    config = QLearningConfig(
        env_id="tests.recorded:States-v0",
        seed=draw.number(0, 1000),
        num_episodes=draw.number(1, 350),
        alpha=draw.one_of(0.01, 0.3, 1.0),
        anneal_alpha=draw.one_of(True, False),
        gamma=draw.one_of(0.0, 0.9, 0.99),
        initial_value=draw.one_of(0.0, 100.0),
        epsilon=draw.one_of(0.0, 0.3, 1.0),
        anneal_epsilon=draw.one_of(True, False),
    )
    return Case(q_learning, config)


def main() -> None:
    """Check one path after the other."""
    parser = argparse.ArgumentParser(description="Trains at random, and computes all of it again.")
    parser.add_argument("--seed", type=int, default=0, help="of the first path; the others count on")
    parser.add_argument("--minutes", type=float, default=10.0)
    arguments = parser.parse_args()
    started, seed, wrong = time.monotonic(), arguments.seed, 0
    while seed == arguments.seed or time.monotonic() - started < 60 * arguments.minutes:
        draw = Draw(seed)
        case = draw.one_of(draw_ppo, draw_ppo, draw_dqn, draw_dqn, draw_q_learning)(draw)
        with tempfile.TemporaryDirectory() as folder:
            report = check(case, Path(folder))
        name = max(report.worst, key=lambda what: report.worst[what])
        own_network = "" if case.own is None else f", {case.own.__name__}"
        defaults = type(case.config)()
        chosen = {k: v for k, v in dataclasses.asdict(case.config).items() if v != getattr(defaults, k)}
        print(
            f"seed {seed}: {case.module.__name__}{own_network}, killed {case.kills}, {chosen}: "
            f"{name} is {report.worst[name]:.2g} of its bound",
            flush=True,
        )
        for what, share in report.wrong.items():
            print(f"seed {seed}: WRONG: {what} is {share:.3g} times beyond its bound", flush=True)
        wrong += bool(report.wrong)
        seed += 1
    print(f"{wrong} of {seed - arguments.seed} paths are wrong")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
