"""Training watched through a running engine: checkpoints refitted one after another, the score rising."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx_refit.errors import MissingExtraError
from onnx_refit.files import atomic_write
from onnx_refit.refit.live import Engine
from onnx_refit.samples.bidaf.answering import answer
from onnx_refit.samples.bidaf.evaluate import Question, evaluate
from onnx_refit.samples.bidaf.prepare import CONTEXT, QUESTION
from onnx_refit.tensors import Array


@dataclass(frozen=True)
class LiveRow:
    """One refit of the series.

    Attributes:
        checkpoint: its name.
        version: the engine's version that holds it.
        milliseconds: how long the refit took, check included.
        exact_match: percent of the questions.
        f1: percent.
        questions: how many were asked.
        answer: what the engine answers to the sample's question.
    """

    checkpoint: str
    version: int
    milliseconds: float
    exact_match: float
    f1: float
    questions: int
    answer: str


def refit_series(
    engine: Engine,
    checkpoints: Iterable[tuple[str, Callable[[], Mapping[str, Array]]]],
    questions: Sequence[Question],
    *,
    threads: int = 1,
    report: Callable[[LiveRow], None] | None = None,
) -> list[LiveRow]:
    """Refit checkpoints one after another into one running engine and score each.

    Args:
        engine: a loaded BiDAF engine; afterwards it holds the last checkpoint.
        checkpoints: name and a function that gives the weights under the engine's names.
        questions: what to score with; with none, only the sample's question is asked.
        threads: how many questions to ask at a time.
        report: called with each row as soon as it is known.

    Raises:
        WeightsError: a checkpoint does not fit; the engine keeps the one before.
    """
    rows = []
    for name, read in checkpoints:
        weights = read()
        begun = time.perf_counter()
        version = engine.refit(weights, partial=True).version
        seconds = time.perf_counter() - begun
        found = evaluate(engine, questions, threads=threads).score
        row = LiveRow(
            name,
            version,
            seconds * 1e3,
            found.exact_match,
            found.f1,
            found.questions,
            answer(engine, CONTEXT, QUESTION).text,
        )
        rows.append(row)
        if report is not None:
            report(row)
    return rows


def plot_rows(rows: Sequence[LiveRow], stem: Path) -> tuple[Path, ...]:
    """Draw the rising score, as ``STEM.png`` and ``STEM.svg``.

    Raises:
        MissingExtraError: matplotlib is not installed.
        WriteError: a file cannot be written.
    """
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "Drawing the plot of the live refits") from error
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    versions = list(range(1, len(rows) + 1))
    for label, values, colour, marker in (
        ("F1", [row.f1 for row in rows], "#1b6ca8", "s"),
        ("exact match", [row.exact_match for row in rows], "#c8553d", "o"),
    ):
        axes.plot(versions, values, label=label, color=colour, marker=marker, linewidth=2)
    for place, row in zip(versions, rows, strict=True):
        axes.annotate(
            f"{row.exact_match:.1f}", (place, row.exact_match), textcoords="offset points", xytext=(0, -14), ha="center"
        )
    axes.set_xticks(versions, [row.checkpoint for row in rows], rotation=20, ha="right")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 100)
    axes.set_ylabel("percent")
    asked = rows[0].questions if rows else 0
    axes.set_title(f"Checkpoints refitted into one running engine, {asked} questions of the SQuAD v1.1 dev set")
    axes.title.set_fontsize(10)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    paths = []
    for kind in ("png", "svg"):
        path = stem.with_suffix(f".{kind}")
        with atomic_write(path) as file:
            figure.savefig(file, format=kind, dpi=144)
        paths.append(path)
    return tuple(paths)
