"""RLHF: a language model learns what people like (Ziegler et al. 2019, https://arxiv.org/abs/1909.08593; Stiennon et al.
2020, https://arxiv.org/abs/2009.01325; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155).

    a language model p(next token | tokens so far) of some texts                         pretrain
        loss = -mean(log p)
    a reward model r(text) of which of two texts people prefer                           train_reward_model
        loss = -mean(log sigmoid(r_chosen - r_rejected))                                 preference_loss
    PPO, as in `minirl.ppo`: a token is an action, a text an episode                     train_policy
        repeat:
            write texts with the policy pi_old                                           write
            reward of each token = -kl_coef (log pi_old - log p_reference),
            and r(text) more for the last                                                token_rewards
            advantages                                                                   ppo.compute_gae
            a few epochs of gradient steps                                               ppo.ppo_loss

Read from top to bottom: settings, network, the maths as pure functions, the stages, training.
"""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minirl.checks import ConfigError, require_same_shape
from minirl.envs.vector import Episode
from minirl.fast.machine import Head, select_device, tuned
from minirl.networks import Categorical
from minirl.ppo import STATS, compute_gae, explained_variance, normalized, ppo_loss
from minirl.runs.checkpoints import (
    Part,
    State,
    load_checkpoint,
    load_parts,
    reading,
    require_finite_losses,
    set_random_state,
)
from minirl.runs.run import Run, derived_seed, seed_everything
from minirl.runs.settings import MAX_SEED, check_settings, setting
from minirl.texts import END, Texts, Vocabulary, as_rows, hidden_score, is_grammatical, read_corpus, read_pairs, reviews
from minirl.texts import words_of_the_grammar

STAGES = ("lm", "reward", "ppo")
CORPUS, HELD_OUT = 20_000, 1_000  # reviews by the grammar; pairs that the reward model does not learn from
TEXTS, ORDER = 5, 6  # set the seeds of the reviews and of the order of pairs apart from all others
CHECKPOINT_KEYS = ("model", "reference", "reward", "kl_coef", "pairs", "vocabulary", *(f"{s}_optimizer" for s in STAGES))
AT_ONCE = 512  # texts written or judged at once
WARMUP = 0.05  # share of a stage in which the learning rate rises
LOG_EVERY = 16  # gradient steps of the reward model between two looks at the pairs held out

Columns = dict[str, Tensor]  # a quantity's name -> its values, text by text
Step = tuple[dict[str, float], list[Episode]]  # what is to be logged of it


