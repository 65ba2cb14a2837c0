"""The official score of a running engine on SQuAD v1.1."""

from __future__ import annotations

import json
import lzma
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from onnx_refit.errors import InputError
from onnx_refit.samples.bidaf.answering import Runs, answer
from onnx_refit.samples.bidaf.metric import Score, score
from onnx_refit.samples.bidaf.vocabulary import Passage

Progress = Callable[[int, int], None]
"""Takes how many questions are done, and of how many."""


@dataclass(frozen=True)
class Question:
    """One question of a data set.

    Attributes:
        id: its id.
        context: the paragraph.
        text: the question.
        answers: the accepted answers.
    """

    id: str
    context: str
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """How an engine did.

    Attributes:
        score: exact match and F1, in percent.
        predictions: question id -> answer.
        seconds: wall-clock time of all questions.
        milliseconds: median time of one question, tokenising included, on one of ``threads`` threads.
        threads: how many questions were asked at a time.
    """

    score: Score
    predictions: dict[str, str]
    seconds: float
    milliseconds: float
    threads: int


_FORMS = "Give SQuAD's JSON, or a JSON object a line with id, context, question, and answer or answers"


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Read a data set: one JSON object a line (xz-compressed or not), or SQuAD's own JSON.

    Args:
        path: the file.
        limit: how many questions, spread evenly over the data set; None for all.

    Raises:
        InputError: the file is missing, damaged, or no such data set.
    """
    try:
        data = path.read_bytes()
        text = (lzma.decompress(data) if data[:6] == b"\xfd7zXZ\x00" else data).decode()
        questions = list(_questions(text))
    except FileNotFoundError as error:
        raise InputError("there is no data set here", where=path, hint="Name the file with --data") from error
    except (OSError, lzma.LZMAError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"a question lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"this is no data set that can be read: {what}", where=path, hint=_FORMS) from error
    if not questions:
        raise InputError("the data set holds no questions", where=path)
    if limit is None or limit >= len(questions):
        return questions
    if limit < 1:
        raise InputError("the number of questions must be at least 1")
    return [questions[number * len(questions) // limit] for number in range(limit)]


def _questions(text: str) -> Iterator[Question]:
    first = text.lstrip()[:1]
    if first == "{" and '"data"' in text[:1000]:
        for article in json.loads(text)["data"]:
            for paragraph in article["paragraphs"]:
                for row in paragraph["qas"]:
                    given = tuple(dict.fromkeys(str(one["text"]) for one in row["answers"]))
                    yield Question(str(row["id"]), str(paragraph["context"]), str(row["question"]), given)
        return
    for line in text.split("\n"):  # splitlines() also cuts at U+2028, which JSON allows within a text
        if line.strip():
            row = json.loads(line)
            given = tuple(map(str, row.get("answers") or [row["answer"]]))
            yield Question(str(row["id"]), str(row["context"]), str(row["question"]), given)


def evaluate(
    engine: Runs, questions: Sequence[Question], *, threads: int = 1, progress: Progress | None = None
) -> Evaluation:
    """Ask an engine every question and score the answers with the official metric.

    Args:
        engine: a loaded BiDAF engine; asked from several threads at a time if ``threads`` is above 1.
        questions: the questions; one without words counts as answered with nothing.
        threads: how many to ask at a time.
        progress: called now and then, and at the end.
    """
    begun = time.perf_counter()
    passages: dict[str, Passage] = {}
    predictions: dict[str, str] = {}
    times: list[float] = []
    total = len(questions)

    def ask(question: Question) -> tuple[str, str, float]:
        started = time.perf_counter()
        try:
            context = passages.get(question.context)
            if context is None:
                context = passages[question.context] = Passage.of(question.context)
            text = answer(engine, context, Passage.of(question.text, what="question")).text
        except InputError:
            text = ""
        return question.id, text, time.perf_counter() - started

    for done, (identity, text, seconds) in enumerate(_each(ask, questions, max(1, threads)), 1):
        predictions[identity] = text
        times.append(seconds)
        if progress is not None and (done % 20 == 0 or done == total):
            progress(done, total)
    return Evaluation(
        score(predictions, {question.id: question.answers for question in questions}),
        predictions,
        time.perf_counter() - begun,
        median(times) * 1e3 if times else 0.0,
        max(1, threads),
    )


_Result = tuple[str, str, float]


def _each(ask: Callable[[Question], _Result], questions: Sequence[Question], threads: int) -> Iterable[_Result]:
    """The results of all questions, in any order, with few of them waiting at a time."""
    if threads == 1:
        yield from map(ask, questions)
        return
    waiting: set[Future[_Result]] = set()
    with ThreadPoolExecutor(threads) as pool:
        for question in questions:
            waiting.add(pool.submit(ask, question))
            if len(waiting) >= 4 * threads:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in waiting)
