"""``prepare``, ``build`` and ``inspect``: from a model to a plan."""

from __future__ import annotations

import re
import time
from pathlib import Path

import click

from onnx_refit import api
from onnx_refit.cli.output import (
    counted,
    emit_json,
    human_bytes,
    json_option,
    refuse_overwrite,
    say,
    shape_text,
    spinner,
    table,
)
from onnx_refit.engine.registry import DEFAULT_ENGINE, engine_names
from onnx_refit.files import write_bytes
from onnx_refit.model.load import load_model
from onnx_refit.model.prepare import prepare
from onnx_refit.plan.plan import Plan
from onnx_refit.plan.render import dependents

PATH = click.Path(path_type=Path)


@click.command("prepare")
@click.argument("model", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Where to write the prepared model.")
@click.option(
    "--for", "engine", type=click.Choice(engine_names()), default=DEFAULT_ENGINE, show_default=True, help="The engine."
)
@json_option
def prepare_command(model: Path, output: Path, engine: str, as_json: bool) -> None:
    """Rewrite MODEL until the engine can run it; vocabularies become JSON files beside OUTPUT."""
    refuse_overwrite(output, model)
    prepared = prepare(load_model(model), for_engine=engine)
    vocabularies: list[str] = []
    for vocabulary in prepared.preprocessors:
        # Names come from the model: they must not choose the folder.
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", vocabulary.node or vocabulary.input).lstrip(".") or "vocabulary"
        path = output.parent / f"{stem}.json"
        while str(path) in vocabularies:
            path = path.with_stem(path.stem + "_")
        vocabulary.save(path)
        vocabularies.append(str(path))
    write_bytes(output, prepared.model.SerializeToString())
    changes = [(step.name, change) for step, result in prepared.results for change in result.changes]
    if as_json:
        emit_json(
            {
                "model": str(output),
                "vocabularies": vocabularies,
                "changes": [{"pass": name, **vars(change)} for name, change in changes],
                "blockers": [vars(blocker) for blocker in prepared.blockers],
            }
        )
        return
    if changes:
        rows = [(name, change.node, change.op_type, change.what, change.why) for name, change in changes]
        table(counted(len(changes), "change"), ["pass", "node", "operator", "what", "why"], rows)
    if prepared.blockers:
        blocked = [(b.node, b.op_type, b.reason) for b in prepared.blockers]
        table(f"{len(blocked)} nodes left as they are", ["node", "operator", "reason"], blocked)
    say(f"wrote {output}" + (f" and {len(vocabularies)} vocabularies" if vocabularies else ""))


@click.command("build")
@click.argument("model", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Where to write the plan.")
@click.option("--engine", type=click.Choice(engine_names()), default=DEFAULT_ENGINE, show_default=True)
@click.option("--checkpoint", type=str, help="The checkpoint MODEL was exported from: refits then take its names.")
@click.option("--refittable", multiple=True, help="A tensor to make refittable that would stay constant (repeatable).")
@click.option("--constant", multiple=True, help="A tensor to keep constant (repeatable).")
@click.option("--strip", is_flag=True, help="Leave the weights out of the plan.")
@click.option("--portable", is_flag=True, help="Leave what is for this machine to the one that loads the plan.")
@json_option
def build_command(
    model: Path,
    output: Path,
    engine: str,
    checkpoint: str | None,
    refittable: tuple[str, ...],
    constant: tuple[str, ...],
    strip: bool,
    portable: bool,
    as_json: bool,
) -> None:
    """Compile MODEL into a plan: one file, ready to load and to refit."""
    refuse_overwrite(output, model, *([] if checkpoint is None else [Path(checkpoint)]))
    started = time.perf_counter()
    with spinner(f"compiling {model}", quiet=as_json):
        options = api.BuildOptions(refittable=refittable, constant=constant, specialise=not portable)
        plan = api.build(model, engine=engine, checkpoint=checkpoint, options=options)
    plan.save(output, strip=strip)
    seconds = time.perf_counter() - started
    if as_json:
        emit_json({"plan": str(output), "seconds": seconds, "bytes": output.stat().st_size, **plan.describe()})
        return
    if plan.names is not None and plan.names.unmatched:
        shown = ", ".join(plan.names.unmatched[:5])
        count = counted(len(plan.names.unmatched), "weight is", "weights are")
        say(
            f"{count} not made of the checkpoint's tensors: {shown}. Later checkpoints "
            "will be refused for lacking them, unless you keep them constant with --constant NAME"
        )
    weights = f"{counted(len(plan.refittable), 'refittable weight')}, {human_bytes(plan.weight_bytes)}"
    say(f"wrote {output}: {weights}{' (left out)' if strip else ''}, built in {seconds:.2f} s")


@click.command("inspect")
@click.argument("plan", type=PATH)
@click.option("--decisions", is_flag=True, help="Also list what the compiler decided, with reasons.")
@json_option
def inspect_command(plan: Path, decisions: bool, as_json: bool) -> None:
    """Show a plan: inputs, outputs, every refittable weight and what depends on it."""
    opened = Plan.load(plan)
    if as_json:
        emit_json(opened.describe())
        return
    say(f"{plan}: a plan for the engine {opened.engine}, fingerprint {opened.fingerprint[:16]}")
    say(f"built from the model with fingerprint {opened.model_fingerprint[:16]}")
    strings = {vocabulary.output: vocabulary for vocabulary in opened.preprocessors}
    rows = [
        (
            "input",
            spec.name,
            spec.dtype,
            shape_text(spec.shape),
            f"from strings {strings[spec.name].input!r}, {len(strings[spec.name])} entries"
            if spec.name in strings
            else "",
        )
        for spec in opened.inputs
    ]
    rows += [("output", spec.name, spec.dtype, shape_text(spec.shape), "") for spec in opened.outputs]
    table("inputs and outputs", ["", "name", "dtype", "shape", ""], rows)
    reads = dependents(opened)
    weights = [
        (
            source.spec.name,
            source.spec.dtype,
            shape_text(source.spec.shape),
            human_bytes(source.spec.nbytes),
            "; ".join(source.uses),
            ", ".join(reads[source.spec.name]),
        )
        for source in opened.compiled.sources
    ]
    held = "left out" if opened.stripped else "held"
    table(
        f"{counted(len(weights), 'refittable weight')}, {human_bytes(opened.weight_bytes)}, {held}",
        ["weight", "dtype", "shape", "bytes", "read by", "engine weights"],
        weights,
        right=(3,),
    )
    if decisions:
        made = [(d.verdict.value, d.subject, d.action, d.reason) for d in opened.compiled.decisions]
        table(counted(len(made), "decision"), ["verdict", "subject", "action", "reason"], made)
