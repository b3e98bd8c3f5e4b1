"""Texts by what an RLHF run has learned: `python -m minirl.evaluate RUN_DIR` for a run of rlhf."""

from pathlib import Path
from typing import Any

import torch

from minirl.fast.machine import select_device
from minirl.rlhf import LanguageModel, RLHFConfig, generate, reward_scores, token_log_probs
from minirl.runs.checkpoints import load_checkpoint, load_weights, reading
from minirl.runs.flags import saved_config
from minirl.runs.run import seed_everything
from minirl.texts import Pairs, Texts, Vocabulary, padded, reviews, text_metrics

SAMPLES = 5  # texts that are shown
ROWS = {
    "texts/hidden_score": "hidden rule's score, of 1",
    "texts/grammatical": "share that the grammar accepts",
    "texts/reward_score": "reward model's score",
    "texts/kl": "KL divergence from the language model, nats a text",
}


@torch.no_grad()
def evaluate_texts(run_dir: Path, settings: dict[str, Any], number: int, seed: int, device: str) -> dict[str, Any]:
    """Have the language model and the policy write on from the same prompts, none of them trained on.

    Returns:
        `episodes`, the number of texts; `before` and `after`, means over those of the language model and those of the
        policy, by `ROWS`' names without "texts/"; `samples`, some prompts with both texts. A run that has not come to
        PPO has no `after`, and one that has not come to the end of the reward model no score by it.

    Raises:
        ConfigError: if the run's files will not do.
    """
    config: RLHFConfig = saved_config(RLHFConfig, run_dir, settings)
    torch_device = select_device(device)
    saved = load_checkpoint(run_dir, "rlhf", "model", "reference", "reward", "pairs", "vocabulary")
    with reading(saved):
        kind = config.tokens if config.text is not None else "words"
        vocabulary = Vocabulary(kind, list(saved["vocabulary"]))
        pairs = None if saved["pairs"] is None else Pairs.restored(saved["pairs"], torch.device("cpu"))
    model, reference, reward = (LanguageModel(len(vocabulary), config).to(torch_device) for _ in range(3))
    for network, key in ((model, "model"), (reference, "reference"), (reward, "reward")):
        load_weights(network, saved, key)
    prompts = _prompts(config, pairs, number, seed).to(torch_device)
    rewarded, tuned = _stages_done(config, pairs, saved["global_step"])
    seed_everything(seed)
    writers = {"before": reference, "after": model} if tuned else {"before": model}
    written = {}
    result: dict[str, Any] = {"episodes": number}
    for name, network in writers.items():
        texts, log_probs, _ = generate(network, prompts)
        log_ratio = (log_probs - token_log_probs(writers["before"], texts.tokens)[1]).where(texts.written, 0.0)
        scores = reward_scores(reward, texts)
        means = text_metrics(texts, scores, log_ratio, vocabulary)
        means |= {} if rewarded else {"texts/reward_score": float("nan")}
        result[name] = {tag.split("/")[1]: mean for tag, mean in means.items() if mean == mean}
        written[name] = vocabulary.decode_all(texts)[:SAMPLES]
    begun = vocabulary.decode_all(prompts._replace(length=prompts.prompt_length))
    result["samples"] = [
        {"prompt": prompt, **dict(zip(written, texts, strict=True))}
        for prompt, *texts in zip(begun[:SAMPLES], *written.values(), strict=True)
    ]
    return result


def _prompts(config: RLHFConfig, pairs: Pairs | None, number: int, seed: int) -> Texts:
    """Return prompts: openings by the grammar, those of somebody's pairs that were held out, or none at all."""
    if config.preferences is not None and pairs is not None:
        return pairs.chosen.rows(torch.arange(number) % pairs.held_out)
    return reviews(number, config.context, seed) if config.text is None else padded([([], [])] * number, config.context)


def _stages_done(config: RLHFConfig, pairs: Pairs | None, done: int) -> tuple[bool, bool]:
    """Return whether a run has the whole reward model, and whether it has begun with PPO."""
    number = config.num_pairs if pairs is None else len(pairs.learned()[0].tokens)
    ends = sum(size * steps for stage, (size, steps) in config.plan(number).items() if stage != "ppo")
    return config.stage != "lm" and done >= ends, config.stage == "ppo" and done > ends


def in_lines(result: dict[str, Any]) -> str:
    """Return what `evaluate_texts` returned as a table and some texts."""
    columns = [name for name in ("before", "after") if name in result]
    title = f"{result['episodes']} texts"
    lines = [f"{title:50s}" + "".join(f"{name:>10s}" for name in columns)]
    for tag, label in ROWS.items():
        numbers = [result[name].get(tag.split("/")[1]) for name in columns]
        if None not in numbers:
            lines.append(f"{label:50s}" + "".join(f"{number:10.2f}" for number in numbers))
    for sample in result["samples"]:
        lines += ["", *(f"{name:7s}{sample[name]}" for name in columns)]
    return "\n".join(lines)
