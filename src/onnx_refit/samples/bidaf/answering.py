"""Asking a running engine: texts in, a span of the context with its probability out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnx_refit.errors import InputError, PlanMismatchError
from onnx_refit.plan.plan import Plan
from onnx_refit.samples.bidaf.network import END_POS, END_SCORES, SPAN, START_POS, START_SCORES
from onnx_refit.samples.bidaf.vocabulary import INPUTS, Passage, feeds
from onnx_refit.tensors import Array

MAX_CONTEXT = 20_000
"""Words of a context; the time of an answer grows in proportion (about half a second for 10,000)."""

MAX_QUESTION = 1_000
"""Words of a question."""

Say = Callable[[str], None]
"""Takes one line of what a function has to tell; the caller prints it, logs it or drops it."""


class Runs(Protocol):
    """What answering needs of an engine: string tensors in, named arrays out."""

    def run(self, inputs: Mapping[str, object]) -> Mapping[str, Array]:
        """Run one inference."""
        ...


@dataclass(frozen=True)
class Answer:
    """A span of the context.

    Attributes:
        text: the span as it stands in the context; empty if the model gave an end before its start.
        first: its first word.
        last: its last word (inclusive).
        start: its first character in the context.
        end: the character after its last.
        probability: that the answer starts and ends there, if the model gives scores; else None.
    """

    text: str
    first: int
    last: int
    start: int
    end: int
    probability: float | None


def best_span(start_scores: Array, end_scores: Array, longest: int = SPAN) -> tuple[int, int, float]:
    """The pair of words with the largest sum of scores, start <= end < start + longest; the first one on ties.

    Args:
        start_scores: float [n], log-probabilities.
        end_scores: float [n].
        longest: the longest span in words.

    Returns:
        First word, last word, sum of the scores.
    """
    n = len(start_scores)
    padded = np.full(n + longest - 1, -np.inf)
    padded[:n] = end_scores
    windows = np.lib.stride_tricks.sliding_window_view(padded, longest)
    sums = np.asarray(start_scores, np.float64)[:, None] + windows
    first, length = divmod(int(np.argmax(sums)), longest)
    return first, first + length, float(sums[first, length])


def require_bidaf(plan: Plan) -> None:
    """PlanMismatchError unless a plan takes words and characters and gives places, as a BiDAF model's does."""
    given = {vocabulary.input for vocabulary in plan.preprocessors} | {spec.name for spec in plan.compiled.inputs}
    outputs = {spec.name for spec in plan.compiled.outputs}
    missing = [name for name in INPUTS if name not in given]
    if missing or not ({START_POS, END_POS} <= outputs or {START_SCORES, END_SCORES} <= outputs):
        raise PlanMismatchError(
            f"the plan is of another model: it takes {', '.join(sorted(given)) or 'nothing'} and gives "
            f"{', '.join(sorted(outputs))}",
            where=plan.path,
            hint="Name a plan of a BiDAF model, as `onnx-refit bidaf build` makes it",
        )


def answer(engine: Runs, context: str | Passage, question: str | Passage) -> Answer:
    """Answer a question over a context.

    Args:
        engine: a loaded BiDAF plan.
        context: a text, or one that was cut into words before (cheaper for several questions).
        question: the same.

    Raises:
        InputError: the context or the question holds no words, or too many.
    """
    context = context if isinstance(context, Passage) else Passage.of(context, limit=MAX_CONTEXT)
    if not isinstance(question, Passage):
        question = Passage.of(question, what="question", limit=MAX_QUESTION)
    return read_answer(context, engine.run(feeds(context, question)))


def read_answer(context: Passage, outputs: Mapping[str, Array]) -> Answer:
    """The answer in the engine's outputs; InputError if they are not those of a BiDAF model."""
    probability: float | None = None
    if START_SCORES in outputs and END_SCORES in outputs:
        first, last, score = best_span(outputs[START_SCORES].ravel(), outputs[END_SCORES].ravel())
        probability = math.exp(score)
    elif START_POS in outputs and END_POS in outputs:
        first, last = (int(np.asarray(outputs[name]).ravel()[0]) for name in (START_POS, END_POS))
    else:
        raise InputError(
            f"the model gives {', '.join(outputs) or 'nothing'}, not {START_POS} and {END_POS}",
            hint="Ask a model of the BiDAF family",
        )
    text = context.span(first, last)
    if not text:
        return Answer("", first, last, 0, 0, probability)
    return Answer(text, first, last, context.tokens[first].start, context.tokens[last].end, probability)
