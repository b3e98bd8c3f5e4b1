"""RLHF: the maths by hand and by brute force, the network's promises, and the stages, one by one."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from minirl import rlhf
from minirl.ppo import compute_gae, ppo_loss
from minirl.rlhf import LanguageModel, RLHFConfig, Step
from minirl.texts import END, Pairs, Texts, Vocabulary, padded, reviews, words_of_the_grammar

SMALL = RLHFConfig(
    context=10, width=8, num_layers=2, num_heads=2, batch_size=4, minibatch_size=2, num_episodes=8, update_epochs=2
)
PROMPTS = padded([([], []), ([3], []), ([2, 1, 4], []), ([5, 5], [])], 10)


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def small_model(num_tokens: int = 6, seed: int = 0) -> LanguageModel:
    """A model that is far from uniform, and whose scores are not 0."""
    torch.manual_seed(seed)
    model = LanguageModel(num_tokens, SMALL)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return model.double()


# The maths


def test_the_preference_loss_and_its_gradient_by_hand() -> None:
    chosen = column(1.0, 0.0).requires_grad_()
    rejected = column(0.0, 2.0).requires_grad_()
    loss = rlhf.preference_loss(chosen, rejected)
    loss.backward()
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2)
    # the slope of -log sigmoid(d) is sigmoid(d) - 1
    slopes = [(1 / (1 + math.exp(-difference)) - 1) / 2 for difference in (1.0, -2.0)]
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.tolist() == pytest.approx(slopes)
    assert rejected.grad.tolist() == pytest.approx([-slope for slope in slopes])
    assert torch.autograd.gradcheck(rlhf.preference_loss, (chosen, rejected))


def test_a_lost_preference_costs_without_end_and_no_overflow() -> None:
    loss = rlhf.preference_loss(torch.tensor([-1000.0]), torch.tensor([1000.0]))
    assert loss.item() == 2000.0


def test_a_masked_mean_does_not_see_what_is_masked() -> None:
    values = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, 5.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    mean = rlhf.masked_mean(values, mask)
    mean.backward()
    assert mean.item() == pytest.approx(7 / 3)
    assert values.grad is not None
    assert values.grad.tolist() == [[pytest.approx(1 / 3)] * 2 + [0], [pytest.approx(1 / 3), 0, 0]]


def test_the_score_is_paid_for_the_last_token_and_each_nat_where_it_is_spent() -> None:
    written = torch.tensor([[False, True, True, True], [True, True, False, False], [False, False, False, True]])
    log_ratio = torch.arange(12, dtype=torch.float64).view(3, 4)
    rewards = rlhf.token_rewards(column(100, 200, 300), log_ratio, written, kl_coef=0.5)
    assert rewards.tolist() == [[0, -0.5, -1, 100 - 1.5], [-2, 200 - 2.5, 0, 0], [0, 0, 0, 300 - 5.5]]


def test_whitened_rewards_have_deviation_1_and_their_old_mean() -> None:
    rewards = torch.tensor([[5.0, 1.0, 3.0], [8.0, 99.0, 99.0]], dtype=torch.float64)
    written = torch.tensor([[True, True, True], [True, False, False]])
    scaled = rlhf.whitened(rewards, written)
    assert scaled[written].mean().item() == pytest.approx(17 / 4)
    assert scaled[written].std().item() == pytest.approx(1)
    assert scaled[1, 1:].tolist() == [0, 0]
    deviation = math.sqrt(sum((x - 17 / 4) ** 2 for x in (5, 1, 3, 8)) / 3)
    assert scaled[0, 1].item() == pytest.approx((1 - 17 / 4) / deviation + 17 / 4)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.5), (6.6, 0.505), (60.0, 0.51), (0.0, 0.49), (5.4, 0.495)],  # 10 % off is 1 %; 2 % is the most
)
def test_the_coefficient_follows_the_kl(kl: float, expected: float) -> None:
    assert rlhf.adapted_kl_coef(0.5, kl, 6.0) == pytest.approx(expected)


@pytest.mark.parametrize("function", ["preference_loss", "masked_mean", "token_rewards"])
def test_shapes_that_would_broadcast_are_refused(function: str) -> None:
    arguments: dict[str, Any] = {
        "preference_loss": (torch.zeros(3), torch.zeros(3, 1)),
        "masked_mean": (torch.zeros(3, 2), torch.ones(3, 1, dtype=torch.bool)),
        "token_rewards": (torch.zeros(3, 1), torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool), 0.1),
    }
    with pytest.raises(ValueError, match="shapes must be the same"):
        getattr(rlhf, function)(*arguments[function])


def test_advantages_of_texts_of_different_lengths_are_those_of_each_alone() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 5, 7, dtype=torch.float64)
    firsts, lasts = [0, 2, 1, 6, 3], [6, 2, 4, 6, 5]
    t = torch.arange(7)
    written = torch.stack([(t >= first) & (t <= last) for first, last in zip(firsts, lasts, strict=True)])
    advantages, returns = rlhf.text_advantages(rewards, values, written, 0.9, 0.8)
    assert advantages.shape == (5, 7)
    for row, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
        own = slice(first, last + 1)
        own_rewards, own_values = rewards[row, own, None], values[row, own, None]
        following = torch.cat([own_values[1:], torch.full((1, 1), math.nan)])  # nothing follows the end
        end = torch.zeros_like(own_rewards, dtype=torch.bool)
        end[-1] = True
        expected = compute_gae(own_rewards, own_values, following, end, torch.zeros_like(end), 0.9, 0.8)
        torch.testing.assert_close(advantages[row, own], expected[0][:, 0])
        torch.testing.assert_close(returns[row, own], expected[1][:, 0])
        # by its definition, too: a sum of TD errors
        steps = range(last + 1 - first)
        rest = [*values[row, own].tolist(), 0.0]
        errors = [rewards[row, first + k].item() + 0.9 * rest[k + 1] - rest[k] for k in steps]
        assert advantages[row, first].item() == pytest.approx(sum(0.72**k * errors[k] for k in steps))


# Texts in rows


def test_what_was_written_of_a_row() -> None:
    texts = padded([([7, 8], [9]), ([], [7, 8, 9, 7]), ([7], [8, 9, 7, 8])], 6)
    assert texts.tokens.tolist() == [[0, 7, 8, 9, 0, 0], [0, 7, 8, 9, 7, 0], [0, 7, 8, 9, 7, 8]]
    assert texts.length.tolist() == [5, 6, 6], "the last was cut: no END"
    # at t where token t + 1 was chosen: 9 and END; all five; all but the prompt
    assert texts.written.int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]


# The network


def test_a_later_token_changes_nothing_before_it() -> None:
    model = small_model()
    tokens = torch.randint(6, (3, 10))
    logits, scores = (part.detach() for part in (model(tokens)[0].logits, model(tokens)[1]))
    for t in range(1, 10):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 6
        distribution, other_scores = model(changed)
        assert torch.equal(distribution.logits[:, :t], logits[:, :t])
        assert torch.equal(other_scores[:, :t], scores[:, :t])
        assert not torch.allclose(distribution.logits[:, t], logits[:, t]), "but it does change what follows"


def test_with_a_cache_it_says_the_same() -> None:
    model, tokens = small_model(), torch.randint(6, (3, 10))
    distribution, scores = model(tokens)
    cache: Any = []
    parts = [model(tokens[:, :4], cache), *(model(tokens[:, t : t + 1], cache) for t in range(4, 10))]
    torch.testing.assert_close(torch.cat([part.logits for part, _ in parts], 1), distribution.logits)
    torch.testing.assert_close(torch.cat([part for _, part in parts], 1), scores)


def test_the_output_is_tied_to_the_embedding_and_scores_start_at_0() -> None:
    model = LanguageModel(6, SMALL)
    tokens = torch.randint(6, (2, 10))
    distribution, scores = model(tokens)
    features = model.body(tokens)
    torch.testing.assert_close(distribution.logits, (features @ model.body.token_embedding.weight.T).log_softmax(-1))
    assert torch.equal(scores, torch.zeros(2, 10))
    assert not any(isinstance(module, torch.nn.Dropout) for module in model.modules())


def test_writing_and_learning_agree_on_every_token(device: str) -> None:
    """The log-probabilities and values from generation, token by token with a cache, and from the update, at once."""
    torch.manual_seed(1)
    model = LanguageModel(6, SMALL)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    model = model.to(device)
    prompts = PROMPTS.rows(torch.arange(64) % 4).to(torch.device(device))
    texts, log_probs, values = rlhf.generate(model, prompts)
    distribution, expected, expected_values = rlhf.token_log_probs(model, texts.tokens)
    written = texts.written
    assert len(set(texts.length.tolist())) > 3, "some are short, some are cut"
    torch.testing.assert_close(log_probs[written], expected[written], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(values[written], expected_values[written], atol=1e-4, rtol=1e-4)
    rows = zip(texts.tokens.tolist(), prompts.prompt_length.tolist(), texts.length.tolist(), strict=True)
    for row, prompt, end in rows:
        assert END not in row[prompt : end - 1]
        assert row[end - 1] == END or end == 10
        assert row[end:] == [END] * (10 - end)
    given = torch.arange(10, device=device) < prompts.prompt_length[:, None]
    assert torch.equal(texts.tokens[given], prompts.tokens[given])
    assert distribution.logits.shape == (64, 9, 6)


def test_the_penalty_is_the_kl_divergence_in_expectation() -> None:
    """Over all texts of two tokens, the mean of the sum of log pi - log p is the KL divergence of the whole texts."""
    policy, reference = small_model(3, seed=0), small_model(3, seed=1)
    texts = torch.tensor([[END, *rest] for rest in itertools.product(range(3), repeat=2)])
    log_pi, log_p = (rlhf.token_log_probs(model, texts)[1] for model in (policy, reference))
    pi = log_pi.sum(1).exp()
    assert pi.sum().item() == pytest.approx(1)
    whole = (pi * (log_pi.sum(1) - log_p.sum(1))).sum()
    rewards = rlhf.token_rewards(torch.zeros(9).double(), log_pi - log_p, torch.ones(9, 2, dtype=torch.bool), 1.0)
    assert (pi * rewards.sum(1)).sum().item() == pytest.approx(-whole.item())
    # token by token: the first token's divergence, and the second's in expectation over the first
    said = [rlhf.token_log_probs(model, texts)[0].logits for model in (policy, reference)]
    first, second = ([logits[:, t] for logits in said] for t in (0, 1))
    by_token = sum(
        (pi * ((one.exp() * (one - other)).sum(-1))).sum().item() for one, other in (tuple(first), tuple(second))
    )
    assert whole.item() == pytest.approx(by_token)


def test_a_text_is_judged_by_its_last_token_whatever_is_behind() -> None:
    model = small_model()
    texts = padded([([1, 2], [3]), ([], [4, 5, 1, 2, 3, 4])], 10)
    scores = rlhf.reward_scores(model, texts)
    assert scores.tolist() == pytest.approx([model(texts.tokens)[1][0, 4].item(), model(texts.tokens)[1][1, 7].item()])
    behind = texts._replace(tokens=texts.tokens.clone())
    behind.tokens[0, 5:] = 3
    assert rlhf.reward_scores(model, behind).tolist() == pytest.approx(scores.tolist())
    alone = Texts(texts.tokens[:1, :5], texts.prompt_length[:1], texts.length[:1])
    assert rlhf.reward_scores(model, alone).tolist() == pytest.approx(scores[:1].tolist())


# The stages


def last_step(steps: Any) -> tuple[list[Step], dict[str, float]]:
    done = list(steps)
    return done, done[-1][1]


def adam(model: LanguageModel) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters())


def test_the_language_model_learns_what_there_is_to_know() -> None:
    """For texts `1 2 x 3` with x 4 or 5 in equal parts, the entropy of a text is ln 2; padding costs nothing."""
    config = dataclasses.replace(SMALL, lm_steps=200, lm_batch_size=16, lm_learning_rate=3e-2)
    corpus = padded([([1, 2], [4, 3]), ([1, 2], [5, 3])], 10)
    torch.manual_seed(0)
    model = LanguageModel(6, config)
    done, logged = last_step(rlhf.pretrain(model, adam(model), corpus, config))
    assert len(done) == 200
    assert logged["losses/lm_loss"] == pytest.approx(math.log(2) / 5, abs=0.05), "four tokens and END"
    texts, _, _ = rlhf.generate(model, padded([([], [])] * 50, 10))
    kinds = {tuple(row[:end]) for row, end in zip(texts.tokens.tolist(), texts.length.tolist(), strict=True)}
    assert kinds == {(0, 1, 2, 4, 3, 0), (0, 1, 2, 5, 3, 0)}


def ones_and_twos(number: int, wins: int) -> Pairs:
    """Pairs of a text with more of token `wins` against one with less."""
    torch.manual_seed(3)
    texts = [torch.randint(1, 3, (2, 6)).tolist() for _ in range(number)]
    texts = [sorted(pair, key=lambda text: -text.count(wins)) for pair in texts if pair[0].count(1) != pair[1].count(1)]
    chosen, rejected = (padded([([], pair[side]) for pair in texts], 10) for side in (0, 1))
    return Pairs(chosen, rejected, 20, math.nan)


@pytest.mark.parametrize("wins", [1, 2])
def test_the_reward_model_learns_who_wins_and_is_standardised(wins: int) -> None:
    config = dataclasses.replace(SMALL, reward_epochs=3, reward_batch_size=16, reward_learning_rate=1e-2)
    pairs = ones_and_twos(400, wins)
    torch.manual_seed(0)
    reward = LanguageModel(3, config)
    assert rlhf.accuracy(reward, pairs) == 0.0, "all scores are 0 before"
    _, logged = last_step(rlhf.train_reward_model(reward, adam(reward), pairs, config))
    assert logged["reward/accuracy"] >= 0.95
    assert "reward/best_accuracy" not in logged, "nobody knows the rule"
    with torch.no_grad():
        scores = torch.cat([rlhf.reward_scores(reward, texts) for texts in pairs.learned()])
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std().item() == pytest.approx(1, abs=1e-4)


def test_the_pairs_held_out_teach_nothing() -> None:
    pairs = ones_and_twos(100, 1)
    changed = pairs._replace(chosen=pairs.chosen._replace(tokens=pairs.chosen.tokens.clone()))
    changed.chosen.tokens[:20, 1:7] = 2
    config = dataclasses.replace(SMALL, reward_batch_size=16)
    weights = []
    for some in (pairs, changed):
        torch.manual_seed(0)
        reward = LanguageModel(3, config)
        last_step(rlhf.train_reward_model(reward, adam(reward), some, config))
        weights.append(reward.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_epoch_goes_over_every_pair_once_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(SMALL, reward_epochs=2, reward_batch_size=7)
    rows = padded([([1 + number], [1]) for number in range(30)], 10)
    seen: list[int] = []
    unspied = rlhf.reward_scores

    def spy(reward: LanguageModel, texts: Texts) -> Tensor:
        if torch.is_grad_enabled():
            seen.extend(texts.tokens[:, 1].tolist())
        return unspied(reward, texts)

    monkeypatch.setattr(rlhf, "reward_scores", spy)
    reward = LanguageModel(40, config)
    pairs = Pairs(rows, rows, 0, math.nan)
    steps, _ = last_step(rlhf.train_reward_model(reward, adam(reward), pairs, config))
    sizes = [size for size, _, _ in steps]
    assert sizes == 2 * [14, 14, 14, 14, 4], "two texts of each pair"
    for number in (1, 5, 7):
        rest = list(rlhf.train_reward_model(reward, adam(reward), pairs, config, done=sum(sizes[:number])))
        assert [size for size, _, _ in rest] == sizes[number:]
    batches = [seen[i : i + 7] for i in (0, 14, 28, 42)] + [seen[56:58]]  # each is scored twice: chosen and rejected
    first_epoch = [number for batch in batches for number in batch]
    assert sorted(first_epoch) == list(range(1, 31))
    assert first_epoch != sorted(first_epoch)
    second = seen[60:120]
    assert sorted(second) == sorted(2 * list(range(1, 31)))
    assert second[:7] != seen[:7]


def test_a_gradient_step_is_ppos_loss_of_the_tokens_that_were_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding and prompts, whatever their values, do not affect the loss."""
    config = dataclasses.replace(SMALL, norm_adv=False, ent_coef=0.01, max_grad_norm=1e9)
    policy = small_model()
    torch.manual_seed(5)
    texts, log_probs, values = rlhf.generate(policy.float(), PROMPTS)
    policy = policy.double()
    written = texts.written
    columns = {
        name: torch.randn(4, 9, dtype=torch.float64) for name in ("log_probs", "values", "advantages", "returns")
    }
    columns["log_probs"] = log_probs.double() + 0.1 * columns["log_probs"]
    for name, values in columns.items():
        columns[name] = values.where(written, math.nan)
    samples = {"tokens": texts.tokens, "written": written, **columns}
    chosen = torch.tensor([2, 0])

    pieces: dict[str, list[Tensor]] = {name: [] for name in (*columns, "log_prob", "new_values", "entropy")}
    for row in chosen.tolist():  # text by text, token by token
        for t in range(9):
            if not written[row, t]:
                continue
            distribution, scores = policy(texts.tokens[row : row + 1, : t + 1])
            for name, column_ in columns.items():
                pieces[name].append(column_[row, t])
            pieces["log_prob"].append(distribution.logits[0, -1, texts.tokens[row, t + 1]])
            pieces["entropy"].append(-(distribution.probs[0, -1] * distribution.logits[0, -1]).sum())
            pieces["new_values"].append(scores[0, -1])
    flat = {name: torch.stack(values) for name, values in pieces.items()}
    expected, stats = ppo_loss(
        flat["log_prob"],
        flat["log_probs"],
        flat["advantages"],
        flat["new_values"],
        flat["returns"],
        flat["entropy"],
        clip_coef=0.2,
        vf_coef=0.1,
        ent_coef=0.01,
        old_values=flat["values"],
        value_clip_coef=0.2,
    )
    gradients = torch.autograd.grad(expected, list(policy.parameters()), allow_unused=True)
    result = rlhf.gradient_step(policy, torch.optim.SGD(policy.parameters(), lr=0.0), config, samples, chosen)
    for weight, gradient in zip(policy.parameters(), gradients, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, torch.zeros_like(weight) if gradient is None else gradient)
    assert result.keys() == {*stats, "grad_norm"}
    torch.testing.assert_close({name: result[name] for name in stats}, stats)


