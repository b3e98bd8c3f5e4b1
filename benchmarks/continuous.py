"""What PPO reaches on continuous control. Remakes the tables of docs/continuous-control.md.

    python benchmarks/continuous.py ppo-pendulum ppo-mountaincar-continuous --seeds 5
    python benchmarks/continuous.py ppo-hopper ppo-halfcheetah ppo-walker2d
    python benchmarks/continuous.py ppo-hopper --seeds 1 --peer      Stable-Baselines3's PPO with the same settings

Each run is a process of its own with one thread, one after the other, in a directory below `--run-dir`; what was
stopped goes on where it was when the command is given again, and what is done is not done again (the peer's runs begin
anew). Then each network plays 100 games with the mean of its Gaussian. A row for each run, as it is done:
the mean return of the last 100 games of the training, and of these.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ppo_speed import sb3_envs, sb3_ppo
from zoo import settings_of

from minirl.ppo import PPOConfig
from minirl.runs.checkpoints import CHECKPOINT_FILE, load_checkpoint
from minirl.runs.settings import RECIPES

GAMES = 100
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*command: str) -> str:
    """Run Python with one thread; return what it says on standard output."""
    done = subprocess.run([sys.executable, *command], env=ONE_THREAD, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def train_minirl(recipe: str, seed: int, run_dir: Path) -> dict[str, Any]:
    """Train, or go on, and play; return the row."""
    new = [f"@{RECIPES / recipe}.args", "--seed", str(seed), "--run-dir", str(run_dir), "--final-games", "0"]
    started = (run_dir / CHECKPOINT_FILE).exists()
    script = str(RECIPES.parent / "train_ppo.py")
    run(script, "--device", "cpu", *(["--resume", str(run_dir), "--final-games", "0"] if started else new))
    saved = load_checkpoint(run_dir, "ppo")
    played = json.loads(run("-m", "minirl.evaluate", str(run_dir), "--episodes", str(GAMES), "--json"))
    return {
        "training": statistics.fmean(saved["returns"]),
        "greedy": played["mean_return"],
        "worst": played["min_return"],
        "minutes": saved["seconds"] / 60,
    }


def train_peer(recipe: str, seed: int) -> dict[str, Any]:
    """Train Stable-Baselines3's PPO, and play; return the row."""
    import torch
    from stable_baselines3.common.evaluation import evaluate_policy

    torch.set_num_threads(1)
    config: PPOConfig = settings_of(recipe)
    started = time.monotonic()
    model = sb3_ppo(config, sb3_envs(config, seed), seed)
    model.learn(config.total_timesteps)
    minutes = (time.monotonic() - started) / 60
    assert model.ep_info_buffer is not None
    envs: Any = model.get_env()
    if config.norm_obs or config.norm_reward:
        envs.training = envs.norm_reward = False
    returns, _ = evaluate_policy(model, envs, GAMES, return_episode_rewards=True)
    assert isinstance(returns, list)
    return {
        "training": statistics.fmean(info["r"] for info in model.ep_info_buffer),
        "greedy": statistics.fmean(returns),
        "worst": min(returns),
        "minutes": minutes,
    }


def main() -> None:
    """Train all, and print a row for each run, and one for each recipe."""
    parser = argparse.ArgumentParser(description="What PPO reaches on continuous control.")
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="the name of a file in recipes/, without .args")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 1 on")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/continuous"))
    parser.add_argument("--peer", action="store_true", help="train Stable-Baselines3's PPO instead")
    arguments = parser.parse_args()
    print("| recipe | seed | last 100 games | 100 greedy games | the worst | minutes |")
    print("| --- | --- | --- | --- | --- | --- |")
    for recipe in arguments.recipes:
        rows = []
        for seed in range(1, arguments.seeds + 1):
            run_dir = arguments.run_dir.absolute() / recipe / f"{'peer' if arguments.peer else 'seed'}{seed}"
            result = run_dir / "result.json"
            if not result.exists():
                row = train_peer(recipe, seed) if arguments.peer else train_minirl(recipe, seed, run_dir)
                run_dir.mkdir(parents=True, exist_ok=True)
                result.write_text(json.dumps(row))
            rows.append(json.loads(result.read_text()))
            print(f"| {recipe} | {seed} | {numbers(rows[-1])} |", flush=True)
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        print(f"| {recipe} | mean | {numbers({key: statistics.fmean(column) for key, column in columns.items()})} |")
        print(f"| {recipe} | spread | {numbers({key: statistics.pstdev(column) for key, column in columns.items()})} |")


def numbers(row: dict[str, float]) -> str:
    """Return the columns of a row."""
    return f"{row['training']:,.1f} | {row['greedy']:,.1f} | {row['worst']:,.1f} | {row['minutes']:.1f}"


if __name__ == "__main__":
    main()
