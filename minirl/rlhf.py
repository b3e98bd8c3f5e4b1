"""RLHF: a language model learns what people like, in three stages (Ziegler et al. 2019, https://arxiv.org/abs/1909.08593;
Stiennon et al. 2020, https://arxiv.org/abs/2009.01325; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155).

    a language model p(next token | tokens so far), loss = -mean(log p)                  pretrain
    a reward model r(text): which of two texts do people prefer?                         train_reward_model
        loss = -mean(log sigmoid(r_chosen - r_rejected))                                 preference_loss
    PPO, as in `minirl.ppo`: a token is an action, a text an episode                     train_policy
        repeat: write texts with the policy pi_old                                       generate
            reward of a token = -kl_coef (log pi_old - log p_reference),
                                plus r(text) at the last token                           token_rewards
            advantages                                                                   compute_gae of minirl.ppo
            a few epochs of gradient steps                                               ppo_loss of minirl.ppo

Read from top to bottom: settings, network, the maths as pure functions, the stages, training.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minirl.checks import ConfigError, require_same_shape
from minirl.distributed import require_one_process
from minirl.envs.vector import Episode
from minirl.fast.machine import Float32Linear, select_device
from minirl.networks import Categorical
from minirl.ppo import compute_gae, normalized, ppo_loss
from minirl.rollout import Columns
from minirl.runs.checkpoints import (
    Part,
    State,
    checksum,
    load_parts,
    reading,
    require_finite_losses,
    save_parts,
    set_random_state,
)
from minirl.runs.losses import explained_variance, mean_losses
from minirl.runs.resume import saved_run
from minirl.runs.run import Run, seed_everything
from minirl.runs.settings import MAX_THREADS, check_settings, require_default, setting
from minirl.streams import MAX_SEED, Stream, derived_seed
from minirl.texts import END, Pairs, Texts, Vocabulary, load_texts, rated_pairs, text_metrics
from minirl.transformer import Cache, Transformer

STAGES = ("lm", "reward", "ppo")
HELD_OUT, CHUNK = 2_000, 512  # pairs that the reward model is evaluated on; texts generated or scored at once
WARMUP, EVALUATE_EVERY = 0.05, 64  # share of a stage with a rising rate; gradient steps between evaluations

Step = tuple[int, dict[str, float], list[Episode]]  # of one step: how many texts, and what to log


@dataclass(frozen=True)
class RLHFConfig:
    """The settings of a run; the defaults are for the reviews of `minirl.texts`."""

    stage: str = setting("ppo", "the last stage to train: lm, reward or ppo", choices=STAGES, group="task")
    seed: int = setting(42, "seed of every random number", at_least=0, at_most=MAX_SEED)
    num_episodes: int = setting(7_680, "texts that PPO writes", at_least=1)
    text: str | None = setting(None, "file of texts to learn from, one per line; none: reviews by a grammar")
    tokens: str = setting("characters", "tokens of --text: characters or bytes", choices=("characters", "bytes"))
    preferences: str | None = setting(None, "file of pairs in JSON; none: a hidden rule chooses, and errs")
    context: int = setting(28, "maximum tokens of a text (L)", at_least=4, group="language model")
    width: int = setting(64, "size of the embedding", at_least=1)
    num_layers: int = setting(2, "blocks of attention and MLP", at_least=1)
    num_heads: int = setting(4, "attention heads; must divide the width", at_least=1)
    lm_steps: int = setting(2_000, "gradient steps of the language model", at_least=1)
    lm_batch_size: int = setting(32, "texts per gradient step", at_least=1)
    lm_learning_rate: float = setting(5e-3, "Adam's step size; it rises, then falls to 0", above=0)
    num_pairs: int = setting(8_192, "pairs to learn from, chosen by the hidden rule", at_least=1, group="reward model")
    rater_sharpness: float = setting(6.0, "log-odds that it prefers the best text to the worst", at_least=0)
    reward_epochs: int = setting(2, "passes over the pairs", at_least=1)
    reward_batch_size: int = setting(16, "pairs per gradient step", at_least=1)
    reward_learning_rate: float = setting(1e-3, "Adam's step size; it rises, then falls to 0", above=0)
    kl_coef: float = setting(0.1, "weight of log pi - log p_reference, in nats", at_least=0, group="texts and rewards")
    kl_target: float | None = setting(None, "KL per text, in nats, that kl_coef adapts to; none: fixed", above=0)
    batch_size: int = setting(128, "texts per update (N)", at_least=1)
    whiten_rewards: bool = setting(False, "divide the tokens' rewards by their standard deviation")
    gamma: float = setting(1.0, "discount factor", at_least=0, at_most=1)
    gae_lambda: float = setting(0.95, "lambda of the advantage estimate", at_least=0, at_most=1)
    minibatch_size: int = setting(32, "texts per gradient step; must divide N", at_least=1, group="gradient steps")
    update_epochs: int = setting(4, "passes over the N texts per update", at_least=1)
    learning_rate: float = setting(5e-4, "Adam's step size", above=0)
    anneal_lr: bool = setting(True, "lower the learning rate linearly to 0 at the end")
    max_grad_norm: float = setting(1.0, "clip the norm of the gradient to this, in all stages", above=0)
    norm_adv: bool = setting(True, "normalise the advantages of each minibatch")
    clip_coef: float = setting(0.2, "epsilon of the clipped objective", above=0, group="loss")
    vf_coef: float = setting(0.1, "weight of the value loss, which has no factor 1/2", at_least=0)
    value_clip_coef: float | None = setting(0.2, "clip the change of the values to this; none: no clipping", above=0)
    ent_coef: float = setting(0.0, "weight of the entropy bonus", at_least=0)
    checkpoint_frequency: int = setting(8_192, "texts between checkpoints", at_least=1, group="machine and files")
    num_threads: int | None = setting(None, "threads; none: 1 for small networks", at_least=1, at_most=MAX_THREADS)

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("text", "preferences"):  # absolute: a run may be resumed from another directory
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, str(Path(path).absolute()))
        if self.width % self.num_heads != 0:
            raise ConfigError(f"--num-heads must divide width = {self.width}, and {self.num_heads} does not")
        if self.batch_size % self.minibatch_size != 0:
            raise ConfigError(f"--minibatch-size must divide batch_size = {self.batch_size}, not {self.minibatch_size}")
        if self.norm_adv and self.minibatch_size == 1:
            raise ConfigError("--minibatch-size must be at least 2 to normalise advantages; or give --no-norm-adv")
        if self.text is None:
            require_default(self, "tokens", because="reviews by the grammar are made of characters")
        if self.preferences is not None:
            require_default(self, "num_pairs", "rater_sharpness", because="--preferences has the pairs")
        if self.text is not None and self.preferences is None and self.stage != "lm":
            raise ConfigError("--preferences must be given with --text, which has no hidden rule; or --stage lm")

    @property
    def num_updates(self) -> int:
        """Updates of PPO: the last one may go past `num_episodes`."""
        return math.ceil(self.num_episodes / self.batch_size)

    def plan(self, num_pairs: int) -> dict[str, int]:
        """Return the number of texts in each stage; a pair has two."""
        learned, rated = self.lm_steps * self.lm_batch_size, self.reward_epochs * 2 * num_pairs
        texts = (learned, rated, self.num_updates * self.batch_size)
        return dict(zip(STAGES[: STAGES.index(self.stage) + 1], texts, strict=False))


class LanguageModel(nn.Module):
    """A transformer with two heads: the distribution of the next token, and a score.

    The first shares the embedding's weights. The second is linear and starts at 0: in the reward model, its output at
    the last token is the score of the text; in the policy, its output at each token is the value V.
    """

    def __init__(self, num_tokens: int, config: RLHFConfig) -> None:
        super().__init__()
        self.body = Transformer(num_tokens, config.context, config.width, config.num_layers, config.num_heads)
        self.scores = Float32Linear(config.width, 1)
        nn.init.zeros_(self.scores.weight)
        nn.init.zeros_(self.scores.bias)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Categorical, Tensor]:
        """Tokens (B, L) -> the distribution of the token that follows each, and scores (B, L)."""
        features = self.body(tokens, cache)
        return Categorical(F.linear(features, self.body.token_embedding.weight)), self.scores(features).squeeze(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the values where the mask is True; both (N, T).

    Raises:
        ValueError: if the shapes differ.
    """
    require_same_shape(values=values, mask=mask)
    return values.where(mask, 0.0).sum() / mask.sum()


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The reward model's loss, L = -mean(log sigmoid(r_chosen - r_rejected)), of the scores of pairs, (B,) each.

    In Bradley and Terry's model (1952) the log-odds of a choice are the difference of two scores, and this is minus its
    log-likelihood (Stiennon et al. 2020, section 3.4).

    Raises:
        ValueError: if the shapes differ.
    """
    require_same_shape(chosen=chosen, rejected=rejected)
    return -F.logsigmoid(chosen - rejected).mean()


def token_rewards(scores: Tensor, log_ratio: Tensor, written: Tensor, kl_coef: float) -> Tensor:
    """Return the reward of each token, -kl_coef (log pi - log p_reference), plus the text's score at the last token.

    Summed over a text it is r(text) - kl_coef log(pi(text) / p_reference(text)), whose mean is the objective (Ziegler
    et al. 2019, eq. 2). `scores` is (N,), `log_ratio` (N, T), and `written` (N, T) is True where a token was generated;
    tokens of prompts and padding get 0.

    Raises:
        ValueError: if the shapes do not fit.
    """
    require_same_shape(log_ratio=log_ratio, written=written)
    require_same_shape(scores=scores, written_of_a_token=written[:, 0])
    return (-kl_coef * log_ratio).where(written, 0.0) + scores[:, None].where(last_token(written), 0.0)


def last_token(written: Tensor) -> Tensor:
    """Whether each token is the last generated one of its text: (N, T) -> (N, T)."""
    return written & ~F.pad(written[:, 1:], (0, 1))


def whitened(rewards: Tensor, written: Tensor) -> Tensor:
    """Scale rewards (N, T) to standard deviation 1 over generated tokens; the mean is kept, or length would pay."""
    mean, deviation = rewards[written].mean(), rewards[written].std()
    return ((rewards - mean) / (deviation + 1e-8) + mean).where(written, 0.0)


def adapted_kl_coef(kl_coef: float, kl: float, kl_target: float) -> float:
    """Return the coefficient after a proportional step of at most 2 % (Ziegler et al. 2019, section 2.2)."""
    return kl_coef * (1 + 0.1 * min(max(kl / kl_target - 1, -0.2), 0.2))


@torch.no_grad()
def generate(model: LanguageModel, prompts: Texts) -> tuple[Texts, Tensor, Tensor]:
    """Sample a continuation of each prompt until `END` or the end of the row.

    Prompts may differ in length: each row is fed its whole prompt before it samples. Only the end of a row is padded.

    Returns:
        The texts; log pi of each generated token, and the value before it, (N, L - 1).
    """
    num_texts, context = prompts.tokens.shape
    given = torch.arange(context, device=prompts.tokens.device) < prompts.prompt_length[:, None]
    tokens = prompts.tokens.where(given, END)
    log_probs, values = (torch.zeros(num_texts, context - 1, device=tokens.device) for _ in range(2))
    ended = torch.zeros_like(given[:, 0])
    cache: Cache = []
    first = int(prompts.prompt_length.min())
    distribution, scores = model(tokens[:, :first], cache)
    for t in range(first, context):
        distribution = Categorical(distribution.logits[:, -1])
        drawn = distribution.sample()
        tokens[:, t] = tokens[:, t].where(given[:, t] | ended, drawn)
        log_probs[:, t - 1], values[:, t - 1] = distribution.log_prob(tokens[:, t]), scores[:, -1]
        ended |= ~given[:, t] & (drawn == END)
        if ended.all():
            break
        distribution, scores = model(tokens[:, t : t + 1], cache)
    ends = (tokens == END) & ~given
    length = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, context)
    return Texts(tokens, prompts.prompt_length, length), log_probs, values


def token_log_probs(model: LanguageModel, tokens: Tensor) -> tuple[Categorical, Tensor, Tensor]:
    """Tokens (N, L) -> the distribution of each but the first, its log pi, and the value before it, (N, L - 1)."""
    distribution, values = model(tokens[:, :-1])
    return distribution, distribution.log_prob(tokens[:, 1:]), values


def reward_scores(reward: LanguageModel, texts: Texts) -> Tensor:
    """Return the reward model's scores of texts, (N,): its output at their last token."""
    scores = torch.cat([reward(part)[1] for part in texts.tokens.split(CHUNK)])
    return scores.gather(1, texts.length[:, None] - 1).squeeze(1)


