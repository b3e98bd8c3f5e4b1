"""Texts: the grammar against itself, the hidden rule by hand, vocabularies, and the user's own files."""

import itertools
import json
import random
import statistics
from pathlib import Path

import pytest
import torch

from minirl.checks import ConfigError
from minirl.texts import (
    LONGEST,
    RULES,
    Texts,
    Vocabulary,
    hidden_score,
    is_grammatical,
    padded,
    rated_pairs,
    read_corpus,
    read_pairs,
    reviews,
    words_of_the_grammar,
    write_review,
)

REVIEW = "we came for lunch on monday . our waiter seemed rude . the soup was very tasty . i loved the terrace ."


def longest(symbol: str) -> int:
    """The most words that a symbol stands for, by going through the rules."""
    if symbol not in RULES:
        return 1
    return max(sum(map(longest, sequence.split())) for sequence in RULES[symbol])


def test_the_grammar_takes_what_it_makes_and_a_few_hundred_words() -> None:
    rng = random.Random(0)
    texts = [" ".join(write_review(rng)) for _ in range(3000)]
    assert all(map(is_grammatical, texts))
    assert statistics.fmean(map(hidden_score, texts)) == pytest.approx(0.5, abs=0.02), "neutral to begin with"
    assert len(set(texts)) > 2900
    assert 200 < len(words_of_the_grammar()) < 400
    opinions = sum(
        max(longest(f"{judgement}_{kind}") for judgement in ("GOOD", "BAD")) for kind in ("FOOD", "STAFF", "PLACE")
    )
    assert longest("OPENING") + opinions + 4 == LONGEST == max(len(text.split()) for text in texts)
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) >= 12


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("soup", "waiter"),  # tasty
        ("very", "very very"),
        ("tasty", "rude"),
        (" . i loved", " i loved"),
        ("i loved the terrace", "i loved the soup"),  # food twice
        (" . i loved the terrace .", " ."),
        ("terrace .", "terrace"),
        ("terrace .", "terrace . i loved the terrace ."),
        ("we came", "came we"),
        ("we came for lunch on monday . ", ""),
    ],
)
def test_the_grammar_refuses(old: str, new: str) -> None:
    assert is_grammatical(REVIEW)
    changed = REVIEW.replace(old, new, 1)
    assert changed != REVIEW
    assert not is_grammatical(changed)


@pytest.mark.parametrize(
    ("opinions", "score"),
    [
        ("the soup was tasty . our waiter seemed kind . i loved the bar .", 1),
        ("the soup was tasty . our waiter seemed rude . i loved the bar .", 2 / 3),
        ("the soup was nasty . our waiter seemed rude . i hated the bar .", 0),
        ("the soup was tasty . the fish was tasty . the soup was tasty .", 1 / 3),  # the food, once
        ("the soup was tasty . our waiter seemed kind . i loved the bar . the fish was tasty .", 3 / 4),
        ("the soup was tasty .", 1 / 3),
        ("tasty tasty kind . loved loved . soup kind .", 0),
        ("the soup was tasty . our waiter seemed kind . i loved the bar", 1),  # without its full stop
        ("", 0),
    ],
)
def test_the_hidden_rule_by_hand(opinions: str, score: float) -> None:
    assert hidden_score(f"we came for lunch today . {opinions}") == pytest.approx(score)


def test_the_rule_errs_as_bradley_and_terry_say() -> None:
    vocabulary = words_of_the_grammar()
    good, bad = (
        padded([(vocabulary.encode("we ordered tea today ."), vocabulary.encode(rest))] * 4000, 28)
        for rest in (
            "the soup was tasty . our waiter seemed kind . i hated the bar .",
            "the soup was nasty . our waiter seemed kind . i hated the bar .",
        )
    )
    torch.manual_seed(0)
    pairs = rated_pairs(good, bad, vocabulary, 3.0, 2000)
    chosen = (pairs.chosen.tokens == good.tokens).all(dim=1)
    assert torch.equal(~chosen, (pairs.rejected.tokens == good.tokens).all(dim=1))
    expected = 1 / (1 + 2.718281828 ** -(3.0 / 3))  # scores of 2/3 and 1/3
    assert chosen.double().mean().item() == pytest.approx(expected, abs=0.02)
    assert pairs.best_accuracy == pytest.approx(chosen[:2000].double().mean().item()), "of those held out"


def test_vocabularies_give_back_what_they_took() -> None:
    words = words_of_the_grammar()
    assert words.decode([0, *words.encode(REVIEW), 0, 0]) == REVIEW
    characters = Vocabulary("characters", sorted(set("héllo wörld")))
    assert characters.decode([0, *characters.encode("hö héw"), 0]) == "hö héw"
    data = Vocabulary("bytes", [])
    assert len(data) == 257
    assert data.encode("hö") == [1 + byte for byte in "hö".encode()]
    assert data.decode([0, *data.encode("grün ☂"), 0]) == "grün ☂"
    with pytest.raises(
        ConfigError, match="must have words that the language model has learned, and 'pizzeria' is none"
    ):
        words.encode("the pizzeria was tasty")
    with pytest.raises(ConfigError, match=r"must have characters .* and 'z' is none"):
        characters.encode("zoo")


