"""What recipes reach on several seeds, and how fast, against RL-Zoo's own figures and Stable-Baselines3 trained here.

    python benchmarks/zoo.py                          the rows of vectors and choices, seeds 1 to 5
    python benchmarks/zoo.py dqn-mountaincar --seeds 1,2
    python benchmarks/zoo.py ppo-hopper --seeds 1 --peer    Stable-Baselines3 with the same settings
    python benchmarks/zoo.py dqn-mountaincar --speed        steps per second against it, alone and in turn

Each row is a file in `recipes/`. A seed is a process with one thread, as many side by side as there are cores; then 100
greedy games are played with other seeds. A stopped benchmark continues: what is already in runs/zoo/ is not done again
(the peer's runs start over). The Zoo's figures are of one run each, on earlier versions of the environments
(benchmark.md of DLR-RM/rl-baselines3-zoo).
"""

import argparse
import concurrent.futures
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from pairs import Timing, compare, report, seconds_between
from ppo_speed import sb3_envs, sb3_ppo

from minirl.envs.vector import available_cores
from minirl.evaluate import TRAINING_SCRIPTS
from minirl.runs.flags import make_parser

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "zoo"
GAMES = 100
GOAL = 3.0  # times Stable-Baselines3's speed


class Row(NamedTuple):
    """The Zoo's figures: the mean return of a run, its standard deviation over games, and the steps of the run."""

    mean: float
    deviation: float
    steps: str


DISCRETE = {
    "ppo-cartpole": Row(500.0, 0.0, "100k"),
    "ppo-acrobot": Row(-73.5, 18.2, "1M"),
    "ppo-mountaincar": Row(-110.4, 19.5, "1M"),
    "ppo-lunarlander": Row(242.1, 31.8, "1M"),
    "dqn-cartpole-zoo": Row(500.0, 0.0, "50k"),
    "dqn-acrobot": Row(-76.6, 11.8, "100k"),
    "dqn-mountaincar": Row(-100.8, 9.9, "120k"),
    "dqn-lunarlander": Row(154.4, 79.2, "100k"),
}
CONTINUOUS = {  # the Zoo's settings on Box2D, and where the name says so; the others are ours, or common ones
    "ppo-pendulum": Row(-172.2, 104.2, "100k"),
    "ppo-mountaincar-continuous": Row(88.3, 2.6, "20k"),
    "ppo-lunarlander-continuous": Row(270.9, 32.1, "1M"),
    "ppo-bipedalwalker": Row(213.3, 129.5, "5M"),
    "ppo-hopper": Row(2410.4, 10.0, "1M"),
    "ppo-halfcheetah": Row(5819.1, 663.5, "1M"),
    "ppo-walker2d": Row(3478.8, 821.7, "1M"),
    "ppo-hopper-zoo": Row(2410.4, 10.0, "1M"),
    "ppo-halfcheetah-zoo": Row(5819.1, 663.5, "1M"),
    "ppo-walker2d-zoo": Row(3478.8, 821.7, "1M"),
    "ppo-hopper-tuned": Row(2410.4, 10.0, "1M"),
    "ppo-halfcheetah-tuned": Row(5819.1, 663.5, "1M"),
    "ppo-walker2d-tuned": Row(3478.8, 821.7, "1M"),
}
ROWS = {**DISCRETE, **CONTINUOUS}


def settings_of(name: str) -> Any:
    """Return the config of a recipe."""
    script = f"train_{name.split('-')[0]}.py"
    config_class = TRAINING_SCRIPTS[script]
    given = vars(make_parser(config_class, "", TRAINING_SCRIPTS).parse_args([f"@{ROOT / 'recipes' / name}.args"]))
    return config_class(**{name: value for name, value in given.items() if name in config_class.__annotations__})


