"""What people's own environments may be like (`tests.own_envs`), with all three algorithms."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minirl import dqn, ppo, q_learning
from minirl.checks import ConfigError
from minirl.evaluate import evaluate
from minirl.runs.checkpoints import load_checkpoint, save_checkpoint
from tests.own_envs import KINDS

PPO: dict[str, Any] = {
    "num_envs": 4,
    "num_steps": 8,
    "minibatch_size": 16,
    "update_epochs": 1,
    "total_timesteps": 192,
    "checkpoint_frequency": 32,
    "compile": False,
    "num_workers": 1,
}
DQN: dict[str, Any] = {
    "num_envs": 2,
    "total_timesteps": 160,
    "learning_starts": 20,
    "buffer_size": 60,
    "batch_size": 8,
    "checkpoint_frequency": 40,
    "eval_frequency": None,
    "compile": False,
    "num_workers": 1,
}
Q: dict[str, Any] = {"num_episodes": 40, "checkpoint_frequency": 20}


def config_of(algorithm: str, name: str, **settings: Any) -> tuple[Any, Any]:
    """What trains on an environment of `tests.own_envs`, and its settings."""
    if algorithm == "ppo":
        return ppo.train, ppo.PPOConfig(**{"env_id": f"tests.own_envs:{name}-v0", **PPO, **settings})
    if algorithm == "dqn":
        return dqn.train, dqn.DQNConfig(**{"env_id": f"tests.own_envs:{name}-v0", **DQN, **settings})
    env_id = f"tests.own_envs:{name}Table-v0"
    return q_learning.train, q_learning.QLearningConfig(**{"env_id": env_id, **Q, **settings})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ["ppo", "dqn", "q_learning"])
def test_a_run_on_numbers_of_numpys_types_can_be_read_again(algorithm: str, kind: str, tmp_path: Path) -> None:
    train, config = config_of(algorithm, f"Pays{kind}")
    train(config, run_dir=tmp_path / "run", device="cpu")
    saved = load_checkpoint(tmp_path / "run", algorithm)
    assert len(saved["returns"]) >= 20
    assert {type(value) for value in saved["returns"]} == {float}
    assert len(evaluate(tmp_path / "run", episodes=2, device="cpu")["returns"]) == 2


@pytest.mark.parametrize("value", [np.float64(1), [{"seed": np.int64(3)}], Path("home"), lambda: None])
def test_a_checkpoint_that_cannot_be_read_never_takes_the_place_of_a_good_one(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"steps": 1, "moments": np.ones(2)})
    good = path.read_bytes()
    with pytest.raises(ConfigError, match=r"checkpoint.pt must hold tensors and plain data, and extra is something el"):
        save_checkpoint(path, {"steps": 2, "extra": value})
    assert path.read_bytes() == good
    assert list(tmp_path.iterdir()) == [path]
