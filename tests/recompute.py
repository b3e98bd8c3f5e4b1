"""Trains, records what went into each update and what came out, and computes all of it again (`tests.reference`).

Nothing of the package is changed: the environments write down their steps (`tests.recorded`), and the function that
`compiled` returns, compiled or not, is called by one that looks at its arguments and at the weights before and after.
Then every column of the rollouts or of the batches, every loss, moment, weight and buffer, and every TensorBoard tag
but the clock's (`charts/SPS`, `charts/minutes`) is compared.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minirl import dqn, ppo, q_learning
from minirl.envs.vector import VectorEnv
from minirl.fast.compiled import Compiled
from tests import recorded, reference
from tests.reference import BFLOAT16, SINGLE, Numbers, Rounding, Weights, with_bounds
from tests.scalars import read_scalars
from tests.test_resume import train_with_kills

STATS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm")
BATCH = ("obs", "actions", "rewards", "next_obs", "terminated")
CLOCK = {"charts/SPS", "charts/minutes"}
TIE = 1e-4  # relative: of two actions' values that are nearer to each other than that, either may be taken
UNLIKELY = 6  # standard deviations

Series = dict[str, list[tuple[int, float, float]]]  # tag -> agent step, value, how far a logged one may be from it


class Report:
    """The largest error of each quantity, as a share of its bound: above 1 is wrong."""

    def __init__(self) -> None:
        self.worst: dict[str, float] = {}

    def compare(self, what: str, found: Any, expected: Any, bound: Any) -> None:
        """Compare numbers, element by element; NaN is equal to NaN, and nothing is within a bound of 0 but the same."""
        found, expected, bound = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected, bound))
        if found.shape != expected.shape:
            self.worst[what] = math.inf
            return
        same = (found == expected) | (found.isnan() & expected.isnan())
        share = ((found - expected).abs() / bound).masked_fill(same, 0.0).nan_to_num(math.inf, math.inf)
        self.worst[what] = max(self.worst.get(what, 0.0), float(share.max()) if share.numel() else 0.0)

    def same(self, what: str, found: Any, expected: Any) -> None:
        """Compare what must be equal to the last bit."""
        self.compare(what, found, expected, 0.0)

    def series(self, logged: dict[str, list[tuple[int, float]]], expected: Series) -> None:
        """Compare all tags."""
        for tag in (logged.keys() | expected.keys()) - CLOCK:
            found, wanted = sorted(logged.get(tag, [])), sorted(expected.get(tag, []))
            self.same(f"steps of {tag}", [step for step, _ in found], [step for step, *_ in wanted])
            values = [value for _, value in found], [value for _, value, _ in wanted]
            self.compare(tag, *values, [bound + 2 * SINGLE * abs(value) for _, value, bound in wanted])

    @property
    def wrong(self) -> dict[str, float]:
        """What is beyond its bound."""
        return {what: share for what, share in self.worst.items() if not share <= 1}


@dataclass
class State:
    """Networks (the one that learns first) and moments at some time, in float64; how many steps Adam has done."""

    networks: list[Weights]
    moments: dict[str, tuple[Tensor, Tensor]]
    step: int


@dataclass
class Update:
    """What a gradient step was given, and what it returned."""

    before: State
    arguments: tuple[Any, ...]
    result: Tensor
    after: State


@dataclass
class Case:
    """A path through the package: an algorithm, settings, a network of one's own, kills."""

    module: Any  # ppo, dqn or q_learning
    config: Any
    own: type[nn.Module] | None = None
    kills: list[int] = field(default_factory=list)  # after so many calls of `Run.checkpoint` each time
    log_every: int = 70  # agent steps, of Double DQN


@dataclass
class Recording:
    """What a run left: each environment's raw steps, the updates in order, what was logged and returned."""

    steps: list[list[recorded.Step]]
    updates: list[Update]
    trained: set[str]  # names of the weights that are not frozen
    logged: dict[str, list[tuple[int, float]]]
    result: Any
    directory: Path


