"""Where a step of PPO on Pong spends its time, against the least time in which this machine could do it.

    python benchmarks/where_time_goes.py

Prints the tables of docs/performance.md: each part alone, the whole training, the floor (the matrix products of the
network at this machine's peak, and the bare emulator on all cores), and how environments scale.
"""

import contextlib
import functools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ale_py
import numpy as np
import torch
from pairs import seconds_between
from torch import Tensor

from minirl.envs.atari import make_atari_env
from minirl.envs.make import make_vector_env
from minirl.envs.vector import available_cores
from minirl.fast.compiled import compiled
from minirl.fast.gpu import cuda_graphed, fetch_async
from minirl.fast.machine import keep_freed_memory, one_thread, rounded_weights, select_precision
from minirl.networks import observation_tensor
from minirl.ppo import (
    ActorCritic,
    PPOConfig,
    act,
    collect_rollout,
    compute_gae,
    gradient_step,
    train,
    update_policy,
)
from minirl.rollout import Rollout

CONFIG = PPOConfig()
CPU = torch.device("cpu")
FORWARD = 2 * (400 * 32 * 256 + 81 * 64 * 512 + 49 * 64 * 576 + 3136 * 512)  # of the Nature CNN, per image
NOT_NEEDED = 2 * 400 * 32 * 256  # the gradient with respect to the pixels
FLOPS = FORWARD + CONFIG.update_epochs * (3 * FORWARD - NOT_NEEDED)  # per agent step: acting, and four epochs


def seconds(function: Callable[[], object], calls: int) -> float:
    """Median seconds of a call, after a few untimed ones."""
    for _ in range(3):
        function()
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def peak_flops(dtype: torch.dtype) -> float:
    """Multiplications and additions per second in a large matrix product."""
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    return 2 * 2048**3 / seconds(lambda: a @ b, 10)


def emulate(frames: int) -> float:
    """Frames per second of the bare emulator in this process, with random buttons and no screen read."""
    env = make_atari_env("PongNoFrameskip-v4", fast=True)
    env.reset(seed=0)
    emulator: ale_py.ALEInterface = env.unwrapped.ale  # type: ignore[attr-defined]
    buttons = emulator.getMinimalActionSet()
    rng = np.random.default_rng(0)
    started = time.perf_counter()
    for button in rng.integers(len(buttons), size=frames):
        emulator.act(buttons[button])
        if emulator.game_over():
            emulator.reset_game()
    return frames / (time.perf_counter() - started)


def bare_emulator() -> float:
    """Agent steps per second, four frames each, of the bare emulator on all cores."""
    with multiprocessing.get_context("spawn").Pool(available_cores()) as pool:
        return sum(pool.map(emulate, [20_000] * available_cores())) / 4