def train_seed(name: str, seed: int, peer: bool) -> dict[str, Any]:
    """Train a row with a seed, unless that is done already, and play 100 games; return the results."""
    run_dir = RUNS / name / f"{'peer' if peer else 'seed'}{seed}"
    if (done := run_dir / "result.json").exists():
        result: dict[str, Any] = json.loads(done.read_text())
        return result
    log = RUNS / f"{name}-{run_dir.name}.log"
    if peer:
        result = json.loads(run([__file__, name, "--seeds", seed, "--side", "peer"], log))
    else:
        script = ROOT / f"train_{name.split('-')[0]}.py"
        begun = (run_dir / "checkpoint.pt").exists()
        new = [f"@{ROOT / 'recipes' / name}.args", "--seed", seed, "--run-dir", run_dir, "--num-workers", 1]
        run([script, *(["--resume", run_dir] if begun else new)], log)
        played = run(["-m", "minirl.evaluate", run_dir, "--episodes", GAMES, "--json"])
        result = {**json.loads(played), "minutes": minutes_of(run_dir)}
    run_dir.mkdir(parents=True, exist_ok=True)
    done.write_text(json.dumps(result))
    return result


def train_peer(name: str, seed: int) -> dict[str, Any]:
    """Train a row with Stable-Baselines3, and play; return the results."""
    from stable_baselines3.common.evaluation import evaluate_policy

    config, started = settings_of(name), time.monotonic()
    model = sb3_model(name, config, seed)
    model.learn(config.total_timesteps)
    minutes = (time.monotonic() - started) / 60
    envs: Any = model.get_env()
    if getattr(config, "norm_obs", False) or getattr(config, "norm_reward", False):
        envs.training = envs.norm_reward = False
    returns: Any = evaluate_policy(model, envs, GAMES, return_episode_rewards=True)[0]
    return {"mean_return": statistics.fmean(returns), "min_return": min(returns), "minutes": minutes}


def run(arguments: list[Any], log: Path | None = None) -> str:
    """Run Python with these arguments and one thread; return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    with open(os.devnull if log is None else log, "a") as said:
        return subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=said, text=True, check=True
        ).stdout


def minutes_of(run_dir: Path) -> float:
    """Return how long training took, as its run logged it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return float(events.Scalars("charts/minutes")[-1].value)


