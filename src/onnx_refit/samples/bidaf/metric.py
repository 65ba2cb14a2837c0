"""The official SQuAD v1.1 metric: exact match and F1 over normalised answers."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

__all__ = ["Score", "exact_match", "f1", "normalize_answer", "score"]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class Score(NamedTuple):
    """Exact match and F1 in percent, over ``questions`` questions."""

    exact_match: float
    f1: float
    questions: int


def normalize_answer(answer: str) -> str:
    """Lower case, without ASCII punctuation, English articles and superfluous white space."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, references: Iterable[str]) -> bool:
    """Whether the prediction equals one of the references after normalisation."""
    normal = normalize_answer(prediction)
    return any(normal == normalize_answer(reference) for reference in references)


def f1(prediction: str, references: Iterable[str]) -> float:
    """Return the best F1 (0 to 1) of the bags of normalised words, over the references."""
    words = normalize_answer(prediction).split()
    return max((_bag_f1(words, normalize_answer(reference).split()) for reference in references), default=0.0)


def _bag_f1(prediction: list[str], reference: list[str]) -> float:
    common = (Counter(prediction) & Counter(reference)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def score(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Score:
    """Compute the metric over all questions of ``references`` (question id -> accepted answers).

    A question without a prediction counts as wrong, as in the official script.
    """
    hits, overlap = 0, 0.0
    for question, accepted in references.items():
        prediction = predictions.get(question)
        if prediction is None:
            continue
        hits += exact_match(prediction, accepted)
        overlap += f1(prediction, accepted)
    count = len(references)
    scale = 100.0 / count if count else 0.0
    return Score(hits * scale, overlap * scale, count)
