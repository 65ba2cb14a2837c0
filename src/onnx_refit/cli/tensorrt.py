"""``check-tensorrt``: what NVIDIA's own parser says about a model, and which of our rewrites help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from onnx_refit.cli.output import emit_json, json_option, say, spinner, table
from onnx_refit.engine.tensorrt.bindings import find_bindings
from onnx_refit.engine.tensorrt.options import TensorRtOptions
from onnx_refit.engine.tensorrt.profiles import Range, ShapeRange
from onnx_refit.engine.tensorrt.support import ModelVerdict, Support, check_support
from onnx_refit.errors import EngineError
from onnx_refit.model.load import load_model


def parse_named(entries: tuple[str, ...], option: str) -> dict[str, str]:
    """``NAME=VALUE`` entries of an option as a mapping; a usage error for anything else."""
    named = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not name or not equals:
            raise click.UsageError(f"{option} takes NAME=VALUE, not {entry!r}")
        named[name] = value
    return named


def tensorrt_options(shapes: tuple[str, ...], dimensions: tuple[str, ...], workspace: int | None) -> TensorRtOptions:
    """The options of the command line; a usage error where a range cannot be read."""
    try:
        return TensorRtOptions(
            shapes={name: ShapeRange.parse(text) for name, text in parse_named(shapes, "--shape").items()},
            dimensions={name: Range.parse(text) for name, text in parse_named(dimensions, "--dim").items()},
            workspace=None if workspace is None else workspace << 20,
        )
    except EngineError as error:
        raise click.UsageError(str(error)) from error


def profile_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--shape``, ``--dim`` and ``--workspace`` to a command; ``tensorrt_options`` takes their values."""
    for option in (
        click.option(
            "--workspace", type=click.IntRange(min=1), help="MiB that TensorRT's builder may use for a layer."
        ),
        click.option(
            "--dim",
            "dimensions",
            multiple=True,
            metavar="NAME=MIN:OPT:MAX",
            help="Sizes of a dimension for TensorRT, as 1:50:400 (repeatable).",
        ),
        click.option(
            "--shape",
            "shapes",
            multiple=True,
            metavar="INPUT=MIN:OPT:MAX",
            help="Shapes of an input for TensorRT, as 1x16:8x16:64x16 (repeatable).",
        ),
    ):
        command = option(command)
    return command


@click.command("check-tensorrt")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--build", is_flag=True, help="Also build the prepared model (TensorRT-RTX needs no GPU for that).")
@profile_options
@click.option("--package", type=str, help="The module to ask (default: the first of TensorRT and TensorRT-RTX).")
@click.option("--all", "show_all", is_flag=True, help="Also list the nodes that are accepted.")
@json_option
def check_tensorrt_command(
    model: Path,
    build: bool,
    shapes: tuple[str, ...],
    dimensions: tuple[str, ...],
    workspace: int | None,
    package: str | None,
    show_all: bool,
    as_json: bool,
) -> None:
    """Ask NVIDIA's parser what it accepts of MODEL, node by node, before and after our rewrites.

    Exit code 1 if the prepared MODEL is not accepted either.
    """
    options = tensorrt_options(shapes, dimensions, workspace)
    bindings = find_bindings(package)
    with spinner(f"asking {bindings.label}", quiet=as_json):
        support = check_support(bindings, load_model(model), options, build=build)
    if as_json:
        emit_json({"model": str(model), "acceptable": support.acceptable, **asdict(support)})
    else:
        _show(model, support, show_all)
    if not support.acceptable:
        raise click.exceptions.Exit(1)


def _show(model: Path, support: Support, show_all: bool) -> None:
    say(f"{support.package}, {model}")
    _show_verdict("as it is", support.before, show_all)
    if support.changes:
        rows = [(change.node, change.op_type, change.what, change.why) for change in support.changes]
        table(f"{len(rows)} rewrites", ["node", "operator", "what", "why"], rows)
        _show_verdict("prepared", support.after, show_all)
    if support.blockers:
        table("still in the way", ["node", "operator", "reason"], support.blockers)
    if support.built is not None:
        say("built ahead of time, without refittable weights" if support.built else f"not built: {support.build_error}")
    say("acceptable" if support.acceptable else "not acceptable")


def _show_verdict(what: str, verdict: ModelVerdict, show_all: bool) -> None:
    count = len(verdict.nodes)
    say(
        f"{what}: {count - len(verdict.refused)} of {count} nodes accepted, {'parses' if verdict.parses else 'refused'}"
    )
    listed = verdict.nodes if show_all else verdict.refused
    if listed:
        rows = [(node.name, node.op_type, "yes" if node.accepted else "no", node.reason) for node in listed]
        table("nodes", ["node", "operator", "accepted", "reason"], rows)
    for problem in verdict.problems:
        say(f"  {problem}")
