"""A corpus of 200 real training questions, small enough for a CPU, with random word vectors."""

from functools import cache
from pathlib import Path

import numpy as np

from onnx_refit.samples.bidaf.text import tokenize
from onnx_refit.samples.bidaf.training.corpus import Corpus
from onnx_refit.samples.bidaf.training.preprocess import PreprocessSettings, preprocess
from onnx_refit.samples.bidaf.training.squad import Glove, Row, read_squad

SAMPLE = Path(__file__).parents[1] / "data" / "squad11_train_sample.jsonl.xz"
SETTINGS = PreprocessSettings(min_tuned=2, min_new=3, min_char=5, glove_rank=50)


@cache
def sample_rows() -> tuple[Row, ...]:
    return tuple(read_squad(SAMPLE))


@cache
def sample_glove() -> Glove:
    words = sorted({token.text.lower() for row in sample_rows() for token in tokenize(row.context)})
    vectors = np.random.default_rng(0).standard_normal((len(words), 50)).astype(np.float32)
    return Glove(words, vectors)


@cache
def sample_corpus() -> Corpus:
    """Train on the first 160 rows, score on the other 40 (of other paragraphs)."""
    rows = sample_rows()
    return preprocess(rows[:160], rows[160:], sample_glove(), SETTINGS)


@cache
def whole_corpus() -> Corpus:
    """All 200 rows to train on, the last 40 of them to score."""
    return preprocess(sample_rows(), sample_rows()[160:], sample_glove(), SETTINGS)


@cache
def seen_corpus() -> Corpus:
    """The same questions to train on and to score, to see that the network can learn at all."""
    rows = [row for row in sample_rows() if row.sure][:24]
    return preprocess(rows, rows, sample_glove(), SETTINGS)


class Witness:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.messages: list[str] = []

    def advance(self, share: float, message: str) -> None:
        self.shares.append(share)
        self.messages.append(message)

    def tell(self, message: str) -> None:
        self.messages.append(message)