def policy_stage(config: RLHFConfig, **options: Any) -> tuple[list[Step], LanguageModel, LanguageModel]:
    torch.manual_seed(0)
    policy, reference, reward = small_model().float(), small_model().float(), small_model(seed=2).float()
    coefficient = torch.tensor(config.kl_coef)
    vocabulary = Vocabulary("characters", list("abcde"))
    arguments = (policy, reference, reward, adam(policy), coefficient, PROMPTS, vocabulary, config)
    done = list(rlhf.train_policy(*arguments, **options))
    return done, policy, reference


def test_ppo_raises_the_reward_and_leaves_the_reference_alone() -> None:
    config = dataclasses.replace(
        SMALL, num_episodes=32 * 30, batch_size=32, minibatch_size=16, kl_coef=0.02, learning_rate=1e-2
    )
    before = small_model().float().state_dict()
    done, _, reference = policy_stage(config)
    assert len(done) == 30
    scores = [scalars["texts/reward_score"] for _, scalars, _ in done]
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.1
    assert done[0][1]["texts/kl"] == pytest.approx(0, abs=1e-3), "the policy begins as the reference"
    assert done[-1][1]["texts/kl"] > 0.1
    assert all(torch.equal(weight, before[name]) for name, weight in reference.state_dict().items())
    _, scalars, episodes = done[-1]
    returns = sum(episode.episodic_return for episode in episodes) / 32
    assert returns == pytest.approx(scalars["texts/reward_score"] - 0.02 * scalars["texts/kl"], abs=1e-4)
    assert not any("hidden" in tag for tag in scalars), "these are not the grammar's words"


