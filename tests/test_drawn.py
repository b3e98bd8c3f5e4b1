"""Every public pure function on inputs drawn at random: dtypes, layouts in memory, constant and extreme numbers.

Results and gradients are compared with the float64 formulas of `tests.reference`, number by number. These formulas also
give the allowed error: `Rounding` disturbs each intermediate number by the unit roundoff of the coarsest dtype among
the inputs, eps / 2, and a result may be off by `SPREADS` root mean squares of `DRAWS` such draws, plus eps for its own
format. Formulas in float64 can't be disturbed by float64's own unit; they are by float32's, and the spread is scaled
down.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minirl.dqn import double_dqn_target, dqn_loss
from minirl.networks import Categorical
from minirl.ppo import clipped_surrogate_loss, compute_gae, normalized, ppo_loss, value_loss
from minirl.q_learning import q_update
from minirl.runs.losses import explained_variance
from tests import reference
from tests.recompute.report import Report
from tests.reference import SINGLE, SPREADS, Numbers, Rounding

DRAWS = 10  # so many that the mean square of a single number's disturbances is not small by chance
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WHOLE = (torch.int64, torch.int32, torch.uint8, torch.bool)

Compute = Callable[[Rounding], Numbers]


class Draw:
    """What is drawn from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.narrowest = torch.finfo(torch.float64)

    def dtypes(self, *more: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """A kind of floats; and the same, or another, or one of `more`. From here on numbers fit into both."""
        dtype = self.choice(*FLOATS)
        other = self.choice(dtype, dtype, *FLOATS, *more)
        kinds = [torch.finfo(kind) for kind in (dtype, other) if kind.is_floating_point]
        self.narrowest = min(kinds, key=lambda info: info.max)
        return dtype, other

    def choice(self, *options: Any) -> Any:
        return options[self.rng.integers(len(options))]

    def numbers(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Numbers of a dtype (...) that can also hold their squares and sums: usual, equal, large, tiny, mixed."""
        if not dtype.is_floating_point:
            return torch.from_numpy(self.rng.integers(-5 if dtype.is_signed else 0, 6, shape)).to(dtype)
        info = self.narrowest
        usual = self.rng.normal(size=shape)
        values = self.choice(
            usual,
            np.full(shape, self.rng.normal()),
            self.choice(-20.7, 100.1) + 1e-2 * usual,
            usual * info.max**0.25,
            usual * info.tiny**0.25,
            usual * 10 ** self.rng.uniform(-3, 1, shape),
        )
        return torch.from_numpy(values).to(dtype)

    def laid_out(self, values: Tensor) -> Tensor:
        """The same numbers, laid out in memory as they come, transposed, with gaps, channels-last, or expanded."""
        how = self.choice("contiguous", "transposed", "gaps", "channels-last", "expanded")
        if how == "transposed":
            return values.mT.contiguous().mT if values.ndim > 1 else values
        if how == "gaps":
            room = torch.zeros([2 * size + 1 for size in values.shape], dtype=values.dtype)
            view = room[tuple(slice(1, None, 2) for _ in values.shape)]
            return view.copy_(values)
        if how == "channels-last" and values.ndim == 4:
            return values.contiguous(memory_format=torch.channels_last)
        if how == "expanded" and bool((values == values[:1]).all()):
            return values[:1].expand(values.shape)
        return values

    def tensor(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return self.laid_out(self.numbers(dtype, *shape))

    def flags(self, *shape: int) -> Tensor:
        """Flags (...), as booleans or numbers."""
        flags = torch.from_numpy(self.rng.random(shape) < self.choice(0.0, 0.2, 1.0))
        return self.laid_out(flags.to(self.choice(torch.bool, torch.uint8, torch.float32)))

    def log_probs(self, dtype: torch.dtype, advantages: Tensor, most: float) -> tuple[Tensor, Tensor]:
        """New and old log-probabilities (B,): near, the same, nearly the same, and far, up by more than `most` only
        where A is not negative: there the ratio is clipped.
        """
        old = -self.rng.exponential(1.5, len(advantages))
        moved = self.rng.normal(size=len(old)) * self.choice(0.0, 1e-6, 0.01, 0.3)
        far = self.rng.random(len(old)) < self.choice(0.0, 0.5)
        moved[far] = self.rng.choice([-1000.0, -50.0, -5.0, 3.0, 90.0, 1000.0], far.sum())
        moved = np.where(advantages.double().numpy() < 0, np.minimum(moved, most), moved)
        return tuple(self.laid_out(torch.from_numpy(x).to(dtype)) for x in (old + moved, old))  # type: ignore[return-value]


def unit_of(*tensors: Tensor) -> float:
    """The unit roundoff of the coarsest of some dtypes; whole numbers are computed with as float32."""
    eps = [torch.finfo(x.dtype if x.is_floating_point() else torch.float32).eps for x in tensors]
    return max(eps) / 2


def compare(report: Report, found: dict[str, Tensor], compute: Compute, dtype: torch.dtype, *inputs: Tensor) -> None:
    """Compare what was computed, of this dtype, from these inputs."""
    unit, coarse = unit_of(*inputs), max(unit_of(*inputs), SINGLE)
    kinds = [torch.finfo(x.dtype) for x in inputs if x.is_floating_point()]
    smallest = max(info.tiny * info.eps for info in kinds)
    exact = compute(Rounding())
    drawn = [compute(Rounding(seed, coarse, coarse, smallest)) for seed in range(DRAWS)]
    for name, value in exact.items():
        spread = torch.stack([other[name] - value for other in drawn]).square().mean(dim=0).sqrt()
        bound = SPREADS * unit / coarse * spread + 2 * unit * value.abs() + 8 * smallest
        assert found[name].dtype == dtype, f"{name} is {found[name].dtype}"
        report.compare(name, found[name].detach(), value.detach(), bound.detach())


def wanted(tensor: Tensor) -> Tensor:
    """A float64 copy, with a gradient."""
    return tensor.detach().double().requires_grad_()


def gradients(loss: Tensor, **inputs: Tensor) -> Numbers:
    """The loss, and its gradient with respect to these."""
    found = torch.autograd.grad(loss, list(inputs.values()))
    return {"loss": loss.detach()} | {f"d / d {name}": slope for name, slope in zip(inputs, found, strict=True)}


def a_gae(draw: Draw, report: Report) -> None:
    """Each TD error is rounded 4 times, each step of the recursion twice: 2 T + 6 units of what is summed up."""
    shape = int(draw.rng.integers(1, 9)), int(draw.rng.integers(1, 4))
    dtype, other = draw.dtypes(*WHOLE)
    values, next_values, rewards = (draw.tensor(kind, *shape) for kind in (dtype, dtype, other))
    arguments = (rewards, values, next_values, draw.flags(*shape), draw.flags(*shape))
    gamma, gae_lambda = draw.choice(0.0, 0.5, 0.99, 1.0), draw.choice(0.0, 0.9, 1.0)
    advantages, returns = compute_gae(*arguments, gamma, gae_lambda)
    expected, sizes = reference.gae(*arguments, gamma, gae_lambda)
    reach = (2 * len(rewards) + 6) * unit_of(rewards, values) * sizes
    assert advantages.dtype == returns.dtype == torch.promote_types(rewards.dtype, dtype)
    report.compare("advantages", advantages, expected, reach)
    report.compare("returns", returns, expected + values.double(), reach + 2 * unit_of(rewards, values) * sizes)


def a_surrogate_loss(draw: Draw, report: Report) -> None:
    count, (dtype, other) = int(draw.rng.integers(1, 9)), draw.dtypes(*WHOLE)
    advantages = draw.tensor(other, count)
    log_prob, old = draw.log_probs(dtype, advantages, most=3.0)
    log_prob.requires_grad_()
    clip_coef = draw.choice(0.1, torch.tensor(0.3, dtype=torch.float64))
    loss = clipped_surrogate_loss(log_prob, old, advantages, clip_coef)
    most = float(np.log(torch.finfo(dtype).max)) - 1

    def compute(r: Rounding) -> Numbers:
        moving = wanted(log_prob)
        args = (moving, old.double(), advantages.double(), float(clip_coef), r, most)
        return gradients(reference.surrogate_loss(*args), log_prob=moving)

    found = gradients(loss, log_prob=log_prob)
    found["d / d log_prob"] = found["d / d log_prob"].to(loss.dtype)  # of its own dtype, always
    compare(report, found, compute, torch.promote_types(dtype, advantages.dtype), log_prob, advantages)


def a_value_loss(draw: Draw, report: Report) -> None:
    count, (dtype, other) = int(draw.rng.integers(1, 9)), draw.dtypes(torch.int64, torch.uint8)
    values, old_values, returns = (draw.tensor(kind, count) for kind in (dtype, dtype, other))
    values.requires_grad_()
    clip_coef = draw.choice(None, 0.2, 1.0)
    loss = value_loss(values, returns, old_values, clip_coef)

    def compute(r: Rounding) -> Numbers:
        moving = wanted(values)
        args = (moving, returns.double(), old_values.double(), clip_coef, r)
        return gradients(reference.value_loss(*args), values=moving)

    found = gradients(loss, values=values)
    found["d / d values"] = found["d / d values"].to(loss.dtype)
    compare(report, found, compute, torch.promote_types(dtype, returns.dtype), values, returns)


def a_ppo_loss(draw: Draw, report: Report) -> None:
    count, (dtype, _) = int(draw.rng.integers(1, 9)), draw.dtypes()
    advantages, values, old_values, returns = (draw.tensor(dtype, count) for _ in range(4))
    log_prob, old = draw.log_probs(dtype, torch.full((count,), -1.0), most=3.0)
    entropies = draw.laid_out(draw.numbers(dtype, count).abs())
    moving = {"log_prob": log_prob, "values": values, "entropy": entropies}
    for tensor in moving.values():
        tensor.requires_grad_()
    settings: dict[str, Any] = {"clip_coef": 0.2, "vf_coef": draw.choice(0.0, 0.5), "ent_coef": draw.choice(0.0, 0.01)}
    settings["value_clip_coef"] = draw.choice(None, 0.3)
    loss, stats = ppo_loss(log_prob, old, advantages, values, returns, entropies, old_values=old_values, **settings)
    assert not any(tensor.requires_grad for tensor in stats.values())
    assert float(stats["approx_kl"]) >= 0

    def compute(r: Rounding) -> Numbers:
        mine = {name: wanted(tensor) for name, tensor in moving.items()}
        terms = reference.ppo_terms(
            mine["log_prob"],
            old.double(),
            advantages.double(),
            mine["values"],
            returns.double(),
            mine["entropy"],
            old_values.double(),
            r,
            **settings,
        )
        return {**terms, **gradients(terms["loss"], **mine)}

    compare(report, {**stats, **gradients(loss, **moving)}, compute, dtype, log_prob)


def normalised_advantages(draw: Draw, report: Report) -> None:
    dtype, _ = draw.dtypes()
    advantages = draw.tensor(dtype, int(draw.rng.integers(2, 40)))
    found = {"normalised": normalized(advantages)}
    compare(
        report,
        found,
        lambda r: {"normalised": reference.normalized(advantages.double(), r)},
        dtype,
        advantages,
    )


def an_explained_variance(draw: Draw, report: Report) -> None:
    """In float64, of differences of numbers that may be far from 0; returns of one-step episodes are the same."""
    (dtype, _), shape = draw.dtypes(), (int(draw.rng.integers(20, 40)), 2)
    values = draw.tensor(dtype, *shape)
    returns = draw.choice(draw.tensor(dtype, *shape), (1 - values) + values)
    expected = reference.explained_variance(values.double(), returns.double(), unit_of(returns))
    sizes = (values.double().abs().max() + returns.double().abs().max()) / returns.double().std()
    bound = 100 * 2.0**-53 * (1 + abs(expected)) * (1 + sizes)
    report.compare("explained variance", explained_variance(values, returns), expected, bound)


def a_target(draw: Draw, report: Report) -> None:
    count, actions, (dtype, other) = int(draw.rng.integers(1, 9)), int(draw.rng.integers(1, 5)), draw.dtypes(*WHOLE)
    rewards, terminated = draw.tensor(other, count), draw.flags(count)
    next_q, next_q_target = draw.tensor(dtype, count, actions), draw.tensor(dtype, count, actions)
    if draw.choice(True, False):  # what follows an end may be anything
        next_q_target = torch.where(terminated.bool()[:, None], torch.nan, next_q_target)
    gamma = draw.choice(0.0, 0.97, 1.0)
    found = {"target": double_dqn_target(rewards, terminated, next_q, next_q_target, gamma)}
    inputs = (rewards.double(), terminated, next_q, next_q_target.double(), gamma)
    expected = torch.promote_types(rewards.dtype, dtype)
    compare(report, found, lambda r: {"target": reference.dqn_target(*inputs, r)}, expected, rewards, next_q)


def a_td_loss(draw: Draw, report: Report) -> None:
    count, actions, (dtype, other) = int(draw.rng.integers(1, 9)), int(draw.rng.integers(1, 5)), draw.dtypes(*WHOLE)
    q_values, targets = draw.tensor(dtype, count, actions).requires_grad_(), draw.tensor(other, count)
    taken = draw.laid_out(torch.from_numpy(draw.rng.integers(0, actions, count)))
    huber = draw.choice(True, False)
    loss = dqn_loss(q_values, taken, targets, huber=huber)

    def compute(r: Rounding) -> Numbers:
        q = wanted(q_values)
        return gradients(reference.td_loss(q, taken, targets.double(), huber, r), q=q)

    found = gradients(loss, q=q_values)
    found["d / d q"] = found["d / d q"].to(loss.dtype)
    compare(report, found, compute, torch.promote_types(dtype, targets.dtype), q_values, targets)


def a_distribution(draw: Draw, report: Report) -> None:
    (dtype, _), actions = draw.dtypes(), int(draw.rng.integers(1, 6))
    shape = draw.choice((5, actions), (1, actions), (2, 3, 2, actions))
    logits = draw.numbers(dtype, *shape)
    if draw.choice(True, False):  # huge, as far as it can hold them; and impossible ones, but for the first
        logits = logits + draw.choice(0.0, min(1e7, torch.finfo(dtype).max / 2))
        logits[..., 1:][torch.from_numpy(draw.rng.random((*shape[:-1], actions - 1)) < 0.3)] = -torch.inf
    logits = draw.laid_out(logits).requires_grad_()
    taken = draw.laid_out(torch.from_numpy(draw.rng.integers(0, actions, shape[:-1])))
    taken = taken.masked_fill(logits.gather(-1, taken[..., None])[..., 0].isinf(), 0)
    weights = torch.from_numpy(draw.rng.normal(size=shape[:-1]))
    distribution = Categorical(logits=logits)
    log_prob, entropy = distribution.log_prob(taken), distribution.entropy()
    slope = torch.autograd.grad((weights.to(dtype) * (log_prob + entropy)).sum(), logits)[0]

    def compute(r: Rounding) -> Numbers:
        mine = wanted(logits)
        log_pi = reference.log_softmax(mine, r)
        numbers = {"log_prob": log_pi.gather(-1, taken[..., None])[..., 0], "entropy": reference.entropy(log_pi, r)}
        weighted = r(weights) * r(numbers["log_prob"] + numbers["entropy"])
        return {**numbers, "d / d logits": torch.autograd.grad(weighted.sum(), mine)[0]}

    compare(report, {"log_prob": log_prob, "entropy": entropy, "d / d logits": slope}, compute, dtype, logits)


def a_q_update(draw: Draw, report: Report) -> None:
    """Ten operations in float64, on what is summed up; a table in float32 rounds what is stored."""
    dtype = draw.choice(torch.float64, torch.float32)
    table = draw.laid_out(draw.numbers(dtype, 4, 3)).numpy()
    table = table.copy() if 0 in table.strides else table  # each entry has a place of its own
    expected = torch.from_numpy(table.astype(np.float64))
    places: list[Any] = [draw.rng.integers(0, n) for n in (4, 3, 4)]
    state, action, next_state = places
    kind = draw.choice(float, int, bool, np.float64, np.float32, np.float16, np.int64, np.int8, np.bool_)
    reward = kind(draw.choice(0, 1, 0.1, -20.7))
    terminated, alpha, gamma = draw.choice(True, False, np.True_, np.False_), draw.choice(0.3, 1.0), 0.99
    found = q_update(table, state, action, reward, next_state, terminated, alpha=alpha, gamma=gamma)
    sizes = abs(float(reward)) + float(expected.abs().max())
    transition = (int(state), int(action), float(reward), int(next_state), bool(terminated))
    (error,) = reference.q_learning(expected, [transition], [alpha], gamma)
    report.compare("TD error", found, error, 10 * 2.0**-53 * sizes)
    stored = torch.finfo(dtype).eps * expected.abs()
    report.compare("table", torch.tensor(table), expected, 10 * 2.0**-53 * sizes + stored)


FUNCTIONS = [
    a_gae,
    a_surrogate_loss,
    a_value_loss,
    a_ppo_loss,
    normalised_advantages,
    an_explained_variance,
    a_target,
    a_td_loss,
    a_distribution,
    a_q_update,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=[function.__name__ for function in FUNCTIONS])
def test_any_input_gives_what_the_formula_gives(function: Callable[[Draw, Report], None]) -> None:
    for seed in range(25):
        report = Report()
        function(Draw(seed), report)
        assert report.worst
        assert not report.wrong, f"seed {seed}"
