"""PPO on Pong on a GPU: agent steps per second of the whole training with 8, 64 and 256 environments.

    python benchmarks/gpu_speed.py

The source notebook's settings, in minibatches that grow with the environments (four an epoch). Compilation is left out.
"""

import sys
import tempfile
from pathlib import Path

import torch
from pairs import seconds_between

from minirl.ppo import PPOConfig, train

UPDATES = 12  # of which the first two don't count


def steps_per_second(num_envs: int) -> float:
    """Train for a few updates and return the speed."""
    torch.compiler.reset()  # or the next sizes are compiled for all sizes, which no training of its own would do
    batch = num_envs * PPOConfig.num_steps
    config = PPOConfig(num_envs=num_envs, minibatch_size=batch // 4, total_timesteps=UPDATES * batch, compile=True)
    with tempfile.TemporaryDirectory() as parent:
        train(config, run_dir=Path(parent) / "run", device="cuda")
        return (UPDATES - 2) * batch / seconds_between(Path(parent) / "run", 2 * batch, UPDATES * batch)


def main() -> None:
    """Measure and print."""
    if not torch.cuda.is_available():
        print("error: this benchmark needs a GPU that PyTorch can use", file=sys.stderr)
        raise SystemExit(2)
    print(f"{torch.cuda.get_device_name()}\n\n| environments | steps a second |\n| --- | --- |")
    for num_envs in (8, 64, 256):
        print(f"| {num_envs} | {steps_per_second(num_envs):,.0f} |", flush=True)


if __name__ == "__main__":
    main()
