"""PPO, recomputed."""

import functools
from collections import defaultdict
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests import reference
from tests.recompute.record import Recording, Update
from tests.recompute.report import Report, mean_of
from tests.recompute.steps import check_chain, check_result, check_step, columns, episodes, products
from tests.reference import SINGLE, Numbers, Rounding, Weights, with_bounds

STATS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm")


def ppo_numbers(
    config: Any, update: Update, trained: set[str], batch: Numbers, clip_coef: float, rounding: Rounding
) -> Numbers:
    """The results of one gradient step of PPO."""
    weights = dict(update.before.networks[0])
    learned = {name: weights[name].clone().requires_grad_() for name in weights if name in trained}
    outputs, values, buffers = reference.actor_critic(weights | learned, batch["observations"], rounding, training=True)
    log_probs, entropies = reference.policy(weights | learned, outputs, batch["actions"], rounding)
    terms = reference.ppo_terms(
        log_probs,
        batch["log_probs"],
        reference.normalized(batch["advantages"], rounding) if config.norm_adv else batch["advantages"],
        values,
        batch["returns"],
        entropies,
        batch["values"],
        rounding,
        clip_coef=clip_coef,
        vf_coef=config.vf_coef,
        ent_coef=config.ent_coef,
        value_clip_coef=config.value_clip_coef,
    )
    loss = terms.pop("loss")
    return (
        terms | reference.adam_moments(loss, learned, update.before.moments, config.max_grad_norm, rounding) | buffers
    )


def check_rollout(
    config: Any, report: Report, weights: Weights, raw: dict[str, NDArray[Any]], samples: Numbers
) -> None:
    """Compare the samples of an update with the raw steps, and with the network's outputs for these."""
    shape = raw["reward"].shape
    found = {name: column.unflatten(0, shape) for name, column in samples.items()}
    for name, mine in [("observations", "obs"), ("terminated", "terminated")]:
        report.same(f"rollout: {name}", found[name], raw[mine].astype(np.float64))
    # A Gaussian's samples are stored as drawn, and the environment gets the nearest action within its bounds.
    taken = found["actions"].numpy()
    if "log_std" in weights:
        report.compare("drawn beyond the bounds", float((taken != raw["action"]).any()), 1.0, 0.0)
        space: Any = gym.make(config.env_id).action_space
        taken = taken.clip(space.low, space.high)
    report.same("rollout: actions", taken, raw["action"].astype(np.float64))
    rewards = torch.from_numpy(raw["reward"].astype(np.float32)).double()
    report.compare("rollout: rewards", found["rewards"], rewards, 2 * SINGLE * config.norm_reward * rewards.abs())
    terminated, truncated = torch.from_numpy(raw["terminated"]), torch.from_numpy(raw["truncated"])
    report.same("rollout: truncated", found["truncated"] * ~terminated, truncated & ~terminated)

    def said(rounding: Rounding) -> Numbers:
        before, after = (torch.from_numpy(raw[name]).flatten(0, 1).double() for name in ("obs", "next_obs"))
        outputs, values, _ = reference.actor_critic(weights, before, rounding, training=False)
        log_probs, _ = reference.policy(weights, outputs, samples["actions"], rounding)
        _, next_values, _ = reference.actor_critic(weights, after, rounding, training=False)
        next_values = next_values.unflatten(0, shape).masked_fill(terminated, 0.0)  # nothing follows: not looked at
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


def check_statistics(report: Report, weights: Weights, history: Tensor) -> None:
    """Compare a network's normalisation, if any, with all observations of the earlier rollouts: (steps, n)."""
    if "normalize.mean" in weights:
        mean, variance = reference.moments(history)
        report.compare("statistics: mean", weights["normalize.mean"], mean, 1e-12)
        report.compare("statistics: variance", weights["normalize.variance"], variance, 1e-12 * variance.abs())
        report.same("statistics: count", weights["normalize.count"], len(history))


def check_ppo(config: Any, recording: Recording, report: Report) -> None:
    """Compare a run of PPO."""
    raw, length = columns(recording)
    report.same("agent steps", length, config.num_updates * config.num_steps)
    if config.norm_reward:
        paid = torch.from_numpy(raw["reward"].astype(np.float32)).double()
        raw["reward"] = reference.scaled_rewards(paid, raw["terminated"] | raw["truncated"], config.gamma).numpy()
    seen_so_far = torch.from_numpy(raw["obs"].astype(np.float32)).double()
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
        check_statistics(report, first.before.networks[0], seen_so_far[: rows.start].flatten(0, 1))
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
                check_step(report, update, learned, learning_rate, 1e-5, numbers)
                steps.append(numbers)
                seen += chosen.tolist()
                position += 1
            report.same("each sample once an epoch", sorted(seen), list(range(config.num_envs * config.num_steps)))
            if config.target_kl is not None and float(steps[-1]["approx_kl"][0]) > config.target_kl:
                break
        now = (number + 1) * config.num_envs * config.num_steps
        for tag in STATS:
            expected[f"losses/{tag}"].append((now, *mean_of(numbers[tag] for numbers in steps)))
        explained = reference.explained_variance(samples["values"], samples["returns"], SINGLE)
        expected["losses/explained_variance"].append((now, explained, 1e-9))
        expected["charts/learning_rate"].append((now, learning_rate, 0.0))
    report.same("gradient steps", position, len(recording.updates))
    check_statistics(report, recording.result.state_dict(), seen_so_far.flatten(0, 1))
    check_result(report, recording)
    report.series(recording.logged, expected)