def doubled(value: Any) -> Any:
    """A copy, in float64."""
    if isinstance(value, dict):
        return {name: doubled(item) for name, item in value.items()}
    return value.detach().clone().contiguous().double() if isinstance(value, Tensor) else value


def state_of(bound: Sequence[Any]) -> State:
    networks = [item for item in bound if isinstance(item, nn.Module)]
    (optimizer,) = (item for item in bound if isinstance(item, torch.optim.Optimizer))
    names: dict[Tensor, str] = {weight: name for name, weight in networks[0].named_parameters()}
    states = {names[weight]: state for weight, state in optimizer.state.items() if state}
    return State(
        [doubled(network.state_dict()) for network in networks],
        {name: (doubled(state["exp_avg"]), doubled(state["exp_avg_sq"])) for name, state in states.items()},
        max((int(state["step"]) for state in states.values()), default=0),
    )


def record(case: Case, folder: Path) -> Recording:
    """Train, and return what happened."""
    module, config, directory = case.module, case.config, folder / "steps"
    directory.mkdir(parents=True)
    files = [directory / str(config.seed + row) for row in range(getattr(config, "num_envs", 1))]
    updates: dict[int, Update] = {}
    trained: set[str] = set()
    results: list[Any] = []

    def compiled(function: Callable[..., Any], *bound: Any, enabled: bool) -> Callable[..., Any]:
        call: Callable[..., Any] = original_compiled(function, *bound, enabled=enabled)
        if function is not module.gradient_step:
            return call
        trained.update(name for name, weight in bound[0].named_parameters() if weight.requires_grad)

        def watched(*arguments: Any) -> Any:
            before, given = state_of(bound), tuple(doubled(argument) for argument in arguments)
            result = call(*arguments)
            assert isinstance(call, Compiled) == enabled
            assert not isinstance(call, Compiled) or call.enabled, "it fell back"
            # A session that goes on from a checkpoint does again what was done after it.
            updates[before.step] = Update(before, given, doubled(result), state_of(bound))
            return result

        return watched

    def load_checkpoint(*arguments: Any, **options: Any) -> Any:
        saved = original_load(*arguments, **options)
        for file in files:
            recorded.keep(file, saved["global_step"] // len(files))
        return saved

    def train(*arguments: Any, **options: Any) -> None:
        results.append(original_train(*arguments, **options))

    original_load, original_train = module.load_checkpoint, module.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPS_DIR", str(directory))
        patch.setattr(module, "load_checkpoint", load_checkpoint)
        if module is not q_learning:
            original_compiled = module.compiled
            patch.setattr(module, "compiled", compiled)
        if config.env_id == "frames":
            patch.setattr(
                module, "make_vector_env", lambda _, *args, **options: VectorEnv(recorded.frames, *args, **options)
            )
        if case.own is not None:
            patch.setattr(module, "ActorCritic" if module is ppo else "QNetwork", case.own)
        patch.setattr(dqn, "LOG_EVERY", case.log_every)
        train_with_kills(train, config, folder / "run", case.kills, patch)
    return Recording(
        [recorded.read(file) for file in files],
        [updates[number] for number in sorted(updates)],
        trained,
        read_scalars(folder / "run"),
        results[-1],
        directory,
    )


def check(case: Case, folder: Path) -> Report:
    """Train, and compute all of it again."""
    report = Report()
    recording = record(case, folder)
    checks = {ppo: check_ppo, dqn: check_dqn, q_learning: check_q_learning}
    checks[case.module](case.config, recording, report)
    return report


def products(config: Any) -> float:
    """The unit roundoff of what matrices multiply."""
    return BFLOAT16 if config.precision == "bfloat16" else SINGLE


def columns(recording: Recording) -> tuple[dict[str, np.ndarray[Any, Any]], int]:
    """The raw steps as arrays (steps, N, ...), and how many steps there are."""
    rows = [
        {
            **dict(zip(("obs", "next_obs"), recorded.shown(steps), strict=True)),
            "action": np.array([step.action for step in steps]),
            "reward": np.array([step.reward for step in steps]),
            "terminated": np.array([step.terminated for step in steps]),
            "truncated": np.array([step.truncated for step in steps]),
        }
        for steps in recording.steps
    ]
    return {name: np.stack([row[name] for row in rows], axis=1) for name in rows[0]}, len(recording.steps[0])


def episodes(recording: Recording) -> Series:
    """The return and the length of each episode."""
    series: Series = {"charts/episodic_return": [], "charts/episodic_length": []}
    for steps in recording.steps:
        total = 0.0
        for t, step in enumerate(steps):
            total = step.reward + (total if step.number else 0.0)
            if step.terminated or step.truncated:
                now = (t + 1) * len(recording.steps)
                series["charts/episodic_return"].append((now, total, 1e-12 * (1 + abs(total))))
                series["charts/episodic_length"].append((now, step.number + 1.0, 0.0))
    return {tag: points for tag, points in series.items() if points}


def mean_of(numbers: Iterable[tuple[Tensor, float]]) -> tuple[float, float]:
    """The mean of some numbers, and how far one in float32 may be from it: its sum is rounded at each of them."""
    values, bounds = zip(*((float(value), bound) for value, bound in numbers), strict=True)
    sizes = [abs(value) for value in values]
    return sum(values) / len(values), (sum(bounds) + len(values) * SINGLE * sum(sizes)) / len(values)


def check_chain(report: Report, earlier: Update | None, update: Update) -> None:
    """Between two gradient steps nothing changes the network or the moments: no acting, no evaluation, no resume."""
    if earlier is None:
        return
    for name, value in update.before.networks[0].items():
        report.same("weights from step to step", value, earlier.after.networks[0][name])
    for name, (m, v) in update.before.moments.items():
        report.same("moments from step to step", torch.stack([m, v]), torch.stack(earlier.after.moments[name]))


def check_step(
    report: Report,
    update: Update,
    learned: Numbers,
    learning_rate: float,
    eps: float,
    numbers: Any,
    tags: Sequence[str],
) -> None:
    """Compare what one gradient step returned (`tags`), its moments, weights and buffers with what it should have.

    Args:
        learned: weights that are not frozen, before.
        numbers: `with_bounds` of all these.
    """
    for number, tag in enumerate(tags):
        report.compare(f"returned {tag}", update.result[number], *numbers[tag])
    after = update.after.networks[0]
    for name, weight in update.before.networks[0].items():
        if name in learned:
            m, v = update.after.moments[name]
            for kind, moment in (("m", m), ("v", v)):
                expected, bound = numbers[f"{kind} {name}"]
                if kind == "v":  # the square of a gradient that is all rounding, as a bias before a normalisation has
                    slope = numbers[f"m {name}"][1] / (1 - reference.BETA_1)
                    bound += (1 - reference.BETA_2) * slope**2
                report.compare(f"moment {kind}", (moment - expected).norm(), 0.0, bound)
            report.compare(
                "weights",
                after[name],
                *reference.adam_weights(weight, m, v, update.after.step, learning_rate, eps),
            )
        elif name in numbers:
            expected, bound = numbers[name]
            report.compare("buffers", (after[name] - expected).norm(), 0.0, bound)
        else:
            report.same("frozen weights", after[name], weight)


# PPO


def ppo_numbers(
    config: Any, update: Update, trained: set[str], batch: Numbers, clip_coef: float, rounding: Rounding
) -> Numbers:
    """What one gradient step of PPO comes to."""
    weights = dict(update.before.networks[0])
    learned = {name: weights[name].clone().requires_grad_() for name in weights if name in trained}
    logits, values, buffers = reference.actor_critic(weights | learned, batch["observations"], rounding, training=True)
    log_pi = rounding(logits - logits.logsumexp(1, keepdim=True))
    terms = reference.ppo_terms(log_pi, values, batch, config, clip_coef, rounding)
    loss = terms.pop("loss")
    return (
        terms | reference.adam_moments(loss, learned, update.before.moments, config.max_grad_norm, rounding) | buffers
    )


def check_rollout(
    config: Any, report: Report, weights: Weights, raw: dict[str, np.ndarray[Any, Any]], samples: Numbers
) -> None:
    """Compare the samples of an update with the raw steps, and with what the network says of these."""
    shape = raw["reward"].shape
    found = {name: column.unflatten(0, shape) for name, column in samples.items()}
    for name, mine in [("observations", "obs"), ("actions", "action"), ("terminated", "terminated")]:
        report.same(f"rollout: {name}", found[name], raw[mine].astype(np.float64))
    report.same("rollout: rewards", found["rewards"], raw["reward"].astype(np.float32))
    terminated, truncated = torch.from_numpy(raw["terminated"]), torch.from_numpy(raw["truncated"])
    report.same("rollout: truncated", found["truncated"] * ~terminated, truncated & ~terminated)

    def said(rounding: Rounding) -> Numbers:
        before, after = (torch.from_numpy(raw[name]).flatten(0, 1).double() for name in ("obs", "next_obs"))
        logits, values, _ = reference.actor_critic(weights, before, rounding, training=False)
        log_pi = rounding(logits - logits.logsumexp(1, keepdim=True))
        _, next_values, _ = reference.actor_critic(weights, after, rounding, training=False)
        rows = torch.arange(len(before))
        next_values = next_values.unflatten(0, shape).masked_fill(terminated, 0.0)  # nothing follows: not looked at
        log_probs = log_pi[rows, torch.from_numpy(raw["action"]).flatten()]
        return {"log_probs": log_probs, "values": values, "next_values": next_values.flatten()}

    for name, (expected, bound) in with_bounds(said, products(config)).items():
        column = samples[name].masked_fill(terminated.flatten(), 0.0) if name == "next_values" else samples[name]
        report.compare(f"rollout: {name}", (column - expected).norm(), 0.0, bound)

    advantages, sizes = reference.gae(
        found["rewards"],
        found["values"],
        found["next_values"],
        terminated,
        truncated,
        config.gamma,
        config.gae_lambda,
    )
    reach = (2 * len(advantages) + 6) * SINGLE * sizes
    report.compare("rollout: advantages", found["advantages"], advantages, reach)
    report.compare("rollout: returns", found["returns"], advantages + found["values"], reach + 2 * SINGLE * sizes)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(R - V) / Var(R); NaN where all returns are the same to rounding, 8 of their last bits."""
    if float(returns.max() - returns.min()) <= 8 * 2 * SINGLE * float(returns.abs().max()):
        return math.nan
    return 1 - float((returns - values).var() / returns.var())


def check_ppo(config: Any, recording: Recording, report: Report) -> None:
    """Compare a run of PPO."""
    raw, length = columns(recording)
    report.same("agent steps", length, config.num_updates * config.num_steps)
    expected = defaultdict(list, episodes(recording))
    position, minibatches = 0, config.num_envs * config.num_steps // config.minibatch_size
    for number in range(config.num_updates):
        remaining = 1 - number / config.num_updates
        learning_rate = config.learning_rate * (remaining if config.anneal_lr else 1)
        clip_coef = config.clip_coef * (remaining if config.anneal_clip else 1)
        rows = slice(number * config.num_steps, (number + 1) * config.num_steps)
        first = recording.updates[position]
        samples = first.arguments[0]
        played = {name: column[rows] for name, column in raw.items()}
        check_rollout(config, report, first.before.networks[0], played, samples)
        steps = []
        for _ in range(config.update_epochs):
            seen: list[int] = []
            for _ in range(minibatches):
                update = recording.updates[position]
                chosen = update.arguments[1].long()
                report.compare("clip_coef", update.arguments[2], clip_coef, 2 * SINGLE * clip_coef)
                check_chain(report, recording.updates[position - 1] if position else None, update)
                batch = {name: column[chosen] for name, column in update.arguments[0].items()}
                compute = functools.partial(ppo_numbers, config, update, recording.trained, batch, clip_coef)
                numbers = with_bounds(compute, products(config))
                if config.precision == "bfloat16":  # a sample at the edge of the range may be on either side of it
                    share, bound = numbers["clipfrac"]
                    numbers["clipfrac"] = share, bound + 1 / len(chosen)
                learned = {name: update.before.networks[0][name] for name in recording.trained}
                check_step(report, update, learned, learning_rate, 1e-5, numbers, STATS)
                steps.append(numbers)
                seen += chosen.tolist()
                position += 1
            report.same("each sample once an epoch", sorted(seen), list(range(config.num_envs * config.num_steps)))
            if config.target_kl is not None and float(steps[-1]["approx_kl"][0]) > config.target_kl:
                break
        now = (number + 1) * config.num_envs * config.num_steps
        for tag in STATS:
            expected[f"losses/{tag}"].append((now, *mean_of(numbers[tag] for numbers in steps)))
        explained = explained_variance(samples["values"], samples["returns"])
        expected["losses/explained_variance"].append((now, explained, 1e-9))
        expected["charts/learning_rate"].append((now, learning_rate, 0.0))
    report.same("gradient steps", position, len(recording.updates))
    check_result(report, recording)
    report.series(recording.logged, expected)


def check_result(report: Report, recording: Recording) -> None:
    """What `train` returns is the network after the last step."""
    for name, value in recording.updates[-1].after.networks[0].items():
        report.same("the network that is returned", recording.result.state_dict()[name], value)


# Double DQN


def dqn_numbers(config: Any, update: Update, trained: set[str], batch: Numbers, rounding: Rounding) -> Numbers:
    """What one gradient step of Double DQN comes to."""
    online, target = update.before.networks
    learned = {name: online[name].clone().requires_grad_() for name in online if name in trained}
    weights = online | learned
    next_q, buffers = reference.q_network(weights, batch["next_obs"], rounding, training=True)
    next_q_target, _ = reference.q_network(target, batch["next_obs"], rounding, training=False)
    q, buffers_after = reference.q_network(weights | buffers, batch["obs"], rounding, training=True)
    terms = reference.dqn_terms(q, next_q.detach(), next_q_target, batch, config, rounding)
    max_norm = math.inf if config.max_grad_norm is None else config.max_grad_norm
    loss = terms.pop("loss")
    return terms | reference.adam_moments(loss, learned, update.before.moments, max_norm, rounding) | buffers_after


def moved_target(target: Weights, online: Weights, trained: Iterable[str], tau: float) -> tuple[Weights, Weights]:
    """The target network after one move, and how far one in float32 may be from it; buffers are copied."""
    parameters = {name for name in target if "running" not in name and "tracked" not in name}
    moved = {name: target[name] + (tau if name in parameters else 1) * (online[name] - target[name]) for name in target}
    bound = {
        name: 4 * SINGLE * (target[name].abs() + online[name].abs()) if name in parameters else 0 * target[name]
        for name in target
    }
    return moved, bound


class Sampled:
    """Traces the transitions of batches back to the raw steps: each is a whole one, still remembered, and any is.

    Where frames are stored once there are `length / 20 + 5` rows more than steps, and each end takes one: what is
    remembered may be less. Of every draw, its place in the memory, from 0 to 1, is kept: uniform, with a mean of 1/2.
    """

    def __init__(self, raw: dict[str, np.ndarray[Any, Any]], window: int) -> None:
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
        """The first step of an environment that is remembered after its step `newest`."""
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


def check_dqn(config: Any, recording: Recording, report: Report, log_every: int = Case.log_every) -> None:
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

        # Acting: by the weights as they are now, but for chance.
        online = updates[done].before.networks[0] if done < len(updates) else updates[-1].after.networks[0]
        values, _ = reference.q_network(online, torch.from_numpy(raw["obs"][t]).double(), Rounding(), training=False)
        taken = values[torch.arange(envs), torch.from_numpy(raw["action"][t])]
        explored += int((taken < values.max(1).values - TIE * values.abs().max(1).values).sum())
        other = epsilon * (1 - 1 / values.shape[1])
        chance, variance = chance + envs * other, variance + envs * other * (1 - other)
        report.same("no chance, no exploration", explored * (chance == 0), 0)

        ended = int((raw["terminated"][t] | raw["truncated"][t]).sum())
        if now >= config.learning_starts and min(t + 1, window) * envs >= config.batch_size:
            for _ in range(multiples(config.train_frequency, before, now)):
                update = updates[done]
                check_chain(report, updates[done - 1] if done else None, update)
                for name, weight in update.before.networks[1].items():
                    report.compare("target network", weight, target[name], target_bound[name])
                target = update.before.networks[1]
                target_bound = {name: 0 * weight for name, weight in target.items()}
                batch = dict(
                    zip(("obs", "actions", "rewards", "next_obs", "terminated"), update.arguments, strict=True)
                )
                report.same("batch size", len(batch["actions"]), config.batch_size)
                sampled.check(report, batch, t)
                numbers = with_bounds(
                    functools.partial(dqn_numbers, config, update, recording.trained, batch), products(config)
                )
                learned = {name: update.before.networks[0][name] for name in recording.trained}
                tags = ("td_loss", "q_values", "grad_norm")
                check_step(report, update, learned, config.learning_rate * remaining, 1e-8, numbers, tags)
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
    # A run that goes on from a checkpoint plays again what came after it.
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


# Q-learning


def check_q_learning(config: Any, recording: Recording, report: Report, log_every: int = 100) -> None:
    """Compare a run of Q-learning, step by step: float64 on both sides."""
    table = torch.full((8, 3), config.initial_value, dtype=torch.float64)
    expected: Series = defaultdict(list)
    explored, chance, variance = 0, 0.0, 0.0
    games: list[tuple[float, list[float]]] = []  # the return and the TD errors of each
    total, errors = 0.0, list[float]()
    for now, step in enumerate(recording.steps[0], start=1):
        remaining = 1 - len(games) / config.num_episodes
        alpha = config.alpha * (remaining if config.anneal_alpha else 1)
        epsilon = config.epsilon * (remaining if config.anneal_epsilon else 1)
        values = table[step.obs]
        explored += bool(values[step.action] < values.max())
        other = epsilon * (1 - 1 / len(values))
        chance, variance = chance + other, variance + other * (1 - other)
        transition = (step.obs, step.action, step.reward, step.next_obs, step.terminated)
        errors += reference.q_learning(table, [transition], [alpha], config.gamma)
        total += step.reward
        if not (step.terminated or step.truncated):
            continue
        games.append((total, errors))
        total, errors = 0.0, []
        if len(games) % log_every == 0 or len(games) == config.num_episodes:
            returns, of_steps = zip(*games[-log_every:], strict=True)
            all_errors = [abs(error) for of_game in of_steps for error in of_game]
            expected["charts/episodic_return"].append((now, sum(returns) / len(returns), 1e-9))
            expected["charts/episodic_length"].append((now, len(all_errors) / len(returns), 1e-9))
            expected["losses/td_error"].append((now, sum(all_errors) / len(all_errors), 1e-9))
    report.same("episodes", len(games), config.num_episodes)
    # Equal values are ties, of which the first is taken: what is taken for exploring may be less than it was.
    report.compare("explored", explored, chance, UNLIKELY * math.sqrt(variance) + 1e-9)
    report.compare("table", recording.result, table, 1e-9 * (1 + table.abs()))
    report.series(recording.logged, expected)
