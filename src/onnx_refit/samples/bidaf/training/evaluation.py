"""The official score of a network on the dev set."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from ..metric import Score, score
from .batches import DeviceSplit, length_order
from .corpus import Corpus
from .model import Bidaf

__all__ = ["MAX_ANSWER", "answers", "best_spans", "evaluate", "predict_spans"]

MAX_ANSWER = 16
"""Longest answer that the search considers, in words."""

_EVALUATION_BATCH = 256


def best_spans(start: Any, end: Any) -> tuple[Any, Any]:
    """Find the first and last word with the largest sum of logits: float32 [B, T] each -> int64 [B] each."""
    windows = F.pad(end, (0, MAX_ANSWER - 1), value=-torch.inf).unfold(1, MAX_ANSWER, 1)
    best = (start[:, :, None] + windows).flatten(1).argmax(1)
    first = best // MAX_ANSWER
    return first, first + best % MAX_ANSWER


def predict_spans(model: Bidaf, split: DeviceSplit) -> npt.NDArray[np.int64]:
    """Return the best span of every example, int64 [examples, 2]."""
    was_training = model.training
    model.eval()
    spans = np.zeros((len(split), 2), np.int64)
    found = []
    with torch.no_grad():
        for examples in length_order(split.context_length, _EVALUATION_BATCH):
            batch = split.batch(examples)
            found.append((batch.examples, torch.stack(best_spans(*model(batch)), 1)))
    for rows, places in found:
        spans[rows] = places.cpu().numpy()
    model.train(was_training)
    return spans


def answers(corpus: Corpus, spans: npt.NDArray[np.int64]) -> dict[str, str]:
    """Turn spans of words of the first dev examples into question id -> text of the answer."""
    texts, offsets = corpus.dev_texts, corpus.dev.context_offsets
    result = {}
    for number, (first, last) in enumerate(spans):
        paragraph = int(corpus.dev.paragraph[number])
        base = int(offsets[paragraph])
        low, high = texts.token_start[base + first], texts.token_end[base + last]
        result[texts.questions[number]] = texts.contexts[paragraph][low:high]
    return result


def evaluate(model: Bidaf, corpus: Corpus, split: DeviceSplit) -> Score:
    """Score the network on the dev examples that ``split`` holds."""
    given: Mapping[str, str] = answers(corpus, predict_spans(model, split))
    return score(given, {question: corpus.dev_texts.answers[question] for question in given})
