"""Texts for a language model: made on the spot by a small grammar, or somebody's own, and tokens for them.

The grammar's are short reviews of a restaurant: an opening, then an opinion of the food, the staff and the place each,
in any order.

    we came for lunch on monday . our waiter seemed rude . the soup was very tasty . i loved the terrace .

Half of them are by pleased guests and half by displeased ones. A reader whom nobody asks, the hidden rule, likes praise
(`hidden_score`); what such a reader says of two texts, with errors, is all that a reward model learns from.
"""

import functools
import json
import math
import random
import re
import statistics
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minirl.checks import ConfigError
from minirl.streams import Stream, derived_seed

END = 0  # the token before a text, behind it, and in what is left of its row
KINDS = ("FOOD", "STAFF", "PLACE")  # each review has an opinion of each
REVIEWS, LONGEST = 20_000, 26  # how many are learned from, and the tokens of a long one
OF_THE_MOOD = 0.8  # share of a pleased guest's opinions that are praise, and of a displeased one's that are not

# Each symbol, in capitals, stands for one of several sequences of words and symbols; "-" is none.
GRAMMAR = """
OPENING = we VISIT WHEN | i VISIT WHEN | WHEN we VISIT | WHEN i VISIT | we VISIT with COMPANY
VISIT = came for MEAL | stopped for MEAL | had MEAL here | ordered MEAL | tried their MEAL
MEAL = breakfast | brunch | lunch | tea | dinner | supper | dessert | drinks | snacks | coffee
WHEN = on DAY | last DAY | in MONTH | last night | yesterday | today
DAY = monday | tuesday | wednesday | thursday | friday | saturday | sunday
MONTH = january | february | march | april | may | june | july | august | september | october | november | december
COMPANY = friends | colleagues | neighbours | my RELATIVE
RELATIVE = wife | husband | sister | brother | mother | father | son | daughter | boss | cousin | aunt | uncle
GOOD_FOOD = the FOOD was DEGREE TASTY | the FOOD tasted DEGREE TASTY | WHO LIKED the FOOD
BAD_FOOD = the FOOD was DEGREE NASTY | the FOOD tasted DEGREE NASTY | WHO HATED the FOOD
GOOD_STAFF = the STAFF was DEGREE FRIENDLY | our STAFF seemed DEGREE FRIENDLY | WHO LIKED the STAFF
BAD_STAFF = the STAFF was DEGREE RUDE | our STAFF seemed DEGREE RUDE | WHO HATED the STAFF
GOOD_PLACE = the PLACE was DEGREE PRETTY | the PLACE looked DEGREE PRETTY | WHO LIKED the PLACE
BAD_PLACE = the PLACE was DEGREE UGLY | the PLACE looked DEGREE UGLY | WHO HATED the PLACE
WHO = i | we
FOOD = soup | salad | bread | steak | fish | pasta | pizza | rice | curry | stew | burger | chicken | lamb | duck |
    omelette | soufflé | cake | pie | pudding | cheese | sauce | risotto | salmon | tuna | beef | pork | beans |
    noodles | dumplings | pancakes
STAFF = waiter | waitress | chef | barman | manager | host | owner | cook | cashier | doorman | sommelier | hostess
PLACE = terrace | garden | view | room | table | bar | kitchen | hall | window | courtyard | lounge | entrance |
    balcony | lobby
DEGREE = - | - | very | really | quite | rather | truly | simply | so
TASTY = tasty | delicious | fresh | juicy | crisp | tender | superb | excellent | perfect | wonderful | creamy | rich
    | spicy | fluffy | heavenly | divine | fragrant | great
NASTY = nasty | bland | stale | dry | soggy | tough | awful | terrible | horrible | greasy | bitter | salty | cold |
    burnt | raw | rotten | disgusting | tasteless
FRIENDLY = kind | friendly | polite | helpful | attentive | charming | patient | cheerful | warm | welcoming | funny |
    caring
RUDE = rude | unfriendly | impolite | lazy | careless | grumpy | impatient | arrogant | slow | annoying | clumsy |
    bored
PRETTY = pretty | lovely | cosy | bright | clean | quiet | elegant | stylish | spacious | beautiful | airy | charming
UGLY = ugly | dirty | dark | loud | cramped | shabby | smelly | dusty | crowded | dull | draughty | gloomy
LIKED = liked | loved | adored | enjoyed | praised | admired
HATED = hated | disliked | despised | regretted | loathed | detested
"""
RULES = {
    rule.split(" = ")[0]: [" ".join(sequence.replace("-", "").split()) for sequence in rule.split(" = ")[1].split("|")]
    for rule in GRAMMAR.strip().replace("\n    ", " ").splitlines()
}