@dataclass(frozen=True)
class RLHFConfig:
    """The settings of a run; the defaults are for the reviews of `minirl.texts`."""

    stage: str = setting("ppo", "up to which stage: lm, reward or ppo", group="task")
    seed: int = setting(42, "seed of every random number", at_least=0, at_most=MAX_SEED)
    num_episodes: int = setting(10_240, "texts that PPO writes", at_least=1)
    text: str | None = setting(None, "file of texts to learn from, one a line; none: reviews by a grammar")
    tokens: str = setting("characters", "of that file: characters or bytes")
    preferences: str | None = setting(None, "file of pairs, in JSON; none: a hidden rule chooses, with errors")
    context: int = setting(32, "tokens of a text at most, L", at_least=4, group="language model")
    width: int = setting(64, "numbers that stand for a token", at_least=1)
    num_layers: int = setting(2, "blocks of attention and MLP", at_least=1)
    num_heads: int = setting(4, "heads of attention; must divide the width", at_least=1)
    lm_steps: int = setting(1_500, "gradient steps", at_least=1)
    lm_batch_size: int = setting(64, "texts of each", at_least=1)
    lm_learning_rate: float = setting(3e-3, "Adam's step size, which rises and then falls to 0", above=0)
    num_pairs: int = setting(4_096, "pairs to learn from, where the hidden rule chooses", at_least=1, group="reward model")
    rater_sharpness: float = setting(6.0, "how seldom it errs: the log-odds of 0 against 1", at_least=0)
    reward_epochs: int = setting(1, "passes over the pairs", at_least=1)
    reward_batch_size: int = setting(64, "pairs of a gradient step", at_least=1)
    reward_learning_rate: float = setting(1e-3, "Adam's step size, as above", above=0)
    kl_coef: float = setting(0.05, "price of a nat of log pi - log p_reference", at_least=0, group="texts and rewards")
    kl_target: float | None = setting(None, "adapt kl_coef so that a text has this KL, in nats; none: fixed", above=0)
    batch_size: int = setting(128, "texts between two updates (N)", at_least=1)
    whiten_rewards: bool = setting(False, "divide the rewards of the tokens by their standard deviation")
    gamma: float = setting(1.0, "discount factor", at_least=0, at_most=1)
    gae_lambda: float = setting(0.95, "lambda of the advantage estimate", at_least=0, at_most=1)
    minibatch_size: int = setting(32, "texts of a gradient step; must divide N", at_least=1, group="gradient steps")
    update_epochs: int = setting(4, "passes over the N texts per update", at_least=1)
    learning_rate: float = setting(1e-3, "Adam's step size", above=0)
    anneal_lr: bool = setting(True, "lower the learning rate linearly to 0 at the end")
    max_grad_norm: float = setting(1.0, "clip the norm of the gradient to this, in all stages", above=0)
    norm_adv: bool = setting(True, "normalise the advantages of each minibatch")
    clip_coef: float = setting(0.2, "epsilon of the clipped objective", above=0, group="loss")
    vf_coef: float = setting(0.1, "weight of the value loss, which has no factor 1/2", at_least=0)
    value_clip_coef: float | None = setting(0.2, "clip the change of the values to this; none: no clipping", above=0)
    ent_coef: float = setting(0.0, "weight of the entropy bonus", at_least=0)
    checkpoint_frequency: int = setting(8_192, "texts between checkpoints", at_least=1, group="machine and files")

    def __post_init__(self) -> None:
        check_settings(self)
        for name, choices in (("stage", STAGES), ("tokens", ("characters", "bytes"))):
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(f"--{name} must be {', '.join(choices[:-1])} or {choices[-1]}, not {value!r}")
        if self.width % self.num_heads != 0:
            raise ConfigError(f"--num-heads must divide width = {self.width}, and {self.num_heads} does not")
        if self.batch_size % self.minibatch_size != 0:
            raise ConfigError(f"--minibatch-size must divide batch_size = {self.batch_size}, not {self.minibatch_size}")
        if self.text is not None and self.preferences is None and self.stage != "lm":
            raise ConfigError("--preferences must be given with --text, which has no hidden rule; or --stage lm")

    @property
    def num_updates(self) -> int:
        """Updates of PPO: the last one may go past `num_episodes`."""
        return math.ceil(self.num_episodes / self.batch_size)

    def ends(self, num_pairs: int) -> dict[str, int]:
        """After how many texts of the whole run each stage ends: those learned from, two a pair, and those written."""
        batches = self.reward_epochs * math.ceil(num_pairs / self.reward_batch_size)
        lm = self.lm_steps * self.lm_batch_size
        reward = lm + 2 * batches * self.reward_batch_size
        return {"lm": lm, "reward": reward, "ppo": reward + self.num_updates * self.batch_size}


Cache = list[tuple[Tensor, Tensor]]  # of each block, the keys and values of the tokens so far


class Block(nn.Module):
    """Attention to the tokens so far, then an MLP; each adds to what comes in, and looks at it normalised (pre-norm)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, L, width), and keys and values of tokens before -> (B, L, width), and those of all tokens."""
        heads = self.queries_keys_values(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)  # (B, heads, L, width / heads) each
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        seen = F.scaled_dot_product_attention(queries, keys, values, is_causal=past is None)
        x = x + self.mixed(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x)), (keys, values)


