"""Each update and each logged number is recomputed, in float64, from the raw steps: see `tests.recompute`."""

from pathlib import Path
from typing import Any

import pytest

from minirl import dqn, ppo, q_learning
from minirl.dqn import DQNConfig
from minirl.ppo import PPOConfig
from minirl.q_learning import QLearningConfig
from tests import recorded
from tests.recompute import Case, check

PPO: dict[str, Any] = {
    "env_id": "tests.recorded:Vectors-v0",
    "num_envs": 4,
    "num_steps": 12,
    "minibatch_size": 24,
    "update_epochs": 2,
    "total_timesteps": 96,
    "checkpoint_frequency": 48,
    "learning_rate": 1e-3,
    "compile": False,
    "precision": "float32",
    "num_workers": 1,
}
DQN: dict[str, Any] = {
    "env_id": "tests.recorded:Vectors-v0",
    "num_envs": 2,
    "total_timesteps": 200,
    "learning_starts": 60,
    "buffer_size": 80,
    "batch_size": 16,
    "train_frequency": 5,
    "checkpoint_frequency": 70,
    "eval_frequency": None,
    "compile": False,
    "precision": "float32",
    "num_workers": 1,
}
FRAMES = {"env_id": "frames"}
FEW = {"train_frequency": 20}  # updates, which take long on images
PUSHED: dict[str, Any] = {"env_id": "tests.recorded:Pushed-v0", "norm_obs": True, "norm_reward": True}
COMPILED, ROUNDED = {"compile": True}, {"precision": "bfloat16"}
LARGER = {"num_steps": 32, "minibatch_size": 64, "total_timesteps": 256}
KILLED = {"total_timesteps": 144}  # one update more
OFTEN = {"checkpoint_frequency": 50}  # in the middle of what is logged together, and of no size of the memory
CASES = {
    "ppo": Case(ppo, PPOConfig(**PPO, anneal_lr=True, anneal_clip=True, value_clip_coef=0.2)),
    "ppo, two workers": Case(ppo, PPOConfig(**PPO | {"num_workers": 2})),
    "ppo, killed": Case(ppo, PPOConfig(**PPO | KILLED), kills=[2]),
    "ppo, one reward": Case(ppo, PPOConfig(**PPO | {"env_id": "tests.recorded:Constant-v0"})),
    "ppo, compiled": Case(ppo, PPOConfig(**PPO | COMPILED | LARGER)),
    "ppo, normalised": Case(ppo, PPOConfig(**PPO | PUSHED | KILLED, value_clip_coef=0.2), kills=[2]),
    "ppo, normalised, two workers": Case(ppo, PPOConfig(**PPO | PUSHED | {"num_workers": 2})),
    "ppo, normalised, compiled": Case(ppo, PPOConfig(**PPO | PUSHED | COMPILED | LARGER)),
    "ppo, images": Case(ppo, PPOConfig(**PPO | FRAMES | {"update_epochs": 1})),
    "ppo, bfloat16": Case(ppo, PPOConfig(**PPO | FRAMES | ROUNDED | {"update_epochs": 1})),
    "ppo, own network": Case(ppo, PPOConfig(**PPO | FRAMES), own=recorded.OwnActorCritic),
    "dqn": Case(dqn, DQNConfig(**DQN)),
    "dqn, killed": Case(dqn, DQNConfig(**DQN | OFTEN, gradient_steps=2, max_grad_norm=1.0, huber=True), kills=[85]),
    "dqn, images": Case(dqn, DQNConfig(**DQN | FRAMES | FEW | OFTEN, tau=1.0, target_network_frequency=50), kills=[85]),
    "dqn, compiled": Case(dqn, DQNConfig(**DQN | COMPILED, tau=0.5)),
    "dqn, bfloat16": Case(dqn, DQNConfig(**DQN | FEW | ROUNDED)),
    "dqn, judged": Case(dqn, DQNConfig(**DQN | {"eval_frequency": 100}, eval_episodes=3, confirm_episodes=4)),
    "dqn, own network": Case(dqn, DQNConfig(**DQN | FRAMES | FEW), own=recorded.OwnQNetwork),
    "dqn, own network, compiled": Case(dqn, DQNConfig(**DQN | FRAMES | COMPILED), own=recorded.OwnQNetwork),
    "ppo, images, compiled": Case(ppo, PPOConfig(**PPO | FRAMES | COMPILED)),
    "ppo, own network, compiled": Case(ppo, PPOConfig(**PPO | FRAMES | COMPILED), own=recorded.OwnActorCritic),
    "ppo, vectors, bfloat16": Case(ppo, PPOConfig(**PPO | ROUNDED)),
    "dqn, images, compiled": Case(dqn, DQNConfig(**DQN | FRAMES | FEW | COMPILED)),
    "dqn, images, bfloat16": Case(dqn, DQNConfig(**DQN | FRAMES | FEW | ROUNDED)),
    "dqn, two workers": Case(dqn, DQNConfig(**DQN | {"num_workers": 2})),
    "q_learning, killed": Case(
        q_learning,
        QLearningConfig(env_id="tests.recorded:States-v0", num_episodes=250, checkpoint_frequency=90),
        kills=[130],
    ),
    "q_learning": Case(q_learning, QLearningConfig(env_id="tests.recorded:States-v0", num_episodes=250)),
}

SLOW = {
    *(name for name in CASES if "compiled" in name),
    *("ppo, vectors, bfloat16", "dqn, images, bfloat16", "dqn, two workers", "ppo, two workers"),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, case in CASES.items()],
)
def test_all_numbers_are_what_the_formulas_give(case: Case, tmp_path: Path) -> None:
    report = check(case, tmp_path)
    assert report.worst
    assert not report.wrong
