"""What the algorithms compute, recomputed in float64, formula by formula, without any code of the package.

No float32 result equals the float64 one. The allowed error comes from the formulas themselves: each intermediate number
is disturbed at random, in relative size by the unit roundoff of its format (`Rounding`), and the result is compared
with the undisturbed one. Rounding errors of a sum of n terms behave like random ones (Higham and Mary 2019,
https://doi.org/10.1137/18M1226312): n roundings of one sign would give n units, random ones sqrt(n).
The bound of a number is `SPREADS` root mean squares of a few draws. The error of a wrong sign, factor, index or mask is
larger by orders of magnitude in float32; in bfloat16, where results are good to a percent, smaller changes are not
seen, which is why each path is also run in float32.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]
Numbers = dict[str, Tensor]

SINGLE, BFLOAT16 = 2.0**-24, 2.0**-8  # unit roundoffs: half of the last of 24 bits, of 8 bits
SPREADS = 10  # few draws, so that their root mean square may be half of what it should be; errors beyond 5 are unlikely
DRAWS = 5
# Numbers are disturbed by this many times the rounding error, and the result's error is divided by it: then some draws
# also cross an edge (of a ReLU, a clip, the better of two actions) that rounding might cross.
WIDER = 4


class Rounding:
    """Leaves numbers as they are, or, with a seed, disturbs them as rounding would."""

    def __init__(
        self, seed: int | None = None, products: float = SINGLE, unit: float = SINGLE, smallest: float = 0.0
    ) -> None:
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.products = products  # unit roundoff of what matrix products and convolutions multiply
        self.unit = unit  # of everything else
        self.smallest = smallest  # number of the format: numbers not far above it are rounded to a multiple of it

    def __call__(self, x: Tensor, terms: int = 1, unit: float | None = None) -> Tensor:
        """Disturb a result that is a sum of this many terms."""
        if self.generator is None:
            return x
        unit = self.unit if unit is None else unit
        noise = torch.rand(x.shape, generator=self.generator).mul_(2).sub_(1)
        if x.ndim and bool((x == x[:1]).all()):  # equal numbers are rounded alike: their errors don't average out
            noise = noise[:1].expand(x.shape)
        disturbed = x * (unit * math.sqrt(terms) * noise).add_(1)
        return disturbed + self.smallest * noise if self.smallest else disturbed

    def product(self, x: Tensor, terms: int = 1) -> Tensor:
        """Disturb a factor or a product: rounded to the format of products, summed up in float32."""
        return self(x, unit=max(self.products, self.unit * math.sqrt(terms)))


def with_bounds(compute: Callable[[Rounding], Numbers], products: float) -> dict[str, tuple[Tensor, float]]:
    """Return each of the numbers that `compute` returns, and how far (in the 2-norm) a computed one may be from it."""
    exact = compute(Rounding())
    draws = DRAWS if products == SINGLE else 2 * DRAWS  # more lies near an edge
    drawn = [compute(Rounding(seed, WIDER * products, WIDER * SINGLE)) for seed in range(draws)]
    bounds = {}
    for name, value in exact.items():
        squares = sum(float((other[name] - value).norm()) ** 2 for other in drawn) / draws / WIDER**2
        # Each number is finally stored as a float32.
        bounds[name] = (value, SPREADS * math.sqrt(squares) + 2 * SINGLE * float(value.norm()))
    return bounds


# Layers and networks: weights by name, (B, ...) -> (B, ...)


def linear(w: Weights, name: str, x: Tensor, r: Rounding, *, last: bool = False) -> Tensor:
    """x W^T + b; the last layer of the package's own networks is always in float32."""
    weight = w[f"{name}.weight"]
    terms = weight.shape[1] + len(x)  # the weights' gradient is a sum over the batch
    if last:
        return r(r(x, terms) @ r(weight, terms).T + w[f"{name}.bias"])
    return r.product(r.product(x, terms) @ r.product(weight, terms).T + w[f"{name}.bias"])


def convolution(w: Weights, name: str, x: Tensor, r: Rounding, stride: int) -> Tensor:
    """A convolution without padding."""
    weight = w[f"{name}.weight"]
    terms = weight[0].numel() + x[:, 0].numel() // stride**2
    return r.product(F.conv2d(r.product(x, terms), r.product(weight, terms), w[f"{name}.bias"], stride))


def tanh(x: Tensor, r: Rounding) -> Tensor:
    """The hyperbolic tangent."""
    return r.product(x.tanh())


