"""Step two of the sample: an engine from the modified model, or from the plan that an earlier run has saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from onnx import ModelProto

from onnx_refit.api import build
from onnx_refit.errors import ModelError, PlanError, PlanMismatchError
from onnx_refit.model.load import load_model
from onnx_refit.model.vocabulary import VocabularyMap
from onnx_refit.plan.content import model_fingerprint
from onnx_refit.plan.plan import Plan
from onnx_refit.samples.bidaf.answering import Say
from onnx_refit.samples.bidaf.prepare import load_maps
from onnx_refit.samples.bidaf.vocabulary import CONTEXT_CHAR, CONTEXT_WORD, QUERY_CHAR, QUERY_WORD
from onnx_refit.tensors import spec_of_value_info

PLAN = "bidaf.plan"

_INPUTS = frozenset({CONTEXT_WORD, CONTEXT_CHAR, QUERY_WORD, QUERY_CHAR})


def get_plan(
    model_path: Path, plan_path: Path, say: Say, *, engine: str = "onnxruntime", rebuild: bool = False
) -> Plan:
    """Read the saved plan of a model, or build and save it.

    Args:
        model_path: the modified model, with its vocabulary files beside it.
        plan_path: where the plan is, or will be.
        say: takes the lines of the sample.
        engine: the engine to build for.
        rebuild: build even if there is a plan, whatever its state.

    Raises:
        ModelError: the model or a vocabulary is missing or cannot be used.
        PlanError: the plan there is damaged, of another format version, or of another model, vocabulary or engine.
    """
    if rebuild or not plan_path.exists():
        return _build(model_path, plan_path, say, engine)
    say(f"Reading engine from file {plan_path}")
    try:
        plan = Plan.load(plan_path)
        plan.require_model(model_fingerprint(model_path))
        model = load_model(model_path)
        _require_same(plan, engine, _maps_of(model, model_path), plan_path)
    except PlanError as error:
        if error.hint is None or "rebuild" not in error.hint:
            error.hint = ". ".join(filter(None, (error.hint, "Use --rebuild to build it anew")))
        raise
    return plan


def _require_same(plan: Plan, engine: str, maps: tuple[VocabularyMap, ...], path: Path) -> None:
    if plan.engine != engine:
        raise PlanMismatchError(f"it was built for the engine {plan.engine}, not for {engine}", where=path)
    if plan.preprocessors != maps:
        raise PlanMismatchError("it holds other vocabularies than the files beside the model", where=path)


def _maps_of(model: ModelProto, path: Path) -> tuple[VocabularyMap, ...]:
    maps = load_maps(model, path.parent)
    covered = {one.input for one in maps}
    if covered != _INPUTS:
        missing = ", ".join(sorted(_INPUTS - covered))
        raise ModelError(
            f"no vocabulary file beside the model feeds {missing}",
            where=path,
            hint="Prepare the model first; keep the JSON files that this writes beside it",
        )
    return maps


def _build(model_path: Path, plan_path: Path, say: Say, engine: str) -> Plan:
    say(f"Loading ONNX file from path {model_path}...")
    say("Beginning ONNX file parsing")
    model = load_model(model_path)
    maps = _maps_of(model, model_path)
    say("Completed parsing of ONNX file")
    say("Network inputs:")
    for line in input_lines(model):
        say(line)
    say(f"Building an engine from file {model_path}; this may take a while...")
    plan = replace(build(model_path, engine=engine), preprocessors=maps)
    say("Completed creating Engine")
    plan.save(plan_path)
    return plan


def input_lines(model: ModelProto) -> list[str]:
    """Name, dtype and shape of each input, -1 for a dynamic dimension."""
    weights = {tensor.name for tensor in model.graph.initializer}
    lines = []
    for value in model.graph.input:
        if value.name not in weights:
            spec = spec_of_value_info(value)
            sizes = "?" if spec.shape is None else ", ".join(str(d if isinstance(d, int) else -1) for d in spec.shape)
            lines.append(f"{spec.name} {spec.dtype} ({sizes})")
    return lines