def env_speed(num_envs: int, num_workers: int) -> float:
    """Agent steps per second of the environments alone."""
    rng = np.random.default_rng(0)
    with make_vector_env(CONFIG.env_id, num_envs, num_workers=num_workers) as envs:
        envs.reset(seed=0)
        return num_envs / seconds(lambda: envs.step(rng.integers(6, size=num_envs)), 2400 // num_envs)


@contextlib.contextmanager
def pieces(device: torch.device) -> Iterator[dict[str, Callable[[], object]]]:
    """The parts of training for the steps of an update, in order: each can be called alone, any number of times."""
    with make_vector_env(CONFIG.env_id, CONFIG.num_envs, in_halves=True) as envs:
        agent = ActorCritic(envs.observation_space, envs.action_space).to(device)
        precision = select_precision(CONFIG.precision, device, images=True)
        optimizer = torch.optim.Adam(agent.parameters(), lr=1e-4, eps=1e-5, fused=True)
        step = compiled(gradient_step, agent, optimizer, CONFIG, precision)
        policy = compiled(act, agent, precision)
        gae = cuda_graphed(compute_gae, device)
        rollout = Rollout(CONFIG.num_steps, CONFIG.num_envs, device)
        obs = envs.reset(seed=0).copy()
        inputs = [observation_tensor(obs[half], device) for half in envs.halves]

        def transfer() -> None:
            for _ in range(CONFIG.num_steps):
                for half in envs.halves:
                    fetch_async(observation_tensor(obs[half], device)[:, 0, 0, 0])()

        def play() -> None:
            with torch.no_grad(), one_thread(), rounded_weights(agent, precision):
                for _ in range(CONFIG.num_steps):
                    for half in inputs:
                        fetch_async(policy(half)[0])()

        def collect() -> None:
            with one_thread(), rounded_weights(agent, precision):
                collect_rollout(agent, precision, policy, envs, obs, rollout)

        def advantages() -> dict[str, Tensor]:
            names = ("rewards", "values", "next_values", "terminated", "truncated")
            found, returns = gae(*(rollout[name] for name in names), CONFIG.gamma, CONFIG.gae_lambda)
            return rollout.samples(advantages=found, returns=returns)

        collect()
        samples = advantages()
        yield {
            "transfer": transfer,
            "acting": play,
            "rollout": collect,
            "advantages": advantages,
            "update": functools.partial(update_policy, step, samples, CONFIG, 0.1),
        }


def parts() -> dict[str, float]:
    """Milliseconds of a vector step of the environments, of acting, of a whole rollout step and of a gradient step."""
    environments = CONFIG.num_envs / env_speed(CONFIG.num_envs, max(1, available_cores() - 1))
    gradient_steps = CONFIG.update_epochs * CONFIG.batch_size // CONFIG.minibatch_size
    with pieces(CPU) as functions:
        return {
            "environments": 1e3 * environments,
            "acting": 1e3 * seconds(functions["acting"], 3) / CONFIG.num_steps,
            "rollout": 1e3 * seconds(functions["rollout"], 3) / CONFIG.num_steps,
            "gradient": 1e3 * seconds(functions["update"], 3) / gradient_steps,
        }


def training_speed() -> float:
    """Agent steps per second of the whole training, without compilation."""
    first, last = 2 * CONFIG.batch_size, 14 * CONFIG.batch_size
    with tempfile.TemporaryDirectory() as parent:
        train(PPOConfig(total_timesteps=last, compile=True), run_dir=Path(parent) / "run", device="cpu")
        return (last - first) / seconds_between(Path(parent) / "run", first, last)


def main() -> None:
    """Measure and print."""
    keep_freed_memory()
    precision = select_precision("auto", CPU, images=True)
    peaks = {dtype: peak_flops(dtype) for dtype in (torch.float32, precision)}
    ale = bare_emulator()
    print("| the least it could take | steps a second |\n| --- | --- |")
    for dtype, peak in peaks.items():
        print(
            f"| network, {FLOPS / 1e6:.0f} MFLOP a step at {peak / 1e9:.0f} GFLOP/s ({dtype}) | {peak / FLOPS:,.0f} |"
        )
    print(f"| bare emulator, {available_cores()} cores | {ale:,.0f} |")
    floor = 1 / (FLOPS / peaks[precision] + 1 / ale)
    print(f"| both, one after the other | {floor:,.0f} |")

    share, part = CONFIG.num_envs, parts()
    gradients = CONFIG.update_epochs / CONFIG.minibatch_size  # per agent step
    rows = {
        "environments, in the workers": part["environments"] / share,
        "acting: network and sampling, in two halves, by the training process": part["acting"] / share,
        "a rollout: both at the same time, copies, logging, waiting for each other": part["rollout"] / share,
        "update": part["gradient"] * gradients,
    }
    print("\n| part, each measured alone | us an agent step |\n| --- | --- |")
    for name, milliseconds in rows.items():
        print(f"| {name} | {1e3 * milliseconds:.0f} |")
    speed = training_speed()
    print(f"| whole training ({speed:,.0f} steps a second, {speed / floor:.0%} of the floor) | {1e6 / speed:.0f} |")

    print("\n| environments | 1 worker | 2 workers |\n| --- | --- | --- |")
    for num_envs in (2, 4, 8, 16, 32):
        print(f"| {num_envs} | {env_speed(num_envs, 1):,.0f} | {env_speed(num_envs, 2):,.0f} |")


if __name__ == "__main__":
    main()
