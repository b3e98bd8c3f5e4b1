"""How many seeds of CartPole does Double DQN solve? Reproduces the tables of docs/dqn-cartpole.md.

    python benchmarks/dqn_cartpole.py                      the default settings, seeds 0 to 19
    python benchmarks/dqn_cartpole.py --recipe notebook    the source notebook's
    python benchmarks/dqn_cartpole.py --set gamma=0.98     the default settings with one changed

Each seed is trained in its own process, with one thread, as many side by side as there are cores. Its best network
(picked by greedy games during training) and its last one then play 100 new games each. Solved means a mean return of at
least 495; the maximum is 500.
"""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minirl.checks import ConfigError
from minirl.dqn import DQNConfig, train
from minirl.envs.vector import available_cores
from minirl.evaluate import evaluate
from minirl.runs.checkpoints import BEST_FILE, load_checkpoint
from minirl.runs.flags import fail, reader
from minirl.runs.settings import field_types

SOLVED = 495.0

# An update every step. The notebook trains once per episode, on 32 single samples, and treats truncation as an end.
NOTEBOOK = DQNConfig(
    num_episodes=500,
    total_timesteps=250_000,
    hidden_sizes=(24, 24),
    learning_rate=1e-3,
    anneal_lr=False,
    gamma=0.95,
    max_grad_norm=None,
    buffer_size=2_000,
    batch_size=32,
    learning_starts=32,
    train_frequency=1,
    target_network_episodes=5,
    tau=1.0,
    start_epsilon=1.0,
    end_epsilon=0.01,
    epsilon_decay=0.995,
)
RECIPES = {"default": DQNConfig(), "notebook": NOTEBOOK}


class Result(NamedTuple):
    """The results of one seed: mean returns over 100 games, agent steps, minutes."""

    seed: int
    best: float
    best_step: int
    last: float
    steps: int
    minutes: float


def run_seed(config: DQNConfig) -> Result:
    """Train with a seed, and play 100 games with each of both networks."""
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as parent:
        run_dir = Path(parent) / "run"
        train(config, run_dir=run_dir, device="cpu")
        minutes = (time.monotonic() - started) / 60
        return Result(
            config.seed,
            evaluate(run_dir, device="cpu")["mean_return"],
            load_checkpoint(run_dir, "dqn", file=BEST_FILE)["global_step"],
            evaluate(run_dir, last=True, device="cpu")["mean_return"],
            load_checkpoint(run_dir, "dqn")["global_step"],
            minutes,
        )


def changed(config: DQNConfig, assignments: list[str]) -> DQNConfig:
    """Return the config with some settings changed, each given as `name=value`."""
    kinds = field_types(DQNConfig)
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        if name not in kinds:
            raise ConfigError(f"--set must name a setting, and {name!r} is none")
        plain, optional = kinds[name]
        words = {"true": True, "false": False, "none": None}
        value: Any = words.get(text, text) if plain is bool else reader(plain, optional)(text)
        config = dataclasses.replace(config, **{name: value})
    return config


def main() -> None:
    """Train all seeds, print a row for each as it finishes, and then a summary."""
    parser = argparse.ArgumentParser(description="How many seeds of CartPole does Double DQN solve?")
    parser.add_argument("--recipe", choices=RECIPES, default="default")
    parser.add_argument("--seeds", type=int, default=20, help="how many, from 0 on")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting")
    arguments = parser.parse_args()
    try:
        config = changed(RECIPES[arguments.recipe], arguments.set)
    except ConfigError as error:
        fail(error)

    print("| seed | best network | of step | last network | steps | minutes |")
    print("| --- | --- | --- | --- | --- | --- |")
    configs = [dataclasses.replace(config, seed=seed) for seed in range(arguments.seeds)]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(available_cores(), spawn, max_tasks_per_child=1) as pool:
        results = []
        for row in pool.map(run_seed, configs):
            results.append(row)
            columns = f"{row.best:.1f} | {row.best_step:,} | {row.last:.1f} | {row.steps:,} | {row.minutes:.1f}"
            print(f"| {row.seed} | {columns} |", flush=True)
    best, last = [row.best for row in results], [row.last for row in results]
    for name, returns in [("best", best), ("last", last)]:
        solved = sum(value >= SOLVED for value in returns)
        print(
            f"{name} network: {solved} of {len(returns)} seeds solved, "
            f"mean {statistics.fmean(returns):.1f}, median {statistics.median(returns):.1f}, worst {min(returns):.1f}"
        )


if __name__ == "__main__":
    main()
