"""``check`` and ``refit``: weights against a plan."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from onnx_refit import api
from onnx_refit.cli.output import emit_json, human_bytes, json_option, say, spinner, table
from onnx_refit.cli.plans import PATH
from onnx_refit.plan.plan import Plan
from onnx_refit.refit.check import Casting, CheckOptions
from onnx_refit.refit.check_report import CheckReport
from onnx_refit.weights.open import WeightsLike, open_weights
from onnx_refit.weights.rules import Rules


def check_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how strict a check is."""
    for option in (
        click.option("--partial", is_flag=True, help="Weights that are not given stay as they are."),
        click.option("--allow-nonfinite", is_flag=True, help="Accept NaN and infinities."),
        click.option("--allow-rounding", is_flag=True, help="Accept a cast that rounds values."),
        click.option("--rules", type=PATH, help="A TOML file with rules that rename tensors first."),
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


def open_renamed(weights: str, rules: Path | None) -> WeightsLike:
    """The weights a command names, seen through the rules of a file if one is given."""
    return weights if rules is None else Rules.load(rules).apply(open_weights(weights))


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
        missing = [(m.name, _specs(m), ", ".join(near.spec.name for near in m.candidates)) for m in report.missing]
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
@json_option
def check_command(
    plan: Path,
    weights: str,
    partial: bool,
    allow_nonfinite: bool,
    allow_rounding: bool,
    rules: Path | None,
    as_json: bool,
) -> None:
    """Check WEIGHTS against PLAN without changing anything: accepted, rejected with reasons, missing, not used.

    Exit code 0 if a refit would be accepted, 1 if not.
    """
    with spinner(f"checking {weights}", quiet=as_json):
        source = open_renamed(weights, rules)
        report = api.check(plan, source, make_options(partial, allow_nonfinite, allow_rounding, measure=True))
    if as_json:
        emit_json(report.to_json())
    else:
        show_check(report, measured=True)
        say("a refit would be accepted" if report.ok else "a refit would be refused")
    if not report.ok:
        sys.stdout.flush()
        raise click.exceptions.Exit(1)


@click.command("refit")
@click.argument("plan", type=PATH)
@click.argument("weights", type=str)
@click.option("-o", "--output", type=PATH, required=True, help="Where to write the plan with the new weights.")
@check_options
@json_option
def refit_command(
    plan: Path,
    weights: str,
    output: Path,
    partial: bool,
    allow_nonfinite: bool,
    allow_rounding: bool,
    rules: Path | None,
    as_json: bool,
) -> None:
    """Write PLAN with other WEIGHTS to OUTPUT; PLAN itself stays as it is unless OUTPUT names it."""
    started = time.perf_counter()
    opened = Plan.load(plan)
    with spinner(f"refitting {plan}", quiet=as_json):
        source = open_renamed(weights, rules)
        refitted = api.refit_plan(opened, source, make_options(partial, allow_nonfinite, allow_rounding))
        refitted.save(output)
    seconds = time.perf_counter() - started
    if as_json:
        emit_json({"plan": str(output), "seconds": seconds, "weight_bytes": opened.weight_bytes})
        return
    say(f"wrote {output}: {human_bytes(opened.weight_bytes)} of weights from {weights} in {seconds:.2f} s")