def nature(w: Weights, name: str, images: Tensor, r: Rounding) -> Tensor:
    """The CNN of Mnih et al. (2015); its features lie pixel by pixel, not map by map."""
    x = images / 255
    for layer, stride in [(0, 4), (2, 2), (4, 1)]:
        x = convolution(w, f"{name}.convolutions.{layer}", x, r, stride).relu()
    return linear(w, f"{name}.dense.0", x.permute(0, 2, 3, 1).flatten(1), r).relu()


def batch_norm(w: Weights, name: str, x: Tensor, r: Rounding, *, training: bool) -> tuple[Tensor, Weights]:
    """Ioffe and Szegedy (2015): maps to mean 0 and variance 1, of the batch or of those seen; also the new buffers."""
    mean, variance = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    buffers = {}
    if training:
        count = x[:, 0].numel()
        mean = r(x.mean((0, 2, 3)), count)
        variance = r((x - mean[:, None, None]).square().mean((0, 2, 3)), count)
        buffers = {
            f"{name}.running_mean": 0.9 * w[f"{name}.running_mean"] + 0.1 * mean.detach(),
            f"{name}.running_var": 0.9 * w[f"{name}.running_var"] + 0.1 * variance.detach() * count / (count - 1),
            f"{name}.num_batches_tracked": w[f"{name}.num_batches_tracked"] + 1,
        }
    scale = w[f"{name}.weight"] / (variance + 1e-5).sqrt()
    shifted = (x - mean[:, None, None]) * scale[:, None, None] + w[f"{name}.bias"][:, None, None]
    return r.product(shifted), buffers


def own_body(w: Weights, images: Tensor, r: Rounding, *, training: bool) -> tuple[Tensor, Weights]:
    """The body of `tests.recorded.OwnBody`."""
    x = convolution(w, "body.first", images / 255, r, 4)
    x, buffers = batch_norm(w, "body.norm", x, r, training=training)
    x = convolution(w, "body.second", x.relu(), r, 2).relu().flatten(1)
    return tanh(linear(w, "body.frozen", x, r), r), buffers


def scaled(x: Tensor, mean: Tensor, variance: Tensor, r: Rounding) -> Tensor:
    """(x - mean) / standard deviation, clipped to +-10: computed in float64, and stored as float32."""
    return r(((x - mean) / (variance + 1e-8).sqrt()).clamp(-10, 10))


def actor_critic(w: Weights, obs: Tensor, r: Rounding, *, training: bool) -> tuple[Tensor, Tensor, Weights]:
    """Logits or means (B, A), values (B,), and the buffers afterwards."""
    buffers: Weights = {}
    if "normalize.mean" in w:
        obs = scaled(obs, w["normalize.mean"], w["normalize.variance"], r)
    if "body.first.weight" in w:
        features, buffers = own_body(w, obs, r, training=training)
        return linear(w, "actor", features, r), linear(w, "critic", features, r)[:, 0], buffers
    if "critic_body.0.weight" not in w:
        features = nature(w, "actor_body", obs, r)
        return linear(w, "actor", features, r, last=True), linear(w, "critic", features, r, last=True)[:, 0], buffers
    outputs = []
    for head in ("actor", "critic"):
        hidden = tanh(linear(w, f"{head}_body.0", obs, r), r)
        outputs.append(linear(w, head, tanh(linear(w, f"{head}_body.2", hidden, r), r), r, last=True))
    return outputs[0], outputs[1][:, 0], buffers


def q_network(w: Weights, obs: Tensor, r: Rounding, *, training: bool) -> tuple[Tensor, Weights]:
    """Q(s, .) (B, A), and the buffers afterwards."""
    if "body.first.weight" in w:
        features, buffers = own_body(w, obs, r, training=training)
        return linear(w, "head", features, r), buffers
    if "body.dense.0.weight" in w:
        features = nature(w, "body", obs, r)
    else:
        features = linear(w, "body.2", linear(w, "body.0", obs, r).relu(), r).relu()
    return linear(w, "head", features, r, last=True), {}