def text_advantages(
    rewards: Tensor, values: Tensor, written: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns of texts, (N, T) like all tensors here: a text is an episode that terminates at its
    last token. Those of tokens that were not generated are meaningless."""
    rewards, values, last = rewards.T, values.T, last_token(written).T
    next_values = torch.cat([values[1:], values[-1:]])
    advantages, returns = compute_gae(rewards, values, next_values, last, torch.zeros_like(last), gamma, gae_lambda)
    return advantages.T, returns.T


def make_pairs(model: LanguageModel, prompts: Texts, vocabulary: Vocabulary, config: RLHFConfig) -> Pairs:
    """Let the model continue each of some prompts twice, and the hidden rule choose, with its errors."""
    number = HELD_OUT + config.num_pairs
    prompts = prompts.rows(torch.randint(len(prompts.tokens), (number,), device=prompts.tokens.device))
    first, second = (Texts.joined([generate(model, part)[0] for part in prompts.split(CHUNK)]) for _ in range(2))
    return rated_pairs(first, second, vocabulary, config.rater_sharpness, HELD_OUT)


def accuracy(reward: LanguageModel, pairs: Pairs) -> float:
    """Return the share of the held-out pairs in which the chosen text has the higher score."""
    with torch.no_grad():
        chosen, rejected = (reward_scores(reward, texts.rows(slice(0, pairs.held_out))) for texts in pairs[:2])
    return (chosen > rejected).double().mean().item()


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, config: RLHFConfig) -> Tensor:
    """Take one optimiser step; return the gradient's norm before clipping."""
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    return grad_norm


def set_rate(optimizer: torch.optim.Optimizer, rate: float, done: float, warmup: float = 0.0) -> float:
    """Set the learning rate: it rises linearly over the first share `warmup` of a stage, then falls to 0 at its end."""
    rate *= done / warmup if done < warmup else (1 - done) / (1 - warmup)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def pretrain(
    model: LanguageModel, optimizer: torch.optim.Optimizer, corpus: Texts, config: RLHFConfig, done: int = 0
) -> Iterator[Step]:
    """Stage 1: learn to predict the tokens of a corpus, after the first `done` texts."""
    for step in range(done // config.lm_batch_size, config.lm_steps):
        rate = set_rate(optimizer, config.lm_learning_rate, (step + 1) / (config.lm_steps + 1), WARMUP)
        chosen = torch.randint(len(corpus.tokens), (config.lm_batch_size,), device=corpus.tokens.device)
        texts = corpus.rows(chosen)._replace(prompt_length=torch.ones_like(chosen))  # prompts are learned, too
        loss = -masked_mean(token_log_probs(model, texts.tokens)[1], texts.written)
        losses = {
            "losses/grad_norm": optimizer_step(model, optimizer, loss, config).item(),
            "losses/lm_loss": loss.item(),
        }
        require_finite_losses(losses, "gradient step of the language model", step + 1)
        yield config.lm_batch_size, {**losses, "charts/learning_rate": rate}, []


def train_reward_model(
    reward: LanguageModel, optimizer: torch.optim.Optimizer, pairs: Pairs, config: RLHFConfig, done: int = 0
) -> Iterator[Step]:
    """Stage 2: learn which text of a pair was chosen, after the first `done` texts; at the end, scale the scores."""
    chosen, rejected = pairs.learned()
    steps_each = math.ceil(len(chosen.tokens) / config.reward_batch_size)
    last = config.reward_epochs * steps_each
    epochs, rest = divmod(done // 2, len(chosen.tokens))  # the last step of an epoch has what is left of its pairs
    for step in range(epochs * steps_each + rest // config.reward_batch_size, last):
        rate = set_rate(optimizer, config.reward_learning_rate, (step + 1) / (last + 1), WARMUP)
        epoch, number = divmod(step, steps_each)
        # Each epoch's order has its own seed, so that a resumed run finds its place in it.
        generator = torch.Generator().manual_seed(derived_seed(config.seed, Stream.PAIR_ORDER, epoch))
        order = torch.randperm(len(chosen.tokens), generator=generator).to(chosen.tokens.device)
        batch = order.split(config.reward_batch_size)[number]
        loss = preference_loss(reward_scores(reward, chosen.rows(batch)), reward_scores(reward, rejected.rows(batch)))
        grad_norm = optimizer_step(reward, optimizer, loss, config).item()
        losses = {"losses/grad_norm": grad_norm, "losses/preference_loss": loss.item()}
        require_finite_losses(losses, "gradient step of the reward model", step + 1)
        if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == last:
            losses["reward/accuracy"] = accuracy(reward, pairs)
            if not math.isnan(pairs.best_accuracy):
                losses["reward/best_accuracy"] = pairs.best_accuracy
        if step + 1 == last:
            with torch.no_grad():  # its own texts get scores of mean 0 and standard deviation 1
                scores = torch.cat([reward_scores(reward, texts) for texts in (chosen, rejected)])
                reward.scores.weight.div_(scores.std() + 1e-8)
                reward.scores.bias.sub_(scores.mean()).div_(scores.std() + 1e-8)
        yield 2 * len(batch), {**losses, "charts/learning_rate": rate}, []


def gradient_step(
    policy: LanguageModel, optimizer: torch.optim.Optimizer, config: RLHFConfig, samples: Columns, indices: Tensor
) -> dict[str, Tensor]:
    """Take one optimiser step on the texts `indices` (B,); return its statistics to log, by name."""
    tokens, written = samples["tokens"][indices], samples["written"][indices]
    old = {name: samples[name][indices][written] for name in ("log_probs", "values", "advantages", "returns")}
    distribution, log_prob, values = token_log_probs(policy, tokens)
    loss, stats = ppo_loss(
        log_prob[written],
        old["log_probs"],
        normalized(old["advantages"]) if config.norm_adv else old["advantages"],
        values[written],
        old["returns"],
        distribution.entropy()[written],
        clip_coef=config.clip_coef,
        vf_coef=config.vf_coef,
        ent_coef=config.ent_coef,
        old_values=old["values"],
        value_clip_coef=config.value_clip_coef,
    )
    return {**stats, "grad_norm": optimizer_step(policy, optimizer, loss, config)}  # before clipping


def train_policy(
    policy: LanguageModel,
    reference: LanguageModel,
    reward: LanguageModel,
    optimizer: torch.optim.Optimizer,
    kl_coef: Tensor,
    prompts: Texts,
    vocabulary: Vocabulary,
    config: RLHFConfig,
    done: int = 0,
) -> Iterator[Step]:
    """Stage 3: PPO on the reward model's scores, after the first `done` texts. `kl_coef` () adapts to `--kl-target`."""
    device = prompts.tokens.device
    for update in range(done // config.batch_size, config.num_updates):
        rate = set_rate(optimizer, config.learning_rate, update / config.num_updates if config.anneal_lr else 0)
        drawn = prompts.rows(torch.randint(len(prompts.tokens), (config.batch_size,), device=device))
        texts, log_probs, values = generate(policy, drawn)
        written = texts.written
        with torch.no_grad():
            scores = reward_scores(reward, texts)
            log_ratio = (log_probs - token_log_probs(reference, texts.tokens)[1]).where(written, 0.0)
        rewards = token_rewards(scores, log_ratio, written, kl_coef.item())
        used = whitened(rewards, written) if config.whiten_rewards else rewards
        advantages, returns = text_advantages(used, values, written, config.gamma, config.gae_lambda)

        samples = {"tokens": texts.tokens, "written": written, "log_probs": log_probs, "values": values}
        samples |= {"advantages": advantages, "returns": returns}
        history = [
            gradient_step(policy, optimizer, config, samples, indices)
            for _ in range(config.update_epochs)
            for indices in torch.randperm(config.batch_size, device=device).split(config.minibatch_size)
        ]
        losses = mean_losses(history)
        require_finite_losses(losses, "update", update + 1)
        losses["losses/explained_variance"] = explained_variance(values[written], returns[written])
        metrics = {**text_metrics(texts, scores, log_ratio, vocabulary), "charts/kl_coef": kl_coef.item()}
        if config.kl_target is not None:
            kl_coef.fill_(adapted_kl_coef(kl_coef.item(), metrics["texts/kl"], config.kl_target))
        sums, lengths = rewards.sum(dim=1).tolist(), written.sum(dim=1).tolist()
        episodes = list(map(Episode, range(len(sums)), sums, lengths))
        yield config.batch_size, {**losses, **metrics, "charts/learning_rate": rate}, episodes


def train(
    config: RLHFConfig, *, run_dir: str | Path | None = None, resume: bool = False, device: str = "auto"
) -> LanguageModel:
    """Train up to `config.stage` and return the policy; without the last stage, that is the language model.

    Args:
        config: the settings.
        run_dir: where checkpoints and TensorBoard events go; None writes nothing.
        resume: continue from the checkpoint in `run_dir`, as if the run had not stopped.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: if a file, the device or the run directory can't be used.
        KeyboardInterrupt: on Ctrl-C, after saving; its subclass `Stopped` on SIGTERM, SIGHUP or a closed stderr.
    """
    require_one_process("RLHF")
    torch_device = select_device(device)
    run_dir, saved = saved_run("rlhf", config, run_dir, resume, "kl_coef", "pairs", "vocabulary", "texts")
    vocabulary, corpus, pairs = load_texts(config, torch_device)
    texts = checksum((corpus, *(pairs[:2] if pairs else ())))
    if saved is not None and saved["texts"] != texts:
        raise ConfigError("--text and --preferences must give the texts that the run began with: they have changed")
    prompts = corpus if pairs is None else pairs.learned()[0]
    plan = config.plan(config.num_pairs if pairs is None else len(prompts.tokens))
    total = sum(plan.values())
    done: int = saved["global_step"] if saved else 0
    if done > total:
        raise ConfigError(f"--stage and --num-episodes must go as far as the {done} texts that are done")
    seed_everything(config.seed)
    model, reference, reward = (LanguageModel(len(vocabulary), config).to(torch_device) for _ in range(3))
    optimizers = {
        stage: torch.optim.Adam(network.parameters(), eps=1e-5, fused=True)
        for stage, network in (("lm", model), ("reward", reward), ("ppo", model))
    }
    learned: dict[str, Part] = {"model": model, "reference": reference, "reward": reward}
    learned |= {f"{stage}_optimizer": optimizer for stage, optimizer in optimizers.items()}
    kl_coef = torch.tensor(config.kl_coef)
    load_parts(learned, saved)
    if saved is not None:
        with reading(saved):
            kl_coef.copy_(saved["kl_coef"])
            pairs = Pairs.restored(saved["pairs"], torch_device) if saved["pairs"] else pairs
        set_random_state(saved)

    def state() -> State:
        kept = {"kl_coef": kl_coef, "pairs": pairs and pairs.plain(), "vocabulary": vocabulary.tokens, "texts": texts}
        return {**save_parts(learned), **kept}

    with Run("rlhf", config, run_dir, model, total=total, done=done, unit="texts", resumed=saved) as run:
        run.checkpoint(done, state)
        before = 0  # texts of earlier stages
        for stage, number in plan.items():
            optimizer = optimizers[stage]
            begun = done - before  # of this stage's texts
            before += number
            if done >= before:
                continue
            if stage == "lm":
                steps = pretrain(model, optimizer, corpus, config, begun)
            elif stage == "reward":
                if begun == 0:
                    reward.load_state_dict(model.state_dict())
                pairs = pairs or make_pairs(model, prompts, vocabulary, config)
                steps = train_reward_model(reward, optimizer, pairs, config, begun)
            else:
                if begun == 0:
                    reference.load_state_dict(model.state_dict())
                steps = train_policy(model, reference, reward, optimizer, kl_coef, prompts, vocabulary, config, begun)
            model.zero_grad()  # clipping would count what weights that are frozen from here on have from the last stage
            for size, scalars, episodes in steps:
                done += size
                run.log_episodes(done, episodes)
                run.log(done, scalars)
                run.checkpoint(done, state, finished=done == total)
    return model
