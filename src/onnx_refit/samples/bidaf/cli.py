"""The commands ``onnx-refit bidaf ...``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TextIO

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from onnx_refit.api import EngineOptions, build, load
from onnx_refit.engine.registry import DEFAULT_ENGINE, engine_names
from onnx_refit.errors import InputError
from onnx_refit.files import write_text
from onnx_refit.plan.plan import Plan
from onnx_refit.samples.bidaf import bundle
from onnx_refit.samples.bidaf.answering import MAX_CONTEXT, Answer, answer, require_bidaf
from onnx_refit.samples.bidaf.build import PLAN, get_plan
from onnx_refit.samples.bidaf.demo import bundled_series, dev_questions, make_directory, run_demo, write_original
from onnx_refit.samples.bidaf.download import URL, Remote, download
from onnx_refit.samples.bidaf.evaluate import evaluate, read_questions
from onnx_refit.samples.bidaf.export import export_model
from onnx_refit.samples.bidaf.live import LiveRow, plot_rows, refit_series
from onnx_refit.samples.bidaf.original import ORIGINAL, VARIABLE, find_original
from onnx_refit.samples.bidaf.prepare import MODIFIED, prepare_bidaf
from onnx_refit.samples.bidaf.sample import refit_and_infer
from onnx_refit.samples.bidaf.vocabulary import Passage

_PATH = click.Path(path_type=Path)

_data = click.option(
    "-d", "--data-directory", type=_PATH, help=f"Directory with your own original model (or the variable {VARIABLE})."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
_plan = click.option(
    "--plan", "plan_path", type=_PATH, help=f"The plan to use; {PLAN} here if there is one, else the bundled model."
)
_threads = click.option("--threads", type=click.IntRange(1), default=os.cpu_count() or 1, help="Questions at a time.")


@click.group()
def bidaf() -> None:
    """The sample: BiDAF prepared, built, refitted and answering questions."""


def _err() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


@bidaf.command("prepare")
@_data
@click.option("--bundled", is_flag=True, help="Use the model that comes with this library.")
@click.option("-o", "--output", type=_PATH, default=Path(MODIFIED), show_default=True, help="The modified model.")
@click.option("-v", "--verbose", is_flag=True, help="Say what each pass changed and why.")
@click.option("--no-verify", is_flag=True, help="Do not compare the answers of the two models.")
@_json
def prepare_command(
    data_directory: Path | None, bundled: bool, output: Path, verbose: bool, no_verify: bool, as_json: bool
) -> None:
    """Rewrite the original model until an engine can run it.

    The vocabularies of its CategoryMappers are saved beside the modified model as JSON.
    """
    if bundled:
        original = write_original(output.parent)
    else:
        found = find_original(data_directory, os.environ)
        if (warning := found.warning()) is not None:
            click.echo(f"warning: {warning}", err=True)
        original = found.path
    files = prepare_bidaf(original, output, _quiet if as_json else click.echo, verbose=verbose, verify=not no_verify)
    if as_json:
        changes = [vars(change) for change in files.prepared.changes]
        _emit({"original": original, "model": files.model, "maps": files.maps, "changes": changes})


def _quiet(line: str) -> None:
    del line


def _emit(data: object) -> None:
    click.echo(json.dumps(data, indent=2, default=str))


@bidaf.command("build")
@click.option(
    "--model", "model_path", type=_PATH, default=Path(MODIFIED), show_default=True, help="The modified model."
)
@click.option("--plan", "plan_path", type=_PATH, default=Path(PLAN), show_default=True, help="Where the plan is kept.")
@click.option("--rebuild", is_flag=True, help="Build even if there is a plan.")
@click.option("--all-weights", is_flag=True, help="Refit every weight, not only the two that NVIDIA's sample names.")
@click.option("--only-build", is_flag=True, help="Stop once there is a plan.")
@click.option("--engine", type=click.Choice(engine_names()), default=DEFAULT_ENGINE, show_default=True, help="Engine.")
@_json
def build_command(
    model_path: Path, plan_path: Path, rebuild: bool, all_weights: bool, only_build: bool, engine: str, as_json: bool
) -> None:
    """Build an engine (or read its plan), refit fake and right weights, and check the answers.

    Exit code 1 if an answer is not what it must be.
    """
    say = _quiet if as_json else click.echo
    if not model_path.exists():
        raise InputError(
            "there is no modified model",
            where=model_path,
            hint="Make it with 'onnx-refit bidaf prepare' (-d DIR for your own original, --bundled for ours)",
        )
    plan = get_plan(model_path, plan_path, say, engine=engine, rebuild=rebuild)
    if only_build:
        if as_json:
            _emit({"plan": plan_path, "fingerprint": plan.fingerprint})
        return
    if plan.weights is None:
        raise InputError("the plan holds no weights to refit", where=plan_path, hint="Build it anew with --rebuild")
    with load(plan) as running:
        outcome = refit_and_infer(running, plan.weights, say, everything=all_weights)
    if as_json:
        _emit({"plan": plan_path, **vars(outcome), "passed": outcome.passed})
    if not outcome.passed:
        click.echo(f"error: {outcome.explanation()}", err=True)
        raise click.exceptions.Exit(1)


def _load_plan(path: Path | None) -> Plan:
    """The plan named, the one in the working directory, or the bundled model built in memory."""
    if path is None and Path(PLAN).exists():
        path = Path(PLAN)
    if path is None:
        return build(bundle.bundled_model())
    plan = Plan.load(path)
    require_bidaf(plan)
    return plan


def show_answer(context: str, question: str, found: Answer) -> None:
    """Print a question, its answer's place in the context, and the probability."""
    console = Console(highlight=False, soft_wrap=True)
    low, high = max(0, found.start - 240), min(len(context), found.end + 240)
    text = Text("…" if low else "")
    text.append(context[low : found.start])
    text.append(context[found.start : found.end], style="bold reverse")
    text.append(context[found.end : high] + ("…" if high < len(context) else ""))
    console.print(Text(f"Q: {question}", style="bold"))
    probability = "" if found.probability is None else f"   (probability {found.probability:.2f})"
    console.print(Text(f"A: {found.text or '(no answer)'}{probability}"))
    console.print(text)
    console.print()