def expand(symbol: str, rng: random.Random) -> list[str]:
    """Return words that a symbol of the grammar, or a word, may stand for."""
    if symbol not in RULES:
        return [symbol]
    return [word for part in rng.choice(RULES[symbol]).split() for word in expand(part, rng)]


def write_review(rng: random.Random) -> tuple[str, str]:
    """Return the opening of a review and the rest of it."""
    mood = rng.choice((OF_THE_MOOD, 1 - OF_THE_MOOD))
    kinds = rng.sample(KINDS, len(KINDS))
    sentences = [expand(f"GOOD_{kind}" if rng.random() < mood else f"BAD_{kind}", rng) for kind in kinds]
    opening, *others = (" ".join([*sentence, "."]) for sentence in [expand("OPENING", rng), *sentences])
    return opening, " ".join(others)


@functools.cache
def pattern(symbol: str) -> re.Pattern[str]:
    """Return the regular expression of what a symbol may stand for, a space behind each word."""

    def alternatives(name: str) -> str:
        sequences = ("".join(map(alternatives, sequence.split())) for sequence in RULES.get(name, ()))
        return f"(?:{'|'.join(sequences)})" if name in RULES else f"{name} "

    return re.compile(alternatives(symbol))


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a text without their full stops, a space behind each word; the last may be cut."""
    return [f"{sentence.strip()} " for sentence in text.split(".")]


def opinion_of(sentence: str) -> str | None:
    """Return what a sentence is by the grammar, `GOOD_FOOD` say, or None if it is no opinion."""
    symbols = (f"{judgement}_{kind}" for judgement in ("GOOD", "BAD") for kind in KINDS)
    return next((symbol for symbol in symbols if pattern(symbol).fullmatch(sentence)), None)


def is_grammatical(text: str) -> bool:
    """Whether a text is a whole review that the grammar may make."""
    opening, *sentences = sentences_of(text)
    opinions = [opinion_of(sentence) or "" for sentence in sentences[:-1]]
    kinds = sorted(opinion.rpartition("_")[2] for opinion in opinions)
    return pattern("OPENING").fullmatch(opening) is not None and kinds == sorted(KINDS) and sentences[-1] == " "


def hidden_score(text: str) -> float:
    """Return what the hidden rule thinks of a review, from 0 to 1, the best there is: the share of its opinions that is
    praise of the food, the staff and the place, each counted once.

    Every sentence but the opening counts as an opinion, three in any case, and only one that the grammar can read may
    count as praise. Of the grammar's own reviews the mean is 1/2.
    """
    sentences = [sentence for sentence in sentences_of(text)[1:] if sentence != " "]
    praised = {opinion for sentence in sentences if (opinion := opinion_of(sentence) or "").startswith("GOOD")}
    return len(praised) / max(len(KINDS), len(sentences))


class Texts(NamedTuple):
    """Texts as rows of tokens: `END`, a prompt that may be empty, what follows it, and `END` as far as the row goes."""

    tokens: Tensor  # (N, L) whole numbers
    prompt_length: Tensor  # (N,) tokens up to the end of the prompt, the first `END` included
    length: Tensor  # (N,) tokens of the whole text, both `END` included; one that was cut has none behind it

    @property
    def written(self) -> Tensor:
        """Which tokens were chosen: (N, L - 1), True at t where token t + 1 belongs to what follows the prompt."""
        t = torch.arange(self.tokens.shape[1] - 1, device=self.tokens.device)
        return (t >= self.prompt_length[:, None] - 1) & (t < self.length[:, None] - 1)

    def rows(self, chosen: Any) -> "Texts":
        """Return some of them."""
        return Texts(*(column[chosen] for column in self))

    def split(self, size: int) -> list["Texts"]:
        """Return them in parts of this many, the last one smaller."""
        return [Texts(*columns) for columns in zip(*(column.split(size) for column in self), strict=True)]

    @staticmethod
    def joined(parts: list["Texts"]) -> "Texts":
        """Return all texts of all parts."""
        return Texts(*map(torch.cat, zip(*parts, strict=True)))

    def to(self, device: torch.device) -> "Texts":
        """Return them on a device."""
        return Texts(*(column.to(device) for column in self))


def checksum(*texts: Texts) -> int:
    """Return a number that changes with any token of any of the texts."""
    number = 0
    for part in texts:
        for column in part:
            number = zlib.crc32(column.cpu().numpy().tobytes(), number)
    return number


class Pairs(NamedTuple):
    """Pairs of texts from the same prompts, of which somebody has chosen one; the first are held out, to judge by."""

    chosen: Texts
    rejected: Texts
    held_out: int
    best_accuracy: (
        float  # of the hidden rule itself on those held out, so what its errors allow; NaN where there is none
    )

    def learned(self) -> tuple[Texts, Texts]:
        """Return those to learn from: what was chosen, and what was not."""
        return self.chosen.rows(slice(self.held_out, None)), self.rejected.rows(slice(self.held_out, None))

    def plain(self) -> list[Any]:
        """Return tensors and numbers, for a checkpoint."""
        return [list(self.chosen), list(self.rejected), self.held_out, self.best_accuracy]

    @staticmethod
    def restored(plain: list[Any], device: torch.device) -> "Pairs":
        """Return the pairs that these were."""
        return Pairs(Texts(*plain[0]).to(device), Texts(*plain[1]).to(device), *plain[2:])


class Vocabulary:
    """What the tokens stand for: words with a space between them, characters or bytes. Number 0 is `END`.

    Args:
        kind: `words`, `characters` or `bytes`.
        tokens: the words or characters, from number 1 on; bytes are counted from 1 on.
    """

    def __init__(self, kind: str, tokens: list[str]) -> None:
        self.kind = kind
        self.tokens = tokens
        self.numbers = {token: number for number, token in enumerate(tokens, start=1)}

    def __len__(self) -> int:
        return 1 + (256 if self.kind == "bytes" else len(self.tokens))

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without `END`.

        Raises:
            ConfigError: naming the first word or character that there is no token for.
        """
        if self.kind == "bytes":
            return [1 + byte for byte in text.encode()]
        parts = text.split() if self.kind == "words" else list(text)
        if unknown := [part for part in parts if part not in self.numbers]:
            raise ConfigError(f"must have {self.kind} that the language model has learned, and {unknown[0]!r} is none")
        return [self.numbers[part] for part in parts]

    def decode(self, numbers: list[int]) -> str:
        """Return the text of some tokens; `END` is left out."""
        numbers = [number for number in numbers if number != END]
        if self.kind == "bytes":
            return bytes(number - 1 for number in numbers).decode(errors="replace")
        return (" " if self.kind == "words" else "").join(self.tokens[number - 1] for number in numbers)

    def decode_all(self, texts: Texts) -> list[str]:
        """Return texts in words, prompt and all."""
        return [self.decode(row[:end]) for row, end in zip(texts.tokens.tolist(), texts.length.tolist(), strict=True)]


