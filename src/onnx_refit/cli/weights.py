"""``check``, ``refit`` and ``diff``: weights against a plan, and against each other."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from onnx_refit import api, compose
from onnx_refit.cli.output import (
    counted,
    emit_json,
    human_bytes,
    json_option,
    progress,
    refuse_overwrite,
    say,
    shape_text,
    spinner,
    table,
)
from onnx_refit.cli.plans import PATH
from onnx_refit.files import write_text
from onnx_refit.plan.file import is_plan
from onnx_refit.plan.plan import Plan
from onnx_refit.refit.check import Casting, CheckOptions
from onnx_refit.refit.check_report import CheckReport
from onnx_refit.tensors import Array
from onnx_refit.weights.delta import write_delta
from onnx_refit.weights.diff import diff
from onnx_refit.weights.diff_report import to_html, write_plot
from onnx_refit.weights.open import open_weights
from onnx_refit.weights.rules import Rules
from onnx_refit.weights.source import WeightSource
from onnx_refit.weights.sources.arrays import ArraysSource


def check_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how strict a check is."""
    for option in (
        click.option("--partial", is_flag=True, help="Weights that are not given stay as they are."),
        click.option("--allow-nonfinite", is_flag=True, help="Accept NaN and infinities."),
        click.option("--allow-rounding", is_flag=True, help="Accept a cast that rounds values."),
    ):
        command = option(command)
    return command


def make_options(partial: bool, allow_nonfinite: bool, allow_rounding: bool, *, measure: bool = False) -> CheckOptions:
    """Check options from the flags of a command."""
    return CheckOptions(
        partial=partial,
        allow_nonfinite=allow_nonfinite,
        casting=Casting.ROUND if allow_rounding else Casting.LOSSLESS,
        compare=measure,
        measure=measure,
    )