def test_the_price_of_a_nat_falls_while_the_kl_is_below_its_target() -> None:
    done, _, _ = policy_stage(dataclasses.replace(SMALL, kl_target=50.0))
    assert [scalars["charts/kl_coef"] for _, scalars, _ in done] == pytest.approx([0.1, 0.098])


def test_a_stage_goes_on_from_a_later_step_as_it_would_have() -> None:
    config = dataclasses.replace(SMALL, lm_steps=3, num_episodes=4 * 3)
    assert len(policy_stage(config, done=2 * 4)[0]) == 1
    corpus = padded([([1, 2], [4, 3])], 10)
    model = LanguageModel(6, config)
    rates = [
        [scalars["charts/learning_rate"] for _, scalars, _ in rlhf.pretrain(model, adam(model), corpus, config, done)]
        for done in (0, config.lm_batch_size)
    ]
    assert rates[0][1:] == rates[1]


def test_pairs_are_of_the_same_prompts_and_the_rule_errs_as_often_as_it_should() -> None:
    config = RLHFConfig(num_pairs=100, rater_sharpness=2.0, width=8, num_heads=2, num_layers=1)
    torch.manual_seed(0)
    vocabulary = words_of_the_grammar()
    prompts = reviews(50, config.context, 1)
    pairs = rlhf.make_pairs(LanguageModel(len(vocabulary), config), prompts, vocabulary, config)
    assert len(pairs.chosen.tokens) == 100 + rlhf.HELD_OUT
    given = torch.arange(config.context) < pairs.chosen.prompt_length[:, None]
    assert torch.equal(pairs.chosen.tokens[given], pairs.rejected.tokens[given])
    assert not torch.equal(pairs.chosen.tokens, pairs.rejected.tokens)
    assert pairs.best_accuracy == 0.5, "an untrained model writes nothing that can be told apart"