class LanguageModel(nn.Module):
    """A decoder-only transformer: features of each token, which know it and the tokens before it, and no later one.

    From the features come the distribution of the next token, by the embedding once more (tied), and a score, by a
    linear layer that starts at 0: of the whole text at its last token (the reward model), or of what is still to come
    at each (PPO's values). There is no dropout: a text must be as likely in learning as it was when it was written.
    """

    def __init__(self, num_tokens: int, config: RLHFConfig) -> None:
        super().__init__()
        self.token, self.position = (nn.Embedding(n, config.width) for n in (num_tokens, config.context))
        self.blocks = nn.ModuleList(Block(config.width, config.num_heads) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        self.scores = Head(config.width, 1)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.zeros_(weight) if name == "scores.weight" else nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Tokens (B, L) -> features (B, L, width).

        With a `cache`, empty at first, it remembers keys and values there, and `tokens` go on from those before: several
        at first, and then one at a time.
        """
        start = cache[0][0].shape[2] if cache else 0
        x = self.token(tokens) + self.position(torch.arange(start, start + tokens.shape[1], device=tokens.device))
        past: list[Any] = list(cache) if cache else [None] * len(self.blocks)
        for number, block in enumerate(self.blocks):
            x, past[number] = block(x, past[number])
        if cache is not None:
            cache[:] = past
        features: Tensor = self.norm(x)
        return features

    def next_token(self, features: Tensor) -> Categorical:
        """Features (..., width) -> the distribution of the token that follows each."""
        return Categorical(F.linear(features, self.token.weight))

    def score(self, features: Tensor) -> Tensor:
        """Features (..., width) -> scores (...)."""
        scores: Tensor = self.scores(features).squeeze(-1)
        return scores


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the values where the mask is True, whatever the others are; both (N, T).

    Raises:
        ValueError: if the shapes differ.
    """
    require_same_shape(values=values, mask=mask)
    return values.where(mask, 0.0).sum() / mask.sum()


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The reward model's loss, L = -mean(log sigmoid(r_chosen - r_rejected)): that of Bradley and Terry's model (1952),
    in which the log-odds of a choice are the difference of the scores (Stiennon et al. 2020, section 3.4).

    Args:
        chosen: (B,) scores of the texts that were preferred.
        rejected: (B,) of the others.

    Raises:
        ValueError: if the shapes differ.
    """
    require_same_shape(chosen=chosen, rejected=rejected)
    return -F.logsigmoid(chosen - rejected).mean()


def token_rewards(scores: Tensor, log_ratio: Tensor, written: Tensor, kl_coef: float) -> Tensor:
    """Return the reward of each token, -kl_coef (log pi - log p_reference), and the text's score more for the last one.

    Summed over a text it is r(text) - kl_coef log(pi(text) / p_reference(text)), whose mean is the objective (Ziegler
    et al. 2019, eq. 2).

    Args:
        scores: (N,) r(text).
        log_ratio: (N, T) log pi - log p_reference of each token.
        written: (N, T) whether it was chosen; rewards of others, prompt and padding, are 0.
        kl_coef: the price of a nat.

    Raises:
        ValueError: if the shapes do not fit.
    """
    require_same_shape(log_ratio=log_ratio, written=written)
    require_same_shape(scores=scores, written_of_a_token=written[:, 0])
    return (-kl_coef * log_ratio).where(written, 0.0) + scores[:, None].where(last_of(written), 0.0)


def last_of(written: Tensor) -> Tensor:
    """Which token of each text is the last that was chosen: (N, T) -> (N, T)."""
    return written & ~F.pad(written[:, 1:], (0, 1))


def whitened(rewards: Tensor, written: Tensor) -> Tensor:
    """Return rewards (N, T) divided by the standard deviation of those of chosen tokens; their mean stays, as in Ziegler
    et al.'s code: who shifts the rewards of tokens pays for long texts, or for short ones."""
    chosen = rewards[written]
    scaled = (rewards - chosen.mean()) / (chosen.std() + 1e-8) + chosen.mean()
    return scaled.where(written, 0.0)


def adapted_kl_coef(kl_coef: float, kl: float, kl_target: float) -> float:
    """Return the coefficient moved in proportion to how far the KL is off, at most by 2 % (Ziegler et al. 2019, eq. 3)."""
    return kl_coef * (1 + 0.1 * min(max(kl / kl_target - 1, -0.2), 0.2))


@torch.no_grad()
def write(model: LanguageModel, prompts: Texts) -> tuple[Texts, Tensor, Tensor]:
    """Write on from each prompt until `END`, or until the row is full.

    All rows begin at token 0: those with a longer prompt are told their tokens for longer. Thus nothing lies to the left
    of a text, and what lies to its right comes later, where nobody looks.

    Returns:
        The texts; log pi of each token and the values before each, (N, L - 1), where tokens were written.
    """
    num_texts, context = prompts.tokens.shape
    column = torch.arange(context, device=prompts.tokens.device)
    given = column < prompts.prompt[:, None]
    tokens = prompts.tokens.where(given, END)
    log_probs, values = (torch.zeros(num_texts, context - 1, device=tokens.device) for _ in range(2))
    ended = torch.zeros(num_texts, dtype=torch.bool, device=tokens.device)
    cache: Cache = []
    first = int(prompts.prompt.min())
    features = model(tokens[:, :first], cache)[:, -1]
    for t in range(first, context):
        distribution = model.next_token(features)
        drawn = distribution.sample()
        tokens[:, t] = tokens[:, t].where(given[:, t] | ended, drawn)
        log_probs[:, t - 1], values[:, t - 1] = distribution.log_prob(tokens[:, t]), model.score(features)
        ended |= ~given[:, t] & (drawn == END)
        if ended.all():
            break
        features = model(tokens[:, t : t + 1], cache)[:, -1]
    behind = (tokens == END) & ~given
    length = torch.where(behind.any(dim=1), behind.int().argmax(dim=1) + 1, context)
    return Texts(tokens, prompts.prompt, length), log_probs, values


def said_of(model: LanguageModel, tokens: Tensor) -> tuple[Categorical, Tensor, Tensor]:
    """Tokens (N, L) -> the distribution of each but the first, log pi of it and the value before it, (N, L - 1)."""
    features = model(tokens[:, :-1])
    distribution = model.next_token(features)
    return distribution, distribution.log_prob(tokens[:, 1:]), model.score(features)


def judged(reward: LanguageModel, texts: Texts) -> Tensor:
    """Return the reward model's scores of texts, (N,): its word at their last token."""
    last = texts.length[:, None] - 1
    return reward.score(reward(texts.tokens).take_along_dim(last[..., None], dim=1)).squeeze(-1)


class Pairs(NamedTuple):
    """Pairs of texts, the first `held_out` of them to judge the reward model by."""

    chosen: Texts
    rejected: Texts
    held_out: int
    best_accuracy: float  # of the hidden rule itself on those held out: what the noise allows; NaN where there is none

    def rows(self, some: Tensor | slice) -> "Pairs":
        """Return some of them."""
        return self._replace(chosen=self.chosen.rows(some), rejected=self.rejected.rows(some))

    def learned(self) -> "Pairs":
        """Return those to learn from."""
        return self.rows(slice(self.held_out, None))


def make_pairs(model: LanguageModel, prompts: Texts, vocabulary: Vocabulary, config: RLHFConfig) -> Pairs:
    """Have the model write twice from the same prompts; the hidden rule prefers one, with errors (Bradley and Terry)."""
    number = HELD_OUT + config.num_pairs
    chosen = prompts.rows(torch.randint(len(prompts.tokens), (number,), device=prompts.tokens.device))
    first, second = (write_many(model, chosen) for _ in range(2))
    scores = [torch.tensor([hidden_score(text) for text in vocabulary.texts_of(texts)]) for texts in (first, second)]
    better = scores[0] - scores[1]
    first_is_chosen = torch.rand(number) < torch.sigmoid(config.rater_sharpness * better)
    agrees = torch.where(better == 0, 0.5, (first_is_chosen == (better > 0)).float())
    swap = (~first_is_chosen).to(prompts.tokens.device)

    def either(one: Texts, other: Texts) -> Texts:
        return Texts(*(torch.where(swap.view(-1, *[1] * (a.ndim - 1)), b, a) for a, b in zip(one, other, strict=True)))

    return Pairs(either(first, second), either(second, first), HELD_OUT, agrees[:HELD_OUT].mean().item())


def load_texts(config: RLHFConfig, device: torch.device) -> tuple[Vocabulary, Texts, Pairs | None]:
    """Return the vocabulary, the texts to learn from, and somebody's own pairs.

    Raises:
        ConfigError: if a file will not do.
    """
    if config.text is None:
        vocabulary, corpus = words_of_the_grammar(), reviews(CORPUS, config.context, derived_seed(config.seed, TEXTS))
    else:
        vocabulary, corpus = read_corpus(Path(config.text), config.tokens, config.context)
    if config.preferences is None:
        return vocabulary, corpus.to(device), None
    chosen, rejected = read_pairs(Path(config.preferences), vocabulary, config.context)
    order = torch.randperm(len(chosen.tokens), generator=torch.Generator().manual_seed(config.seed))
    held_out = min(HELD_OUT, max(1, len(order) // 10))
    pairs = Pairs(chosen.rows(order).to(device), rejected.rows(order).to(device), held_out, math.nan)
    return vocabulary, corpus.to(device), pairs


def restored_pairs(saved: State, device: torch.device) -> Pairs | None:
    """Return the pairs of a checkpoint.

    Raises:
        ConfigError: if it does not hold any such.
    """
    with reading(saved):
        if saved["pairs"] is None:
            return None
        chosen, rejected, held_out, best_accuracy = saved["pairs"]
        return Pairs(Texts(*chosen).to(device), Texts(*rejected).to(device), held_out, best_accuracy)


def write_many(model: LanguageModel, prompts: Texts) -> Texts:
    """Write on from any number of prompts, some at once."""
    parts = [write(model, prompts.rows(slice(i, i + AT_ONCE)))[0] for i in range(0, len(prompts.tokens), AT_ONCE)]
    return Texts(*map(torch.cat, zip(*parts, strict=True)))


@torch.no_grad()
def judged_many(reward: LanguageModel, texts: Texts) -> Tensor:
    """Return the scores of any number of texts, (N,)."""
    starts = range(0, len(texts.tokens), AT_ONCE)
    return torch.cat([judged(reward, texts.rows(slice(start, start + AT_ONCE))) for start in starts])


def accuracy(reward: LanguageModel, pairs: Pairs) -> float:
    """Return the share of the pairs held out in which the chosen text has the higher score."""
    held_out = pairs.rows(slice(0, pairs.held_out))
    return (judged_many(reward, held_out.chosen) > judged_many(reward, held_out.rejected)).double().mean().item()


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, config: RLHFConfig) -> Tensor:
    """Take a step down the gradient; return the gradient's norm before clipping."""
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm, foreach=False)
    optimizer.step()
    return grad_norm


def set_rate(optimizer: torch.optim.Optimizer, rate: float, done: float, warmup: float = 0.0) -> float:
    """Let the learning rate rise linearly over the first share of a stage, and fall linearly to 0 at its end."""
    rate *= min(1.0, (1 - done) / (1 - warmup), done / warmup if warmup else 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def pretrain(
    model: LanguageModel, optimizer: torch.optim.Optimizer, corpus: Texts, config: RLHFConfig, first: int = 0
) -> Iterator[Step]:
    """Stage 1: learn to say texts of a corpus, from gradient step `first` on; yield what is to be logged of each."""
    whole = corpus._replace(prompt=torch.ones_like(corpus.prompt))  # openings are learned, too
    for step in range(first, config.lm_steps):
        rate = set_rate(optimizer, config.lm_learning_rate, (step + 1) / (config.lm_steps + 1), WARMUP)
        batch = whole.rows(torch.randint(len(corpus.tokens), (config.lm_batch_size,), device=corpus.tokens.device)).trimmed()
        _, log_prob, _ = said_of(model, batch.tokens)
        loss = -masked_mean(log_prob, batch.written)
        grad_norm = learn(model, optimizer, loss, config)
        losses = {"losses/lm_loss": loss.item(), "losses/grad_norm": grad_norm.item()}
        require_finite_losses(losses, f"step {step + 1:,} of the language model")
        yield {**losses, "charts/learning_rate": rate}, []


def train_reward_model(
    reward: LanguageModel, optimizer: torch.optim.Optimizer, pairs: Pairs, config: RLHFConfig, first: int = 0
) -> Iterator[Step]:
    """Stage 2: learn which text of a pair was chosen; in the end scale the scores of the texts to mean 0 and deviation 1."""
    learned = pairs.learned()
    number = len(learned.chosen.tokens)
    steps_each = math.ceil(number / config.reward_batch_size)
    last = config.reward_epochs * steps_each
    for step in range(first, last):
        rate = set_rate(optimizer, config.reward_learning_rate, (step + 1) / (last + 1), WARMUP)
        order = torch.Generator().manual_seed(derived_seed(config.seed, ORDER, step // steps_each))
        batches = torch.randperm(number, generator=order).split(config.reward_batch_size)
        batch = learned.rows(batches[step % steps_each].to(learned.chosen.tokens.device))
        loss = preference_loss(judged(reward, batch.chosen.trimmed()), judged(reward, batch.rejected.trimmed()))
        grad_norm = learn(reward, optimizer, loss, config)
        losses = {"losses/preference_loss": loss.item(), "losses/grad_norm": grad_norm.item()}
        require_finite_losses(losses, f"step {step + 1:,} of the reward model")
        if (step + 1) % LOG_EVERY == 0 or step + 1 == last:
            losses["reward/accuracy"] = accuracy(reward, pairs)
            if not math.isnan(pairs.best_accuracy):
                losses["reward/best_accuracy"] = pairs.best_accuracy
        if step + 1 == last:
            standardize(reward, torch.cat([judged_many(reward, texts) for texts in (learned.chosen, learned.rejected)]))
        yield {**losses, "charts/learning_rate": rate}, []


@torch.no_grad()
def standardize(reward: LanguageModel, scores: Tensor) -> None:
    """Change the reward model's last layer so that these of its scores (N,) would have mean 0 and deviation 1."""
    deviation = scores.std() + 1e-8
    reward.scores.weight.div_(deviation)
    reward.scores.bias.sub_(scores.mean()).div_(deviation)


def gradient_step(
    policy: LanguageModel, optimizer: torch.optim.Optimizer, config: RLHFConfig, samples: Columns, chosen: Tensor
) -> Tensor:
    """Learn from a minibatch of texts: `chosen` (B,) of all. Return `STATS` and the gradient's norm before clipping."""
    batch = {name: column[chosen] for name, column in samples.items()}
    distribution, log_prob, values = said_of(policy, batch["tokens"])
    written = batch["written"]
    old_log_prob, old_values, advantages, returns = (
        batch[name][written] for name in ("log_probs", "values", "advantages", "returns")
    )
    loss, stats = ppo_loss(
        log_prob[written],
        old_log_prob,
        normalized(advantages) if config.norm_adv else advantages,
        values[written],
        returns,
        distribution.entropy()[written],
        clip_coef=config.clip_coef,
        vf_coef=config.vf_coef,
        ent_coef=config.ent_coef,
        old_values=old_values,
        value_clip_coef=config.value_clip_coef,
    )
    grad_norm = learn(policy, optimizer, loss, config)
    return torch.stack([*(stats[name] for name in STATS), grad_norm])


class KLCoef:
    """The price of a nat, which a checkpoint holds: it may move (`--kl-target`)."""

    def __init__(self, value: float) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        """Return it."""
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put it back."""
        self.value = float(state_dict["value"])


def train_policy(
    policy: LanguageModel,
    reference: LanguageModel,
    reward: LanguageModel,
    optimizer: torch.optim.Optimizer,
    prompts: Texts,
    vocabulary: Vocabulary,
    kl_coef: KLCoef,
    config: RLHFConfig,
    first: int = 0,
) -> Iterator[Step]:
    """Stage 3: PPO on what the reward model likes, from update `first` on; yield the texts' episodes, too."""
    device = prompts.tokens.device
    for update in range(first, config.num_updates):
        rate = set_rate(optimizer, config.learning_rate, update / config.num_updates * config.anneal_lr)
        chosen = torch.randint(len(prompts.tokens), (config.batch_size,), device=device)
        texts, log_probs, values = write(policy, prompts.rows(chosen))
        written = texts.written
        with torch.no_grad():
            scores = judged(reward, texts)
            log_ratio = (log_probs - said_of(reference, texts.tokens)[1]).where(written, 0.0)
        rewards = token_rewards(scores, log_ratio, written, kl_coef.value)
        used = whitened(rewards, written) if config.whiten_rewards else rewards
        advantages, returns = text_gae(used, values, written, config.gamma, config.gae_lambda)
        samples = {"tokens": texts.tokens, "written": written, "log_probs": log_probs, "values": values}
        samples |= {"advantages": advantages, "returns": returns}
        history = [
            gradient_step(policy, optimizer, config, samples, chosen)
            for _ in range(config.update_epochs)
            for chosen in torch.randperm(config.batch_size, device=device).split(config.minibatch_size)
        ]
        means = torch.stack(history).mean(dim=0).tolist()
        losses = {f"losses/{name}": mean for name, mean in zip((*STATS, "grad_norm"), means, strict=True)}
        require_finite_losses(losses, f"update {update + 1:,}")
        losses["losses/explained_variance"] = explained_variance(values[written], returns[written])
        about = {**describe(texts, scores, log_ratio, vocabulary), "charts/kl_coef": kl_coef.value}
        if config.kl_target is not None:
            kl_coef.value = adapted_kl_coef(kl_coef.value, about["texts/kl"], config.kl_target)
        sums, lengths = rewards.sum(dim=1).tolist(), written.sum(dim=1).tolist()
        yield {**losses, **about, "charts/learning_rate": rate}, list(map(Episode, range(len(sums)), sums, lengths))


def text_gae(
    rewards: Tensor, values: Tensor, written: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (N, T) of texts of different lengths: each is an episode that ends for good at its last
    token, so that nothing behind it counts; those of tokens that were not chosen mean nothing."""
    rows = (rewards, values, F.pad(values[:, 1:], (0, 1)), last_of(written), torch.zeros_like(written))
    advantages, returns = compute_gae(*(column.T for column in rows), gamma, gae_lambda)
    return advantages.T, returns.T


def describe(texts: Texts, scores: Tensor, log_ratio: Tensor, vocabulary: Vocabulary) -> dict[str, float]:
    """Return means over texts: the reward model's score (N,), log pi - log p_reference (N, T) summed over a text, and,
    of the grammar's words, the hidden rule's score and the share of texts that the grammar accepts."""
    about = {"texts/reward_score": scores.mean().item(), "texts/kl": log_ratio.sum(dim=1).mean().item()}
    if vocabulary.kind == "words":
        in_words = vocabulary.texts_of(texts)
        about["texts/hidden_score"] = statistics.fmean(map(hidden_score, in_words))
        about["texts/grammatical"] = statistics.fmean(map(is_grammatical, in_words))
    return about


def train(
    config: RLHFConfig, *, run_dir: str | Path | None = None, resume: bool = False, device: str = "auto"
) -> LanguageModel:
    """Train through the stages and return the policy; after `--stage lm` or `reward`, the language model.

    Args:
        config: the settings.
        run_dir: where checkpoints and TensorBoard events go; None writes nothing.
        resume: go on from the checkpoint in `run_dir`, as if the run had not stopped.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: if a file, the device or the run directory will not do.
        KeyboardInterrupt: after saving, at Ctrl-C; its subclass `Stopped` at SIGTERM, SIGHUP or when nobody listens.
    """
    torch_device = select_device(device)
    run_dir = None if run_dir is None else Path(run_dir).absolute()
    vocabulary, corpus, pairs = load_texts(config, torch_device)
    ends = config.ends(config.num_pairs if pairs is None else len(pairs.learned().chosen.tokens))
    prompts = corpus if pairs is None else pairs.learned().chosen
    saved = load_checkpoint(run_dir, "rlhf", *CHECKPOINT_KEYS) if resume else None
    done: int = saved["global_step"] if saved else 0
    if done > ends[config.stage]:
        raise ConfigError(f"--stage and --num-episodes must go as far as the {done} texts already done")
    seed_everything(config.seed)
    model, reference, reward = (LanguageModel(len(vocabulary), config).to(torch_device) for _ in range(3))
    optimizers = [torch.optim.Adam(network.parameters(), eps=1e-5, fused=True) for network in (model, reward, model)]
    kl_coef = KLCoef(config.kl_coef)
    learned: dict[str, Part] = {"model": model, "reference": reference, "reward": reward, "kl_coef": kl_coef}
    learned |= {f"{stage}_optimizer": optimizer for stage, optimizer in zip(STAGES, optimizers, strict=True)}
    load_parts(learned, saved)
    if saved is not None:
        pairs = restored_pairs(saved, torch_device)
        set_random_state(saved)

    def state() -> State:
        kept = None if pairs is None else [*map(list, pairs[:2]), *pairs[2:]]
        parts = {name: part.state_dict() for name, part in learned.items()}
        return {**parts, "pairs": kept, "vocabulary": vocabulary.tokens}

    total = ends[config.stage]
    with Run("rlhf", config, run_dir, total=total, done=done, unit="texts", resumed=saved) as run, tuned(model):
        run.checkpoint(done, state)
        begin = 0
        for stage, optimizer in zip(STAGES, optimizers, strict=True):
            if done == begin and stage == "reward":
                reward.load_state_dict(model.state_dict())
                pairs = make_pairs(model, prompts, vocabulary, config) if pairs is None else pairs
            if done == begin and stage == "ppo":
                reference.load_state_dict(model.state_dict())
            if stage == "lm":
                texts_each = config.lm_batch_size
                steps = pretrain(model, optimizer, corpus, config, done // texts_each)
            elif stage == "reward":
                texts_each = 2 * config.reward_batch_size
                steps = train_reward_model(reward, optimizer, pairs, config, (done - begin) // texts_each)
            else:
                texts_each = config.batch_size
                first = (done - begin) // texts_each
                steps = train_policy(
                    model, reference, reward, optimizer, prompts, vocabulary, kl_coef, config, first
                )
            for scalars, episodes in steps if done < ends[stage] else ():
                done += texts_each
                run.log_episodes(done, episodes)
                run.log(done, scalars)
                run.checkpoint(done, state, finished=done == total)
            if stage == config.stage:
                break
            begin = ends[stage]
    return model