def source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what becomes of the weights named, before they are checked."""
    for option in (
        click.option("--rules", type=PATH, help="A TOML file with rules that rename tensors first."),
        click.option("--lora", multiple=True, metavar="ADAPTER[=SCALE]", help="Merge a PEFT adapter (repeatable)."),
        click.option("--delta", type=PATH, help="Apply a delta made by 'diff -o'."),
        click.option(
            "--lerp",
            metavar="OTHER=T",
            help="Go the way T to another checkpoint (1 is there).",
        ),
    ):
        command = option(command)
    return command


def open_source(
    weights: str,
    rules: Path | None = None,
    lora: tuple[str, ...] = (),
    delta: Path | None = None,
    lerp: str | None = None,
) -> WeightSource:
    """The weights a command names: a checkpoint or a plan, then interpolated, adapted, renamed as asked."""
    source = plan_weights(weights) or open_weights(weights)
    if lerp is not None:
        other, t = _number(lerp, "--lerp")
        source = compose.lerp(source, plan_weights(other) or open_weights(other), t)
    if delta is not None:
        source = compose.delta(source, delta)
    if lora:
        pairs = [_number(one, "--lora") if "=" in one else (one, 1.0) for one in lora]
        source = compose.lora(source, *pairs)
    return source if rules is None else Rules.load(rules).apply(source)


class _Watched:
    """A weight source that tells how many bytes were read from it."""

    def __init__(self, source: WeightSource, done: Callable[[float], None]) -> None:
        self._source, self._done, self._read = source, done, 0
        self.description, self.specs = source.description, source.specs

    def read(self, name: str) -> Array:
        array = self._source.read(name)
        self._read += array.nbytes
        self._done(self._read)
        return array

    def close(self) -> None:
        self._source.close()


@contextlib.contextmanager
def watched(what: str, source: WeightSource, *, quiet: bool) -> Iterator[WeightSource]:
    """Show a progress bar with the rate while a source is read."""
    total = sum(spec.nbytes for spec in source.specs.values() if spec.is_static)
    with progress(what, total, as_bytes=True, quiet=quiet) as done:
        yield _Watched(source, done)


def plan_weights(path: str) -> WeightSource | None:
    """The weights of a plan file, or None if the path is something else."""
    if not Path(path).is_file() or not is_plan(Path(path)):
        return None
    return ArraysSource(Plan.load(path).require_weights(), path)


def _number(text: str, option: str) -> tuple[str, float]:
    name, _, number = text.rpartition("=")
    try:
        return name, float(number)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} does not end in =NUMBER", param_hint=option) from error


def show_check(report: CheckReport, *, measured: bool) -> None:
    """Print a check as tables."""
    if report.accepted:
        rows = []
        for weight in report.accepted:
            relative = weight.measure.largest_relative_change if measured and weight.measure is not None else None
            norm = weight.measure.norm if measured and weight.measure is not None else None
            rows.append(
                (
                    weight.name,
                    "" if weight.checkpoint_names in ((), (weight.name,)) else ", ".join(weight.checkpoint_names),
                    weight.dtype,
                    human_bytes(weight.nbytes),
                    {None: "", True: "changed", False: "unchanged"}[weight.changed],
                    "" if relative is None else f"{relative:.3g}",
                    "" if norm is None else f"{norm:.4g}",
                )
            )
        columns = ["weight", "from", "dtype", "bytes", "", "largest relative change", "norm"]
        table(f"accepted: {len(rows)}", columns, rows, right=(3, 5, 6))
    if report.rejected:
        refused = [(r.name, r.reason.value, r.text) for r in report.rejected]
        table(f"rejected: {len(refused)}", ["weight", "reason", "detail"], refused)
    if report.missing:
        missing = [
            (
                m.name,
                ", ".join(map(str, m.expected)) or _specs(m),
                ", ".join(near.spec.name for near in m.candidates),
            )
            for m in report.missing
        ]
        table(
            f"missing: {len(missing)}" + (" (they stay as they are)" if report.partial else ""),
            ["weight", "expected", "nearest in the checkpoint"],
            missing,
        )
    if report.unused:
        unused = [(u.name, _specs(u), ", ".join(near.spec.name for near in u.candidates)) for u in report.unused]
        table(f"not used: {len(unused)}", ["tensor", "is", "nearest in the plan"], unused)


def _specs(entry: Any) -> str:
    return str(entry.spec)[len(entry.spec.name) + 2 :]


@click.command("check")
@click.argument("plan", type=PATH)
@click.argument("weights", type=str)
@check_options
@source_options
@json_option
def check_command(
    plan: Path,
    weights: str,
    partial: bool,
    allow_nonfinite: bool,
    allow_rounding: bool,
    as_json: bool,
    **composed: Any,
) -> None:
    """Check WEIGHTS against PLAN without changing anything: accepted, rejected with reasons, missing, not used.

    Exit code 0 if a refit would be accepted, 1 if not.
    """
    opened = Plan.load(plan)
    with watched(f"checking {weights}", open_source(weights, **composed), quiet=as_json) as source:
        report = api.check(opened, source, make_options(partial, allow_nonfinite, allow_rounding, measure=True))
    if as_json:
        emit_json(report.to_json())
    else:
        show_check(report, measured=True)
        opened_as = "" if source.description == weights else f" from {source.description}"
        say(f"a refit{opened_as} would be {'accepted' if report.ok else 'refused'}")
    if not report.ok:
        sys.stdout.flush()
        raise click.exceptions.Exit(1)


@click.command("refit")
@click.argument("plan", type=PATH)
@click.argument("weights", type=str)
@click.option("-o", "--output", type=PATH, required=True, help="Where to write the plan with the new weights.")
@check_options
@source_options
@json_option
def refit_command(
    plan: Path,
    weights: str,
    output: Path,
    partial: bool,
    allow_nonfinite: bool,
    allow_rounding: bool,
    as_json: bool,
    **composed: Any,
) -> None:
    """Write PLAN with other WEIGHTS to OUTPUT; PLAN itself stays as it is unless OUTPUT names it."""
    refuse_overwrite(output, Path(weights))
    started = time.perf_counter()
    opened = Plan.load(plan)
    with watched(f"checking {weights}", open_source(weights, **composed), quiet=as_json) as source:
        description = source.description
        refitted = api.refit_plan(opened, source, make_options(partial, allow_nonfinite, allow_rounding))
    with spinner(f"writing {output}", quiet=as_json):
        refitted.save(output)
    seconds = time.perf_counter() - started
    if as_json:
        emit_json({"plan": str(output), "seconds": seconds, "weight_bytes": opened.weight_bytes})
        return
    rate = opened.weight_bytes / 1e9 / seconds
    say(
        f"wrote {output} with the weights of {description}: {human_bytes(opened.weight_bytes)} "
        f"in {seconds:.2f} s, {rate:.2f} GB/s"
    )


@click.command("diff")
@click.argument("a", type=str)
@click.argument("b", type=str)
@click.option("-o", "--output", type=PATH, help="Write a delta that turns A into B (safetensors).")
@click.option("--html", type=PATH, help="Write a report as one HTML page.")
@click.option("--plot", type=PATH, help="Draw the change of each tensor (PNG or SVG).")
@json_option
def diff_command(a: str, b: str, output: Path | None, html: Path | None, plot: Path | None, as_json: bool) -> None:
    """Compare two checkpoints (or plans) tensor by tensor."""
    for written in (output, html, plot):
        if written is not None:
            refuse_overwrite(written, Path(a), Path(b))
    before, after = open_source(a), open_source(b)
    total = sum(spec.nbytes for name, spec in before.specs.items() if after.specs.get(name) == spec)
    with progress("comparing", total, as_bytes=True, quiet=as_json) as done:
        found = diff(before, after, done)
    summary = write_delta(before, after, output) if output is not None else None
    if html is not None:
        write_text(html, to_html(found))
    if plot is not None:
        write_plot(found, plot)
    if as_json:
        emit_json({**found.to_json(), "delta": None if summary is None else {"path": str(output), **vars(summary)}})
        return
    if found.identical:
        say("the two are identical, bit for bit")
    rows = [
        (
            t.spec.name,
            t.spec.dtype,
            shape_text(t.spec.shape),
            f"{100 * t.changed_bytes / max(1, t.spec.nbytes):.1f} %",
            f"{t.relative_change:.3g}",
            f"{t.largest_relative_change:.3g}",
            f"{t.norm_before:.4g}",
            f"{t.norm_after:.4g}",
        )
        for t in found.changed
    ]
    if rows:
        columns = ["tensor", "dtype", "shape", "bytes changed", "change / norm", "largest", "norm before", "norm after"]
        equal = len(found.tensors) - len(rows)
        title = f"{counted(len(rows), 'tensor differs', 'tensors differ')}, {counted(equal, 'is', 'are')} equal"
        table(title, columns, rows, right=(3, 4, 5, 6, 7))
    for title, specs in (
        ("another dtype or shape", [f"{one} became {other}" for one, other in found.reshaped]),
        ("only in the first", [str(spec) for spec in found.removed]),
        ("only in the second", [str(spec) for spec in found.added]),
    ):
        if specs:
            table(title, ["tensor"], [(spec,) for spec in specs])
    if summary is not None:
        say(f"wrote {output}: {human_bytes(summary.nbytes)} for {counted(len(summary.changed), 'tensor')}")
    for path in (html, plot):
        if path is not None:
            say(f"wrote {path}")
