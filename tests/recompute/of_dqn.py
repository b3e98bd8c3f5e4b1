"""Double DQN, recomputed."""

import functools
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests import recorded, reference
from tests.recompute.record import Recording, Update
from tests.recompute.report import UNLIKELY, Report, mean_of
from tests.recompute.steps import check_chain, check_result, check_step, columns, episodes, products
from tests.reference import SINGLE, Numbers, Rounding, Weights, with_bounds

TIE = 1e-4  # relative: if two actions' values are closer than this, either action may be taken


def dqn_numbers(config: Any, update: Update, trained: set[str], batch: Numbers, rounding: Rounding) -> Numbers:
    """The results of one gradient step of Double DQN."""
    online, target = update.before.networks
    learned = {name: online[name].clone().requires_grad_() for name in online if name in trained}
    weights = online | learned
    next_q, buffers = reference.q_network(weights, batch["next_obs"], rounding, training=True)
    next_q_target, _ = reference.q_network(target, batch["next_obs"], rounding, training=False)
    q, buffers_after = reference.q_network(weights | buffers, batch["obs"], rounding, training=True)
    targets = reference.dqn_target(
        batch["rewards"], batch["terminated"], next_q.detach(), next_q_target, config.gamma, rounding
    ).detach()
    loss = reference.td_loss(q, batch["actions"], targets, config.huber, rounding)
    chosen = q[torch.arange(len(q)), batch["actions"].long()].detach()
    terms = {"td_loss": loss.detach(), "q_values": rounding(chosen, len(q)).sum() / len(q)}
    max_norm = math.inf if config.max_grad_norm is None else config.max_grad_norm
    return terms | reference.adam_moments(loss, learned, update.before.moments, max_norm, rounding) | buffers_after


def moved_target(target: Weights, online: Weights, trained: Iterable[str], tau: float) -> tuple[Weights, Weights]:
    """The target network after one update, and how far float32 may be off; buffers are copied."""
    parameters = {name for name in target if "running" not in name and "tracked" not in name}
    moved = {name: target[name] + (tau if name in parameters else 1) * (online[name] - target[name]) for name in target}
    bound = {
        name: 4 * SINGLE * (target[name].abs() + online[name].abs()) if name in parameters else 0 * target[name]
        for name in target
    }
    return moved, bound


class Sampled:
    """Traces the transitions of batches to the raw steps: each is complete and still in the memory, and any may come.

    If frames are stored once, there are `length / 20 + 5` more rows than steps, and each episode's end takes one, so
    fewer steps may be stored. For every draw, its place in the memory, from 0 to 1, is kept: uniform, with mean 1/2.
    """

    def __init__(self, raw: dict[str, NDArray[Any]], window: int) -> None:
        dtype = np.uint8 if raw["obs"].ndim == 5 else np.float32
        self.raw = {**raw, "obs": raw["obs"].astype(dtype), "next_obs": raw["next_obs"].astype(dtype)}
        steps, envs = raw["reward"].shape
        self.where = {self.raw["obs"][t, row].tobytes(): (t, row) for t in range(steps) for row in range(envs)}
        self.dtype, self.window = dtype, window
        self.places: list[float] = []
        ended = raw["terminated"] | raw["truncated"]
        ends = np.cumsum(ended, axis=0)
        self.row_after = np.arange(1, steps + 1)[:, None] + ends  # of the frame that is shown after each step
        number = np.zeros_like(ends)  # of each step in its episode
        for t in range(1, steps):
            number[t] = np.where(ended[t - 1], 0, number[t - 1] + 1)
        self.first_row = self.row_after - 1 - ended - np.minimum(number, recorded.FRAMES - 1)  # of each step's stack

    def oldest(self, newest: int, row: int) -> int:
        """The first step of an environment that is still in the memory after its step `newest`."""
        first = max(0, newest + 1 - self.window)
        if self.dtype == np.float32:
            return first
        rows = self.window + self.window // 20 + recorded.FRAMES + 1
        lost = self.first_row[first : newest + 1, row] <= self.row_after[newest, row] + 1 - rows
        return first + int(lost.sum())

    def check(self, report: Report, batch: Numbers, newest: int) -> None:
        obs = batch["obs"].numpy().astype(self.dtype)
        found = [self.where.get(observation.tobytes(), (-1, 0)) for observation in obs]
        t, row = np.array(found).T
        oldest = np.array([self.oldest(newest, row) for row in range(self.raw["reward"].shape[1])])
        sizes = newest + 1 - oldest
        report.same("batch: remembered", (t < oldest[row]).sum() + (t > newest).sum(), 0)
        before = np.concatenate([[0], np.cumsum(sizes)])
        self.places += ((before[row] + t - oldest[row] + 0.5) / before[-1]).tolist()
        report.same("batch: next_obs", batch["next_obs"], self.raw["next_obs"][t, row].astype(np.float64))
        report.same("batch: actions", batch["actions"], self.raw["action"][t, row])
        report.same("batch: rewards", batch["rewards"], self.raw["reward"][t, row].astype(np.float32))
        report.same("batch: terminated", batch["terminated"], self.raw["terminated"][t, row])

    def finish(self, report: Report) -> None:
        deviation = math.sqrt(1 / (12 * len(self.places)))
        report.compare("batch: any transition", np.mean(self.places), 0.5, UNLIKELY * deviation)


def multiples(every: int, before: int, now: int) -> int:
    """How many multiples of a number are above `before`, and not above `now`."""
    return sum(step % every == 0 for step in range(before + 1, now + 1))