# Losses


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Advantages (T, N), each a sum of its own over what follows; also the sum of the sizes of what was summed up.

    Each TD error is rounded at most 4 times, and each step of the recursion rounds twice what was summed up behind it:
    a computed advantage is within 2 T + 6 unit roundoffs of these sizes.
    """
    steps, envs = rewards.shape
    advantages, sizes = torch.zeros(2, steps, envs, dtype=torch.float64)
    for env in range(envs):
        for start in range(steps):
            weight = 1.0
            for t in range(start, steps):
                future = 0.0 if terminated[t, env] else gamma * float(next_values[t, env])
                reward, value = float(rewards[t, env]), float(values[t, env])
                advantages[start, env] += weight * (reward + future - value)
                sizes[start, env] += weight * (abs(reward) + abs(future) + abs(value))
                if terminated[t, env] or truncated[t, env]:
                    break
                weight *= gamma * gae_lambda
    return advantages, sizes


def normalized(advantages: Tensor, r: Rounding) -> Tensor:
    """To mean 0 and (unbiased) standard deviation 1. The mean, after subtracting one of them, is rounded, too."""
    count = len(advantages)
    shifted = r(advantages - advantages[0])
    if not shifted.any():
        return shifted
    centred = r(shifted - r(shifted.sum() / count, count))
    return r(centred / ((centred.square().sum() / (count - 1)).sqrt() + 1e-8))


def explained_variance(values: Tensor, returns: Tensor, unit: float) -> float:
    """1 - Var(R - V) / Var(R); NaN if all returns are equal up to rounding, 8 of their last bits."""
    if float(returns.max() - returns.min()) <= 8 * 2 * unit * float(returns.abs().max()):
        return math.nan
    return 1 - float((returns - values).var() / returns.var())


def log_softmax(logits: Tensor, r: Rounding) -> Tensor:
    """log pi (..., A). The compiler's e^x and log are accurate to one unit of the last bit: twice a rounding error."""
    shifted = r(logits - logits.max(-1, keepdim=True).values)
    return r(shifted - r(r(r(shifted.exp(), 4).sum(-1, keepdim=True), logits.shape[-1]).log(), 4))


def entropy(log_pi: Tensor, r: Rounding) -> Tensor:
    """-sum p log p, (...,) of log-probabilities (..., A); impossible actions add nothing."""
    possible = log_pi.masked_fill(log_pi.isinf(), 0.0)
    return -r(r(log_pi.exp(), 4) * possible, log_pi.shape[-1]).sum(-1)


def policy(w: Weights, outputs: Tensor, actions: Tensor, r: Rounding) -> tuple[Tensor, Tensor]:
    """log pi(a) and entropy, (B,), of what `actor_critic` returned: of choices, or of a normal distribution."""
    if "log_std" not in w:
        log_pi = log_softmax(outputs, r)
        return log_pi[torch.arange(len(log_pi)), actions.long()], entropy(log_pi, r)
    log_std = w["log_std"].expand_as(outputs)
    distance = r(r(actions - outputs) * r((-log_std).exp(), 4))
    terms = r(r(r(distance.square()) / 2 + log_std) + math.log(2 * math.pi) / 2)
    entropies = r(log_std + (1 + math.log(2 * math.pi)) / 2)
    return -r(terms, terms.shape[-1]).sum(-1), r(entropies, entropies.shape[-1]).sum(-1)


