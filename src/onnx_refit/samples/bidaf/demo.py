"""The whole sample in one go, on the bundled model: prepared, built, refitted, asked, and refitted live."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from onnx_refit.api import EngineOptions, load
from onnx_refit.errors import MissingExtraError, OnnxRefitError
from onnx_refit.files import write_error
from onnx_refit.samples.bidaf import bundle
from onnx_refit.samples.bidaf.answering import Answer, Say, answer
from onnx_refit.samples.bidaf.build import PLAN, get_plan
from onnx_refit.samples.bidaf.evaluate import Question, read_questions
from onnx_refit.samples.bidaf.export import save_model
from onnx_refit.samples.bidaf.live import LiveRow, plot_rows, refit_series
from onnx_refit.samples.bidaf.original import ORIGINAL
from onnx_refit.samples.bidaf.prepare import CONTEXT, MODIFIED, prepare_bidaf
from onnx_refit.samples.bidaf.sample import Outcome, refit_and_infer
from onnx_refit.tensors import Array

PASSAGE = (
    "Marie Curie was born in Warsaw in 1867 and moved to Paris in 1891 to study physics. With her husband Pierre she "
    "discovered polonium and radium in 1898. She received the Nobel Prize in Physics in 1903 and the Nobel Prize in "
    "Chemistry in 1911, and remains the only person to win in two sciences."
)

QUESTIONS = (
    (CONTEXT, "What does the fox jump over?"),
    (PASSAGE, "Where was Marie Curie born?"),
    (PASSAGE, "When did she move to Paris?"),
    (PASSAGE, "Which elements did she discover?"),
)


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration found.

    Attributes:
        outcome: the sample's check.
        answers: question -> answer, of a few more.
        rows: the live refits.
        plots: the plots drawn; none without matplotlib.
        note: why no plot was drawn, or None.
    """

    outcome: Outcome
    answers: tuple[tuple[str, Answer], ...]
    rows: tuple[LiveRow, ...]
    plots: tuple[Path, ...]
    note: str | None


def dev_questions(limit: int | None = None) -> list[Question]:
    """Questions of the bundled SQuAD v1.1 dev set, spread evenly; InputError if it is not there."""
    return read_questions(Path(__file__).parent / "questions" / "squad11_dev.jsonl.xz", limit)


def bundled_series() -> Sequence[tuple[str, Callable[[], Mapping[str, Array]]]]:
    """The bundled checkpoints, each with a function that reads it."""
    return [(name, partial(bundle.checkpoint_weights, name)) for name in bundle.checkpoint_names()]


def write_original(directory: Path) -> Path:
    """Write the bundled model as ``bidaf-original.onnx`` into a directory, which is made if it is not there."""
    make_directory(directory)
    return save_model(bundle.bundled_model(), directory / ORIGINAL).path


def make_directory(directory: Path) -> None:
    """Make a directory and those above it; WriteError if that fails."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(directory, error) from error


def run_demo(
    output: Path,
    say: Say,
    *,
    questions: int = 60,
    report: Callable[[LiveRow], None] | None = None,
    show: Callable[[str, str, Answer], None] | None = None,
) -> DemoResult:
    """Run the demonstration.

    Args:
        output: the directory for models, plan and plots.
        say: takes the lines of the sample.
        questions: how many dev questions each live refit is scored with.
        report: called with each row of the live refits.
        show: called with each of the few questions: context, question, answer.

    Raises:
        OnnxRefitError: a step failed.
    """
    original = write_original(output)
    modified = prepare_bidaf(original, output / MODIFIED, say).model
    plan = get_plan(modified, output / PLAN, say, rebuild=True)
    plan = get_plan(modified, output / PLAN, say)
    if plan.weights is None:
        raise OnnxRefitError("the plan holds no weights", where=output / PLAN)
    threads = os.cpu_count() or 1
    with load(plan, options=EngineOptions(threads=1)) as engine:  # several questions at a time, one thread each
        outcome = refit_and_infer(engine, plan.weights, say)
        answers = []
        for context, question in QUESTIONS:
            found = answer(engine, context, question)
            answers.append((question, found))
            if show is not None:
                show(context, question, found)
        held = engine.version
        say(f"Live: {held} versions so far, from the first weights to those of the check; each checkpoint is one more.")
        rows = refit_series(engine, bundled_series(), dev_questions(questions), threads=threads, report=report)
    try:
        plots, note = plot_rows(rows, output / "bidaf-live"), None
    except MissingExtraError as error:
        plots, note = (), str(error)
    return DemoResult(outcome, tuple(answers), tuple(rows), plots, note)