def check_dqn(config: Any, recording: Recording, report: Report, log_every: int) -> None:
    """Compare a run of Double DQN, step by step."""
    raw, length = columns(recording)
    envs, window = config.num_envs, config.buffer_size // config.num_envs
    last = math.ceil(config.total_timesteps / envs) * envs
    report.same("agent steps", length * envs, last)
    expected = defaultdict(list, episodes(recording))
    updates, done, finished_episodes = recording.updates, 0, 0
    sampled = Sampled(raw, window)
    target, target_bound = (
        updates[0].before.networks[1],
        {name: 0 * w for name, w in updates[0].before.networks[1].items()},
    )
    for name, weight in updates[0].before.networks[0].items():
        report.same("the target starts as the online network", target[name], weight)
    unlogged: list[dict[str, tuple[Tensor, float]]] = []
    explored, chance, variance = 0, 0.0, 0.0
    judged = iter(judged_means(config, recording.directory))
    for t in range(length):
        before, now = t * envs, (t + 1) * envs
        remaining = 1 - before / last if config.anneal_lr else 1.0
        fall = min(1.0, before / (config.exploration_fraction * config.total_timesteps))
        epsilon = config.start_epsilon + fall * (config.end_epsilon - config.start_epsilon)
        if config.epsilon_decay is not None:
            epsilon = max(config.end_epsilon, config.start_epsilon * config.epsilon_decay**finished_episodes)

        # Acting: with the current weights, except for exploration.
        online = updates[done].before.networks[0] if done < len(updates) else updates[-1].after.networks[0]
        values, _ = reference.q_network(online, torch.from_numpy(raw["obs"][t]).double(), Rounding(), training=False)
        taken = values[torch.arange(envs), torch.from_numpy(raw["action"][t])]
        explored += int((taken < values.max(1).values - TIE * values.abs().max(1).values).sum())
        other = epsilon * (1 - 1 / values.shape[1])
        chance, variance = chance + envs * other, variance + envs * other * (1 - other)
        report.same("no chance, no exploration", explored * (chance == 0), 0)

        ended = int((raw["terminated"][t] | raw["truncated"][t]).sum())
        if now >= config.learning_starts and min(t + 1, window) * envs >= config.batch_size:
            for _ in range(config.gradient_steps * multiples(config.train_frequency, before, now)):
                update = updates[done]
                check_chain(report, updates[done - 1] if done else None, update)
                for name, weight in update.before.networks[1].items():
                    report.compare("target network", weight, target[name], target_bound[name])
                target = update.before.networks[1]
                target_bound = {name: 0 * weight for name, weight in target.items()}
                batch = dict(
                    zip(("obs", "actions", "rewards", "next_obs", "terminated"), update.arguments[0], strict=True)
                )
                report.same("batch size", len(batch["actions"]), config.batch_size)
                sampled.check(report, batch, t)
                numbers = with_bounds(
                    functools.partial(dqn_numbers, config, update, recording.trained, batch), products(config)
                )
                learned = {name: update.before.networks[0][name] for name in recording.trained}
                check_step(report, update, learned, config.learning_rate * remaining, 1e-8, numbers)
                unlogged.append(numbers)
                done += 1
        online = updates[done - 1].after.networks[0] if done else online
        due = multiples(config.target_network_frequency, before, now)
        if config.target_network_episodes is not None:
            due = multiples(config.target_network_episodes, finished_episodes, finished_episodes + ended)
        for _ in range(due):
            target, more = moved_target(target, online, recording.trained, config.tau)
            target_bound = {name: bound + more[name] for name, bound in target_bound.items()}
        finished_episodes += ended

        evaluated = config.eval_frequency is not None and (multiples(config.eval_frequency, before, now) or now == last)
        if multiples(log_every, before, now) or now == last or evaluated:
            expected["charts/epsilon"].append((now, epsilon, 0.0))
            expected["charts/learning_rate"].append((now, config.learning_rate * remaining, 0.0))
            for tag in ("td_loss", "q_values", "grad_norm") if unlogged else ():
                expected[f"losses/{tag}"].append((now, *mean_of(numbers[tag] for numbers in unlogged)))
            unlogged.clear()
        if evaluated:
            expected["eval/mean_return"].append((now, next(judged), 1e-9))
    report.same("gradient steps", done, len(updates))
    report.same("games that were judged", len(list(judged)), 0)
    report.compare("explored", explored, chance, UNLIKELY * math.sqrt(variance) + 1e-9)
    sampled.finish(report)
    check_result(report, recording)
    report.series(recording.logged, expected)


def judged_means(config: Any, directory: Path) -> list[float]:
    """The mean returns of the games without exploration, and of more games where those were better than the best.

    The games lie in files by their seeds: those of one evaluation are consecutive, and are not the training's.
    """
    training = range(config.seed, config.seed + config.num_envs)
    seeds = [seed for seed in recorded.read(directory / "seeds") if seed not in training]
    seeds = [seed for seed in seeds if seed > 1]  # 0 and 1: what is to be restored, or is tried out, is reset first
    side_by_side = min(max(config.eval_episodes, config.confirm_episodes), 8)
    groups = [sorted(seeds[i : i + side_by_side]) for i in range(0, len(seeds), side_by_side)]
    # A resumed run plays again what came after its checkpoint.
    groups = [group for i, group in enumerate(groups) if group not in groups[:i]]

    def returns(group: list[int], count: int) -> list[float]:
        found = []
        for row, seed in enumerate(group):
            games = episodes(Recording([recorded.read(directory / str(seed))], [], set(), {}, None, directory))
            share = len(range(row, count, side_by_side))
            found += [value for _, value, _ in games.get("charts/episodic_return", [])[:share]]
        return found

    best, means, left = -math.inf, [], iter(groups)
    for group in left:
        played = returns(group, config.eval_episodes)
        if np.mean(played) > best:
            played += returns(next(left), config.confirm_episodes)
        means.append(float(np.mean(played)))
        best = max(best, means[-1])
    return means