def moments(history: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of all observations so far (n, ...); 0 and 1 if there are none."""
    if not len(history):
        return torch.zeros(history.shape[1:]).double(), torch.ones(history.shape[1:]).double()
    mean = history.mean(0)
    return mean, (history - mean).square().mean(0)


def scaled_rewards(rewards: Tensor, ended: Tensor, gamma: float) -> Tensor:
    """Rewards (T, N) of a whole run, each divided by the standard deviation of all discounted returns until then."""
    found, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for t in range(len(rewards)):
        for row in range(rewards.shape[1]):
            back = t
            while back >= 0 and not (back < t and ended[back, row]):
                returns[t, row] += gamma ** (t - back) * rewards[back, row]
                back -= 1
        found[t] = rewards[t] / (moments(returns[: t + 1].flatten())[1] + 1e-8).sqrt()
    return found.clamp(-10, 10)


def surrogate_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_coef: float,
    r: Rounding,
    most: float = math.inf,
) -> Tensor:
    """-mean(min(r A, clip(r) A)); ratios are at most e^`most`, so that they stay finite in a format."""
    ratio = r(r(log_prob - old_log_prob).clip(max=most).exp(), 4)
    clipped = ratio.clip(1 - clip_coef, 1 + clip_coef)
    return -r(torch.minimum(r(ratio * advantages), r(clipped * advantages)), len(ratio)).sum() / len(ratio)


def value_loss(values: Tensor, returns: Tensor, old_values: Tensor, clip_coef: float | None, r: Rounding) -> Tensor:
    """The mean square, or the mean of the larger of two."""
    errors = r(r(values - returns).square())
    if clip_coef is not None:
        moved = r(values - old_values).clip(-clip_coef, clip_coef)
        errors = torch.maximum(errors, r(r(r(old_values + moved) - returns).square()))
    return r(errors, len(values)).sum() / len(values)


def ppo_terms(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    values: Tensor,
    returns: Tensor,
    entropies: Tensor,
    old_values: Tensor,
    r: Rounding,
    *,
    clip_coef: float,
    vf_coef: float,
    ent_coef: float,
    value_clip_coef: float | None,
) -> Numbers:
    """The loss of PPO and its statistics to log, of columns (B,).

    r - 1 - log r of nearly equal policies is the square of a difference that is all rounding, and e^x - 1 is good to
    some 8 units if it is computed from tanh (`minirl.fast.passes.digits_near_0`).
    """
    count = len(values)
    policy_term = surrogate_loss(log_prob, old_log_prob, advantages, clip_coef, r)
    value_term = value_loss(values, returns, old_values, value_clip_coef, r)
    entropy_term = r(entropies, count).sum() / count
    log_ratio = r(log_prob - old_log_prob)
    ratio = r(log_ratio.exp(), 4)
    kl = r(r(log_ratio.expm1(), 64) - log_ratio, count).sum() / count
    return {
        "loss": policy_term + vf_coef * value_term - ent_coef * entropy_term,
        "policy_loss": policy_term.detach(),
        "value_loss": value_term.detach(),
        "entropy": entropy_term.detach(),
        "approx_kl": kl.detach(),
        "clipfrac": ((ratio < 1 - clip_coef) | (ratio > 1 + clip_coef)).double().mean(),
    }


def dqn_target(
    rewards: Tensor, terminated: Tensor, next_q: Tensor, next_q_target: Tensor, gamma: float, r: Rounding
) -> Tensor:
    """r + gamma Q_target(s', the first of the best by Q), (B,)."""
    best = [row.index(max(row)) for row in next_q.tolist()]
    judged = next_q_target[torch.arange(len(best)), best].masked_fill(terminated.bool(), 0.0)
    return r(rewards + r(gamma * judged))


def td_loss(q: Tensor, actions: Tensor, targets: Tensor, huber: bool, r: Rounding) -> Tensor:
    """The mean of the squared, or smooth-L1, difference of Q(s, a) (B, A) at the actions and targets (B,)."""
    distance = r(q[torch.arange(len(q)), actions.long()] - targets).abs()
    errors = torch.where(distance < 1, distance.square() / 2, distance - 0.5) if huber else distance.square()
    return r(r(errors), len(q)).sum() / len(q)


# Adam (Kingma and Ba 2015)

BETA_1, BETA_2 = 0.9, 0.999


def adam_moments(
    loss: Tensor, trained: Weights, moments: dict[str, tuple[Tensor, Tensor]], max_norm: float, r: Rounding
) -> Numbers:
    """The gradient's norm, and both moments of each weight (`m name`, `v name`) after a step."""
    gradients = torch.autograd.grad(loss, list(trained.values()))
    named = dict(zip(trained, (r.product(gradient) for gradient in gradients), strict=True))
    norm = torch.stack([gradient.square().sum() for gradient in named.values()]).sum().sqrt()
    scale = min(1.0, max_norm / (float(norm) + 1e-6))
    numbers = {"grad_norm": norm}
    for name, gradient in named.items():
        m, v = moments.get(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
        clipped = r(scale * gradient)
        numbers[f"m {name}"] = r(BETA_1 * m) + r((1 - BETA_1) * clipped)
        numbers[f"v {name}"] = r(BETA_2 * v) + r((1 - BETA_2) * clipped.square())
    return numbers


def adam_weights(
    weight: Tensor, m: Tensor, v: Tensor, step: int, learning_rate: float, eps: float
) -> tuple[Tensor, Tensor]:
    """A weight after a step, from the moments after it; also how far float32 may be off, element by element.

    In a compiled step beta and beta^t are float32: half a unit in beta is t / 2 in beta^t, whose power adds 2, and of
    what 1 - beta^t leaves that is a larger share. The rest is some ten operations, and the weight is rounded once.
    """
    left_1, left_2 = 1 - BETA_1**step, 1 - BETA_2**step
    change = learning_rate / left_1 * m / ((v / left_2).sqrt() + eps)
    units = 16 + (2 + step / 2) * (BETA_1**step / left_1 + BETA_2**step / left_2)
    return weight - change, SINGLE * (units * change.abs() + weight.abs() + change.abs())


# A table


def q_learning(
    table: Tensor, steps: list[tuple[int, int, float, int, bool]], alphas: list[float], gamma: float
) -> list[float]:
    """Learn from steps (s, a, r, s', terminated), each with its alpha, in place; return all TD errors."""
    errors = []
    for (state, action, reward, next_state, terminated), alpha in zip(steps, alphas, strict=True):
        future = 0.0 if terminated else gamma * float(table[next_state].max())
        errors.append(reward + future - float(table[state, action]))
        table[state, action] += alpha * errors[-1]
    return errors