@bidaf.command("ask")
@click.option("--context", help="The text to look in.")
@click.option("--context-file", type=click.File("r", encoding="utf-8"), help="A file with the text ('-' for stdin).")
@click.option("--question", required=True, help="The question.")
@_plan
@_json
def ask_command(
    context: str | None, context_file: TextIO | None, question: str, plan_path: Path | None, as_json: bool
) -> None:
    """Answer a question over a context: the span, where it stands, and its probability."""
    if (context is None) == (context_file is None):
        raise click.UsageError("give either --context or --context-file")
    text = context if context_file is None else _read(context_file)
    assert text is not None
    passage = Passage.of(text, limit=MAX_CONTEXT)
    asked = Passage.of(question, what="question")
    with load(_load_plan(plan_path)) as engine:
        found = answer(engine, passage, asked)
    if as_json:
        _emit({"question": question, **vars(found)})
    else:
        show_answer(text, question, found)


def _read(file: TextIO) -> str:
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise InputError("the context is not UTF-8 text") from error


@bidaf.command("evaluate")
@click.option("--split", type=click.Choice(["dev"]), default="dev", show_default=True, help="The data set.")
@click.option("--data", type=_PATH, help="A data set of your own: JSON lines, or SQuAD's JSON.")
@click.option("--limit", type=click.IntRange(1), help="How many questions, spread over the data set.")
@click.option("--predictions", type=_PATH, help="Write the answers as JSON, as the official script reads them.")
@_plan
@_threads
@_json
def evaluate_command(
    split: str,
    data: Path | None,
    limit: int | None,
    predictions: Path | None,
    plan_path: Path | None,
    threads: int,
    as_json: bool,
) -> None:
    """Compute the official exact match and F1 through the engine."""
    questions = dev_questions(limit) if data is None else read_questions(data, limit)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=_err(), transient=True)
    with load(_load_plan(plan_path), options=EngineOptions(threads=1 if threads > 1 else 0)) as engine, bar:
        task = bar.add_task("asking", total=len(questions))
        found = evaluate(engine, questions, threads=threads, progress=lambda done, _: bar.update(task, completed=done))
    if predictions is not None:
        write_text(predictions, json.dumps(found.predictions, ensure_ascii=False))
    if as_json:
        _emit(
            {
                "split": split if data is None else str(data),
                "questions": found.score.questions,
                "exact_match": found.score.exact_match,
                "f1": found.score.f1,
                "seconds": found.seconds,
                "milliseconds_per_question": found.milliseconds,
                "threads": found.threads,
            }
        )
        return
    click.echo(
        f"exact match {found.score.exact_match:.2f}  F1 {found.score.f1:.2f}  ({found.score.questions} questions)"
    )
    click.echo(f"{found.seconds:.1f} s, {found.milliseconds:.1f} ms a question on each of {found.threads} threads")