def table(names: list[str], seeds: list[int], peer: bool) -> str:
    """Return the results so far of these rows as a table."""
    lines = ["| recipe | steps | mean of the seeds +- their deviation | each seed | the Zoo's run | minutes a seed |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for name in names:
        files = [RUNS / name / f"{'peer' if peer else 'seed'}{seed}" / "result.json" for seed in seeds]
        results = [json.loads(file.read_text()) for file in files if file.exists()]
        if not results:
            continue
        means = [result["mean_return"] for result in results]
        deviation = statistics.stdev(means) if len(means) > 1 else math.nan
        each = ", ".join(f"{mean:.1f}" for mean in means)
        zoo, minutes = ROWS[name], statistics.median(result["minutes"] for result in results)
        lines.append(
            f"| `{name}` | {settings_of(name).total_timesteps:,} | **{statistics.mean(means):.1f}** +- {deviation:.1f} "
            f"| {each} | {zoo.mean} +- {zoo.deviation}, {zoo.steps} | {minutes:.1f} |"
        )
    return "\n".join(lines)


def clock_of(config: Any) -> tuple[int, int]:
    """Return the agent steps between which both sides are timed: multiples of the steps per update or log."""
    if hasattr(config, "batch_size") and hasattr(config, "num_steps"):
        updates = max(4, 20_000 // config.batch_size)
        return config.batch_size * max(1, updates // 4), config.batch_size * updates
    return 4_000, 20_000


def train_minirl(name: str, num_threads: int | None) -> Timing:
    """Train a row with this project, without greedy games, with this many threads; None: its own choice."""
    import dataclasses
    import importlib

    config, started = settings_of(name), time.perf_counter()
    first, last = clock_of(config)
    alone = {"eval_frequency": None} if name.startswith("dqn") else {}
    # Compiled as the whole run is; this one is too short to choose it.
    config = dataclasses.replace(
        config, total_timesteps=last, compile=True, num_threads=num_threads, checkpoint_frequency=last, **alone
    )
    with tempfile.TemporaryDirectory() as parent:
        importlib.import_module(f"minirl.{name.split('-')[0]}").train(config, run_dir=Path(parent) / "run")
        total = time.perf_counter() - started
        seconds = seconds_between(Path(parent) / "run", first, last)
    return Timing(seconds, total - seconds)


def train_sb3(name: str, num_threads: int | None) -> Timing:
    """Train a row with Stable-Baselines3 and the same settings, with this many threads; None: PyTorch's choice."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    config, started = settings_of(name), time.perf_counter()
    first, last = clock_of(config)
    if num_threads:
        torch.set_num_threads(num_threads)
    model = sb3_model(name, config, seed=0)
    times: dict[int, float] = {}

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            times[self.num_timesteps] = time.perf_counter()
            return True

    model.learn(last, callback=Clock())
    return Timing(times[last] - times[first], times[first] - started)


def sb3_model(name: str, config: Any, seed: int) -> Any:
    """Make Stable-Baselines3's model of a row, with its environments."""
    from stable_baselines3 import DQN
    from stable_baselines3.common.env_util import make_vec_env

    if name.startswith("ppo"):
        return sb3_ppo(config, sb3_envs(config, seed), seed)
    return DQN(
        "MlpPolicy",
        make_vec_env(config.env_id, n_envs=config.num_envs, seed=seed),
        learning_rate=config.learning_rate,
        gamma=config.gamma,
        buffer_size=config.buffer_size,
        learning_starts=config.learning_starts,
        batch_size=config.batch_size,
        train_freq=config.train_frequency,
        gradient_steps=config.gradient_steps,
        target_update_interval=config.target_network_frequency,
        exploration_fraction=config.exploration_fraction,
        exploration_final_eps=config.end_epsilon,
        max_grad_norm=config.max_grad_norm,
        policy_kwargs={"net_arch": list(config.hidden_sizes)},
        device="cpu",
        seed=seed,
    )


SIDES = {"minirl": train_minirl, "stable-baselines3": train_sb3}


def main() -> None:
    """Train what is missing and print the table; or measure speed."""
    parser = argparse.ArgumentParser(description="What recipes reach on several seeds.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; by default the discrete ones")
    parser.add_argument("--seeds", default="1,2,3,4,5", help="with commas between them")
    parser.add_argument("--peer", action="store_true", help="train Stable-Baselines3 instead")
    parser.add_argument("--speed", action="store_true", help="measure the speed instead")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--num-threads", type=int, help="of both sides, when speed is measured; by default its own")
    parser.add_argument("--side", choices=[*SIDES, "peer"], help="measure one side here, or train the peer")
    given = parser.parse_args()
    names = given.rows or list(DISCRETE)
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"ROW must be one of {', '.join(ROWS)}, not {unknown[0]}")
    seeds = [int(seed) for seed in given.seeds.split(",")]
    if given.side == "peer":
        print(json.dumps(train_peer(names[0], seeds[0])))
    elif given.side:
        first, last = clock_of(settings_of(names[0]))
        report(SIDES[given.side](names[0], given.num_threads), last - first)
    elif given.speed:
        for name in names:

            def arguments(side: str, name: str = name) -> list[str]:
                threads = [f"--num-threads={given.num_threads}"] if given.num_threads else []
                return [name, "--side", side, *threads]

            compare(f"zoo-{name}", __file__, "stable-baselines3", GOAL, given.pairs, arguments)
    else:
        RUNS.mkdir(parents=True, exist_ok=True)
        with concurrent.futures.ThreadPoolExecutor(available_cores()) as pool:
            todo = {pool.submit(train_seed, name, seed, given.peer): (name, seed) for name in names for seed in seeds}
            for future in concurrent.futures.as_completed(todo):
                (name, seed), result = todo[future], future.result()
                print(f"{name}, seed {seed}: {result['mean_return']:.1f} in {result['minutes']:.1f} min", flush=True)
        print(table(names, seeds, given.peer))


if __name__ == "__main__":
    main()
