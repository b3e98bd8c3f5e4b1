"""PPO, computed again."""

import functools
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests import reference
from tests.recompute.record import Recording, Update
from tests.recompute.report import Report, mean_of
from tests.recompute.steps import check_chain, check_result, check_step, columns, episodes, products
from tests.reference import SINGLE, Numbers, Rounding, Weights, with_bounds

STATS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm")


def ppo_numbers(
    config: Any, update: Update, trained: set[str], batch: Numbers, clip_coef: float, rounding: Rounding
) -> Numbers:
    """What one gradient step of PPO comes to."""
    weights = dict(update.before.networks[0])
    learned = {name: weights[name].clone().requires_grad_() for name in weights if name in trained}
    logits, values, buffers = reference.actor_critic(weights | learned, batch["observations"], rounding, training=True)
    log_pi = reference.log_softmax(logits, rounding)
    terms = reference.ppo_terms(
        log_pi[torch.arange(len(log_pi)), batch["actions"].long()],
        batch["log_probs"],
        reference.normalized(batch["advantages"], rounding) if config.norm_adv else batch["advantages"],
        values,
        batch["returns"],
        reference.entropy(log_pi, rounding),
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
        log_pi = reference.log_softmax(logits, rounding)
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
        explained = reference.explained_variance(samples["values"], samples["returns"], SINGLE)
        expected["losses/explained_variance"].append((now, explained, 1e-9))
        expected["charts/learning_rate"].append((now, learning_rate, 0.0))
    report.same("gradient steps", position, len(recording.updates))
    check_result(report, recording)
    report.series(recording.logged, expected)