def words_of_the_grammar() -> Vocabulary:
    """Return the vocabulary of the grammar."""
    return Vocabulary(
        "words", sorted({part for rule in RULES.values() for part in " ".join(rule).split()} - {*RULES} | {"."})
    )


def padded(pairs: list[tuple[list[int], list[int]]], context: int) -> Texts:
    """Return texts (prompt, rest) as rows of `context` tokens. One that fills its row has no `END` behind it.

    Args:
        pairs: each of up to context - 1 tokens, without `END`.
        context: L.
    """
    rows = [[END, *prompt, *rest] for prompt, rest in pairs]
    tokens = torch.tensor([[*row, *[END] * (context - len(row))] for row in rows])
    prompts = torch.tensor([1 + len(prompt) for prompt, _ in pairs])
    return Texts(tokens, prompts, torch.tensor([min(len(row) + 1, context) for row in rows]))


def reviews(number: int, context: int, seed: int) -> Texts:
    """Return reviews by the grammar, each with its opening as the prompt.

    Raises:
        ConfigError: if the longest does not fit into the context.
    """
    if context < LONGEST + 2:
        raise ConfigError(f"--context must be at least {LONGEST + 2} tokens for the grammar's reviews, not {context}")
    rng, vocabulary = random.Random(seed), words_of_the_grammar()
    texts = (write_review(rng) for _ in range(number))
    return padded([(vocabulary.encode(opening), vocabulary.encode(rest)) for opening, rest in texts], context)


def read_corpus(path: Path, kind: str, context: int) -> tuple[Vocabulary, Texts]:
    """Read somebody's own texts, one a line; longer ones than the context are cut into several.

    Raises:
        ConfigError: if there is no such file, or no text in it.
    """
    lines = [line.strip() for line in read(path, "--text").splitlines()]
    vocabulary = Vocabulary(kind, sorted({*"".join(lines)}) if kind == "characters" else [])
    numbers = [vocabulary.encode(line) for line in lines if line]
    if not numbers:
        raise ConfigError(f"--text must be a file with some text in it, and {path} has none")
    size = context - 1
    return vocabulary, padded(
        [([], line[i : i + size]) for line in numbers for i in range(0, len(line), size)], context
    )


