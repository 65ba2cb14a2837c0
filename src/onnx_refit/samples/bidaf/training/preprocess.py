"""From SQuAD and GloVe to a corpus. The dev set has no say in the vocabularies."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..metric import normalize_answer
from ..text import WORD_LENGTH, Token, tokenize
from .corpus import Corpus, DevTexts, Split
from .errors import DataError
from .squad import Glove, Row

__all__ = ["UNKNOWN", "PreprocessSettings", "preprocess"]

UNKNOWN = "<unk>"
_MAX_CHARS = 256


@dataclass(frozen=True, slots=True)
class PreprocessSettings:
    """How the corpus is made.

    Attributes:
        max_context: longer paragraphs are left out of training (words).
        max_question: longer questions are cut (words).
        min_tuned: words at least this frequent in the training set are trained.
        min_new: words without a GloVe vector need this frequency to enter the vocabulary.
        min_char: characters need this frequency, counted once a type.
        glove_rank: the most frequent GloVe words enter even if the training set lacks them; untrained.
    """

    max_context: int = 400
    max_question: int = 60
    min_tuned: int = 5
    min_new: int = 5
    min_char: int = 20
    glove_rank: int = 60_000


@dataclass(frozen=True, slots=True)
class _Example:
    row: Row
    paragraph: int
    question: list[str]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Side:
    contexts: list[str]
    tokens: list[list[Token]]
    examples: list[_Example]


def preprocess(
    train: Sequence[Row],
    dev: Sequence[Row],
    glove: Glove,
    settings: PreprocessSettings | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> Corpus:
    """Tokenise, choose the vocabularies from the training set and GloVe alone, and number everything.

    Raises:
        DataError: nothing is left to train on.
    """
    settings = settings or PreprocessSettings()
    notes: dict[str, Any] = asdict(settings)
    train_side = _trainable(_read_side([row for row in train if row.sure], settings), settings, notes)
    if not train_side.examples:
        raise DataError("no training question is left", hint="Check the data set and --max-context.")
    notes["guessed_answers_left_out"] = sum(not row.sure for row in train)
    report(f"{len(train_side.examples)} training questions over {len(train_side.contexts)} paragraphs")
    dev_side = _read_side(dev, settings)

    counts = _type_counts(train_side)
    words, tuned = _choose_words(counts, glove, settings)
    chars = _choose_chars(counts, settings.min_char)
    report(f"{len(words)} words ({tuned} trained), {len(chars)} characters")
    dev_counts = _type_counts(dev_side)
    types = [*sorted(counts, key=lambda kind: (-counts[kind], kind)), *sorted(dev_counts.keys() - counts.keys())]
    word_ids, char_ids = _ids(words), _ids(chars)
    type_ids = {kind: number for number, kind in enumerate(types)}
    for name, seen in (("train", counts), ("dev", dev_counts)):
        unknown = sum(count for kind, count in seen.items() if kind.lower() not in word_ids)
        notes[f"unknown_words_{name}_percent"] = round(100 * unknown / max(1, seen.total()), 3)
    notes |= {"words": len(words), "chars": len(chars), "tuned": tuned, "types": len(types)}
    return Corpus(
        words=words,
        chars=chars,
        tuned=tuned,
        word_vectors=_vectors(words, glove),
        type_words=np.array([word_ids.get(kind.lower(), 1) for kind in types], np.int32),
        type_chars=_type_chars(types, char_ids),
        train=_split(train_side, type_ids),
        dev=_split(dev_side, type_ids),
        dev_texts=_dev_texts(dev_side),
        notes=notes,
    )


def _read_side(rows: Iterable[Row], settings: PreprocessSettings) -> _Side:
    numbers: dict[str, int] = {}
    side = _Side([], [], [])
    for row in rows:
        if row.context not in numbers:
            numbers[row.context] = len(side.contexts)
            side.contexts.append(row.context)
            side.tokens.append(tokenize(row.context))
        paragraph = numbers[row.context]
        covered = [
            place
            for place, token in enumerate(side.tokens[paragraph])
            if token.end > row.answer_start and token.start < row.answer_end
        ]
        question = [token.text for token in tokenize(row.question)][: settings.max_question] or ["?"]
        start, end = (covered[0], covered[-1]) if covered else (-1, -1)
        side.examples.append(_Example(row, paragraph, question, start, end))
    return side


def _trainable(side: _Side, settings: PreprocessSettings, notes: dict[str, Any]) -> _Side:
    """Leave out what cannot be trained on, count why, and renumber the paragraphs that stay."""
    kept = [
        example
        for example in side.examples
        if len(side.tokens[example.paragraph]) <= settings.max_context and example.start >= 0
    ]
    notes["training_questions"] = len(kept)
    notes["long_paragraphs_left_out"] = sum(
        len(side.tokens[example.paragraph]) > settings.max_context for example in side.examples
    )
    notes["answers_off_word_limits"] = sum(
        normalize_answer(_span_text(side, example)) != normalize_answer(example.row.answers[0]) for example in kept
    )
    used = sorted({example.paragraph for example in kept})
    renumbered = {old: new for new, old in enumerate(used)}
    return _Side(
        contexts=[side.contexts[old] for old in used],
        tokens=[side.tokens[old] for old in used],
        examples=[
            _Example(example.row, renumbered[example.paragraph], example.question, example.start, example.end)
            for example in kept
        ],
    )


def _span_text(side: _Side, example: _Example) -> str:
    tokens = side.tokens[example.paragraph]
    return side.contexts[example.paragraph][tokens[example.start].start : tokens[example.end].end]


def _type_counts(side: _Side) -> Counter[str]:
    counts: Counter[str] = Counter()
    for tokens in side.tokens:
        counts.update(token.text for token in tokens)
    for example in side.examples:
        counts.update(example.question)
    return counts


def _choose_words(types: Counter[str], glove: Glove, settings: PreprocessSettings) -> tuple[list[str], int]:
    counts: Counter[str] = Counter()
    for kind, count in types.items():
        counts[kind.lower()] += count
    known = set(glove.words)
    chosen = [word for word, count in counts.items() if word in known or count >= settings.min_new]
    chosen.sort(key=lambda word: (-counts[word], word))
    tuned = 2 + sum(counts[word] >= settings.min_tuned for word in chosen)
    frequent = [word for word in glove.words[: settings.glove_rank] if word and word not in counts]
    return ["", UNKNOWN, *chosen, *frequent], tuned


def _choose_chars(types: Counter[str], at_least: int) -> list[str]:
    counts: Counter[str] = Counter()
    for kind, count in types.items():
        for char in kind[:WORD_LENGTH]:
            counts[char] += count
    chosen = [char for char, count in counts.items() if count >= at_least]
    chosen.sort(key=lambda char: (-counts[char], char))
    return ["", UNKNOWN, *chosen][:_MAX_CHARS]


def _ids(entries: Sequence[str]) -> dict[str, int]:
    """Entry -> row, without the padding and the unknown entry: a text may spell ``<unk>``."""
    return {entry: number for number, entry in enumerate(entries) if number > 1}


def _vectors(words: Sequence[str], glove: Glove) -> npt.NDArray[np.float16]:
    """GloVe rows; other words start near the mean of the frequent words, the unknown word on it, padding at 0."""
    frequent = glove.vectors[:50_000]
    mean, deviation = frequent.mean(0), frequent.std(0)
    rows = {word: number for number, word in enumerate(glove.words)}
    noise = np.random.default_rng(1)
    vectors = np.zeros((len(words), glove.vectors.shape[1]), np.float32)
    vectors[1] = mean
    for number, word in enumerate(words[2:], 2):
        row = rows.get(word)
        if row is None:
            vectors[number] = mean + 0.1 * deviation * noise.standard_normal(len(mean))
        else:
            vectors[number] = glove.vectors[row]
    return vectors.astype(np.float16)


def _type_chars(types: Sequence[str], ids: Mapping[str, int]) -> npt.NDArray[np.uint8]:
    table = np.zeros((len(types), WORD_LENGTH), np.uint8)
    for number, kind in enumerate(types):
        codes = [ids.get(char, 1) for char in kind[:WORD_LENGTH]]
        table[number, : len(codes)] = codes
    return table


def _split(side: _Side, type_ids: Mapping[str, int]) -> Split:
    contexts = [[type_ids[token.text] for token in tokens] for tokens in side.tokens]
    questions = [[type_ids[kind] for kind in example.question] for example in side.examples]
    return Split(
        contexts=_flat(contexts),
        context_offsets=_offsets(contexts),
        questions=_flat(questions),
        question_offsets=_offsets(questions),
        paragraph=np.array([example.paragraph for example in side.examples], np.int32),
        start=np.array([example.start for example in side.examples], np.int32),
        end=np.array([example.end for example in side.examples], np.int32),
    )


def _flat(sequences: Iterable[Sequence[int]]) -> npt.NDArray[np.int32]:
    return np.fromiter((entry for sequence in sequences for entry in sequence), np.int32)


def _offsets(sequences: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    return np.cumsum([0, *map(len, sequences)]).astype(np.int32)


def _dev_texts(side: _Side) -> DevTexts:
    return DevTexts(
        contexts=side.contexts,
        token_start=_flat([[token.start for token in tokens] for tokens in side.tokens]),
        token_end=_flat([[token.end for token in tokens] for tokens in side.tokens]),
        questions=[example.row.id for example in side.examples],
        answers={example.row.id: list(example.row.answers) for example in side.examples},
    )