@bidaf.command("download")
@click.option("-d", "--data-directory", type=_PATH, envvar=VARIABLE, required=True, help="Where the file goes.")
@click.option("--url", default=URL, help="Another place to fetch the same file from.")
@_json
def download_command(data_directory: Path, url: str, as_json: bool) -> None:
    """Fetch the published model (43.5 MB), going on where an earlier attempt stopped."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    remote = Remote(url=url)
    with Progress(*columns, TimeElapsedColumn(), console=_err(), transient=True) as bar:
        task = bar.add_task(remote.name, total=remote.nbytes)
        path = download(data_directory, remote, progress=lambda done, _: bar.update(task, completed=done))
    if as_json:
        _emit({"path": path, "nbytes": remote.nbytes, "sha256": remote.sha256})
    else:
        click.echo(f"{path}: complete, checksum as published")


@bidaf.command("export")
@click.option("-o", "--output", type=_PATH, default=Path(ORIGINAL), show_default=True, help="The ONNX file.")
@click.option("--checkpoint", help="A bundled checkpoint (the last one by default), or a safetensors file.")
@click.option("--published-outputs", is_flag=True, help="Only start_pos and end_pos, as the published model.")
@_json
def export_command(output: Path, checkpoint: str | None, published_outputs: bool, as_json: bool) -> None:
    """Write trained weights as the original model: ONNX, opset 9, string inputs."""
    tensors = bundle.checkpoint(checkpoint)
    made = export_model(tensors, bundle.bundled_vocabulary(), output, scores=not published_outputs)
    if as_json:
        _emit(vars(made))
    else:
        click.echo(f"{made.path}: {made.nbytes / 1e6:.2f} MB, {len(made.weights)} weights")


def _table(rows: list[LiveRow]) -> Table:
    table = Table(title="Checkpoints refitted into one running engine", title_justify="left")
    for name in ("checkpoint", "version", "refit ms", "exact match", "F1", "What color is the fox?"):
        table.add_column(name, justify="left" if name in ("checkpoint", "What color is the fox?") else "right")
    for row in rows:
        cells = (row.checkpoint, str(row.version), f"{row.milliseconds:.1f}", f"{row.exact_match:.1f}", f"{row.f1:.1f}")
        table.add_row(*cells, Text(row.answer))
    return table


@bidaf.command("live")
@click.option("-o", "--output", type=_PATH, default=Path("out"), show_default=True, help="Directory for the plot.")
@click.option("--limit", type=click.IntRange(1), default=200, show_default=True, help="Questions for each score.")
@click.option("--no-plot", is_flag=True, help="Draw no plot (drawing needs matplotlib).")
@_plan
@_threads
@_json
def live_command(output: Path, limit: int, no_plot: bool, plan_path: Path | None, threads: int, as_json: bool) -> None:
    """Refit a series of training checkpoints into one running engine and watch the score rise."""
    questions = dev_questions(limit)
    with load(_load_plan(plan_path), options=EngineOptions(threads=1 if threads > 1 else 0)) as engine:
        rows = refit_series(engine, bundled_series(), questions, threads=threads)
    plots: tuple[Path, ...] = ()
    if not no_plot:
        make_directory(output)
        plots = plot_rows(rows, output / "bidaf-live")
    if as_json:
        _emit({"rows": [vars(row) for row in rows], "plots": plots})
        return
    Console(highlight=False).print(_table(rows))
    for path in plots:
        click.echo(f"plot: {path}")


@bidaf.command("demo")
@click.option("--bundled", is_flag=True, help="Use the model that comes with this library (the only one so far).")
@click.option("-o", "--output", type=_PATH, default=Path("out"), show_default=True, help="Directory for all files.")
@click.option("--limit", type=click.IntRange(1), default=60, show_default=True, help="Questions for each live score.")
def demo_command(bundled: bool, output: Path, limit: int) -> None:
    """Run the whole sample: prepare, build, refit, check, ask, and refit live."""
    del bundled
    make_directory(output)

    def show(context: str, question: str, found: Answer) -> None:
        if not shown:
            click.echo()
        shown.append(question)
        show_answer(context, question, found)

    shown: list[str] = []
    result = run_demo(output, click.echo, questions=limit, show=show)
    Console(highlight=False).print(_table(list(result.rows)))
    for path in result.plots:
        click.echo(f"plot: {path}")
    if result.note is not None:
        click.echo(f"no plot: {result.note}", err=True)
    if not result.outcome.passed:
        click.echo(f"error: {result.outcome.explanation()}", err=True)
        raise click.exceptions.Exit(1)