def read_pairs(path: Path, vocabulary: Vocabulary, context: int, seed: int) -> Pairs:
    """Read somebody's preferences, a JSON object with `prompt`, `chosen` and `rejected` a line; a tenth is held out.

    Raises:
        ConfigError: naming the file and the line, if one is no such object, empty, too long for the context or of words
            or characters that the vocabulary does not have.
    """
    pairs: list[dict[str, list[int]]] = []
    for number, line in enumerate(read(path, "--preferences").splitlines(), start=1):
        if line.strip():
            try:
                pairs.append(read_pair(line, vocabulary, context))
            except ConfigError as error:
                raise ConfigError(f"{path}, line {number}, {error}") from None
    if len(pairs) < 2:
        raise ConfigError(f"--preferences must be a file of at least two pairs, and {path} has {len(pairs) or 'none'}")
    random.Random(seed).shuffle(pairs)
    chosen, rejected = (
        padded([(pair["prompt"], pair[key]) for pair in pairs], context) for key in ("chosen", "rejected")
    )
    return Pairs(chosen, rejected, max(1, len(pairs) // 10), math.nan)


def read_pair(line: str, vocabulary: Vocabulary, context: int) -> dict[str, list[int]]:
    """Return the tokens of a line of preferences: `prompt`, `chosen` and `rejected`."""
    keys = ("prompt", "chosen", "rejected")
    try:
        pair: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"must be a JSON object: {error}") from None
    if not isinstance(pair, dict) or any(not isinstance(pair.get(key), str) for key in keys):
        missing = [key for key in keys if not isinstance(pair, dict) or not isinstance(pair.get(key), str)]
        raise ConfigError(f"must be a JSON object with the texts prompt, chosen and rejected: no {missing[0]}")
    tokens = {key: vocabulary.encode(pair[key]) for key in keys}
    for key in ("chosen", "rejected"):
        if not tokens[key]:
            raise ConfigError(f"must have some text as {key}")
        size = 1 + len(tokens["prompt"]) + len(tokens[key])
        if size > context:
            raise ConfigError(f"must fit into --context {context}: prompt and {key} have {size} tokens")
    return tokens


def read(path: Path, flag: str) -> str:
    """Return what is in a file that a flag names.

    Raises:
        ConfigError: if it can't be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} must be a file of text (UTF-8): {error}") from None


def rated_pairs(first: Texts, second: Texts, vocabulary: Vocabulary, sharpness: float, held_out: int) -> Pairs:
    """Return pairs of texts as the hidden rule chooses: with the probability sigmoid(sharpness (score - other score)).

    That is Bradley and Terry's model (1952): the closer two texts are, the more often the worse one is preferred.
    """
    scores = [torch.tensor([hidden_score(text) for text in vocabulary.decode_all(texts)]) for texts in (first, second)]
    better = scores[0] - scores[1]
    chosen = torch.rand(len(better)) < torch.sigmoid(sharpness * better)
    right = (chosen == (better > 0)).float().where(better != 0, 0.5)[:held_out].mean().item()
    both = Texts(*(torch.stack(columns) for columns in zip(first, second, strict=True)))
    which, row = (~chosen).long().to(first.tokens.device), torch.arange(len(better), device=first.tokens.device)
    return Pairs(both.rows((which, row)), both.rows((1 - which, row)), held_out, right)


def text_metrics(texts: Texts, scores: Tensor, log_ratio: Tensor, vocabulary: Vocabulary) -> dict[str, float]:
    """Return means over texts, by TensorBoard's tags: the reward model's scores (N,), log pi - log p_reference (N, T)
    summed over a text, and of the grammar's words the hidden rule's score and the share that the grammar accepts."""
    about = {"texts/reward_score": scores.mean().item(), "texts/kl": log_ratio.sum(dim=1).mean().item()}
    if vocabulary.kind == "words":
        in_words = vocabulary.decode_all(texts)
        about["texts/hidden_score"] = statistics.fmean(map(hidden_score, in_words))
        about["texts/grammatical"] = statistics.fmean(map(is_grammatical, in_words))
    return about


def load_texts(config: Any, device: torch.device) -> tuple[Vocabulary, Texts, Pairs | None]:
    """Return what `--text` and `--preferences` name: a vocabulary, texts to learn from, and pairs that somebody chose.

    Raises:
        ConfigError: if a file will not do.
    """
    corpus, pairs = None, None
    vocabulary = words_of_the_grammar()
    if config.text is not None:
        vocabulary, corpus = read_corpus(Path(config.text), config.tokens, config.context)
    if config.preferences is not None:
        pairs = read_pairs(Path(config.preferences), vocabulary, config.context, config.seed)
        pairs = Pairs.restored(pairs.plain(), device)
    if corpus is None:
        corpus = reviews(REVIEWS, config.context, derived_seed(config.seed, Stream.TEXTS))
    return vocabulary, corpus.to(device), pairs