def test_seeds_give_reviews_and_a_short_context_is_refused() -> None:
    one, same, other = (reviews(20, 28, seed).tokens for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    with pytest.raises(ConfigError, match="--context must be at least 28 tokens for the grammar's reviews, not 27"):
        reviews(1, 27, 0)


def test_a_corpus_is_its_lines_and_long_ones_are_cut(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abc\n\n  abcabcab \n", encoding="utf-8")
    vocabulary, corpus = read_corpus(tmp_path / "text", "characters", 6)
    assert vocabulary.tokens == ["a", "b", "c"]
    assert corpus.tokens.tolist() == [[0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 1, 2], [0, 3, 1, 2, 0, 0]]
    assert corpus.length.tolist() == [5, 6, 5]
    assert vocabulary.decode_all(corpus) == ["abc", "abcab", "cab"]


def test_preferences_are_read_shuffled_and_a_tenth_is_held_out(tmp_path: Path) -> None:
    lines = [{"prompt": "a" * (number % 3), "chosen": "b" * (1 + number % 2), "rejected": "a"} for number in range(20)]
    (tmp_path / "pairs").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    vocabulary = Vocabulary("characters", ["a", "b"])
    pairs = read_pairs(tmp_path / "pairs", vocabulary, 6, 0)
    assert pairs.held_out == 2
    assert len(pairs.learned()[0].tokens) == 18
    texts = list(zip(vocabulary.decode_all(pairs.chosen), vocabulary.decode_all(pairs.rejected), strict=True))
    written = [(line["prompt"] + line["chosen"], line["prompt"] + line["rejected"]) for line in lines]
    assert sorted(texts) == sorted(written)
    assert texts != written
    assert pairs.chosen.prompt_length.tolist() == [1 + text.count("a") for text, _ in texts]
    again, other = (read_pairs(tmp_path / "pairs", vocabulary, 6, seed).chosen.tokens for seed in (0, 1))
    assert torch.equal(again, pairs.chosen.tokens)
    assert not torch.equal(other, pairs.chosen.tokens)


GOOD_PAIR = '{"prompt": "a", "chosen": "b", "rejected": "a"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"prompt": "a", "chosen": "b"}',
            "must be a JSON object with the texts prompt, chosen and rejected: no rejected",
        ),
        ('{"prompt": "a", "chosen": "b", "rejected": 3}', ".* with the texts prompt, chosen and rejected: no rejected"),
        ("[]", "must be a JSON object with the texts prompt, chosen and rejected: no prompt"),
        ('{"prompt": "a", ', "must be a JSON object: .*"),
        ('{"prompt": "a", "chosen": "", "rejected": "a"}', "must have some text as chosen"),
        (
            '{"prompt": "aaaaaa", "chosen": "b", "rejected": "a"}',
            "must fit into --context 6: prompt and chosen have 8 tokens",
        ),
        (
            '{"prompt": "a", "chosen": "ü", "rejected": "a"}',
            "must have characters that .* has learned, and 'ü' is none",
        ),
    ],
)
def test_a_bad_pair_is_named_by_its_line(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "pairs").write_text(f"{GOOD_PAIR}\n{line}\n{GOOD_PAIR}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"pairs, line 2, {message}"):
        read_pairs(tmp_path / "pairs", Vocabulary("characters", ["a", "b"]), 6, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ".* has none"),
        (b"\n  \n", ".* has none"),
        (b"\xff\xfe", r"a file of text \(UTF-8\)"),
        (None, ".*No such file"),
    ],
)
def test_a_file_without_text_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"--text must be {message}"):
        read_corpus(tmp_path / "text", "characters", 6)


def test_lines_end_only_where_a_line_ends_and_a_files_mark_is_no_text(tmp_path: Path) -> None:
    text = "\ufeffa\u2028b\n"
    (tmp_path / "text").write_text(text, encoding="utf-8")
    vocabulary, corpus = read_corpus(tmp_path / "text", "characters", 6)
    assert {"a", "\u2028", "b"} <= {*vocabulary.tokens}
    assert "\ufeff" not in vocabulary.tokens
    assert len(corpus.tokens) == 1


def test_one_pair_is_too_few(tmp_path: Path) -> None:
    (tmp_path / "pairs").write_text(GOOD_PAIR)
    with pytest.raises(ConfigError, match=r"--preferences must be a file of at least two pairs, and .* has 1"):
        read_pairs(tmp_path / "pairs", Vocabulary("characters", ["a", "b"]), 6, 0)


def test_rows_can_be_taken_apart_and_joined() -> None:
    texts = padded([([number], [1]) for number in range(1, 6)], 5)
    parts = texts.split(2)
    assert [len(part.tokens) for part in parts] == [2, 2, 1]
    assert all(map(torch.equal, Texts.joined(parts), texts))
    assert list(itertools.chain(*(part.tokens[:, 1].tolist() for part in parts))) == [1, 2, 3, 4, 5]
