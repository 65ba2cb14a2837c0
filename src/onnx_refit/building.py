"""Building a plan: prepare, compile, find the checkpoint's names, specialise for this host."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx

from onnx_refit.engine.registry import DEFAULT_ENGINE, EngineOptions, require_engine, specialised
from onnx_refit.errors import ModelError, UnsupportedModelError, WeightsError
from onnx_refit.model.load import load_model
from onnx_refit.model.order import SortNodes
from onnx_refit.model.passes import Change
from onnx_refit.model.prepare import prepare
from onnx_refit.plan.compile import CompileOptions, compile_model
from onnx_refit.plan.compiled import Decision, Verdict
from onnx_refit.plan.content import model_fingerprint
from onnx_refit.plan.plan import Plan
from onnx_refit.weights.names import Discovery, find_names
from onnx_refit.weights.open import WeightsLike, open_weights
from onnx_refit.weights.source import WeightSource
from onnx_refit.weights.unmerge import Split, unmerge

ModelLike = str | os.PathLike[str] | onnx.ModelProto


@dataclass(frozen=True)
class BuildOptions:
    """What a build may be told beyond model and engine.

    Attributes:
        refittable: names of tensors to make refittable that the rules would leave constant (one-element parameters).
        constant: names of tensors to leave constant that the rules would make refittable.
        prepare: run the preparation passes first (vocabulary extraction, operators that engines lack, ...).
        specialise: specialise for this host now and keep the result in the plan, so that loading is quick.
        engine: options of the engine.
        base_dir: the folder of external data, for a model in memory; a file's own folder is known.
    """

    refittable: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    prepare: bool = True
    specialise: bool = True
    engine: EngineOptions = field(default_factory=EngineOptions)
    base_dir: Path | None = None

    def __post_init__(self) -> None:
        given: tuple[tuple[str, object], ...] = (("refittable", self.refittable), ("constant", self.constant))
        for name, value in given:
            if isinstance(value, str):
                raise ModelError(f"{name} is one string, not a tuple of names", hint=f"Write {name}=({value!r},)")
        both = sorted(set(self.refittable) & set(self.constant))
        if both:
            raise ModelError(f"named both refittable and constant: {', '.join(both)}")


def build(
    model: ModelLike | Any,
    example_inputs: Sequence[Any] | None = None,
    *,
    engine: str = DEFAULT_ENGINE,
    checkpoint: WeightsLike | None = None,
    options: BuildOptions = BuildOptions(),
) -> Plan:
    """Prepare and compile a model.

    Args:
        model: path of an ONNX file, a model in memory (which stays as it is), or a ``torch.nn.Module`` (extra
            ``torch``), which is exported here; refits then take the names of its state dict.
        example_inputs: positional inputs of a module's ``forward``; only for a module.
        engine: which engine the plan is for.
        checkpoint: the checkpoint the model was exported from; the plan then records which checkpoint tensor each
            refittable weight is, and refits take the checkpoint's own names.
        options: see ``BuildOptions``.

    Raises:
        ModelError: the model cannot be read, is not valid, or cannot be prepared.
        EngineError: there is no such engine, or it cannot run the model.
        WeightsError: the checkpoint cannot be read.
    """
    require_engine(engine)
    if example_inputs is not None:
        return _build_module(model, example_inputs, engine, options)
    if not isinstance(model, str | os.PathLike | onnx.ModelProto):
        raise ModelError(
            f"a value of type {type(model).__name__} is no path and no ONNX model",
            hint="For a torch.nn.Module give example_inputs too",
        )
    with _opened(checkpoint) as source, _fingerprinting(model) as fingerprint:
        plan, proto = _compiled(model, engine, source, options)
        if source is not None:
            found = find_names(plan.require_weights(), source, proto)
            if not found.names.entries:
                raise WeightsError(
                    f"none of the {len(plan.refittable)} weights of the model is made of its tensors",
                    where=source.description,
                    hint="Give the very checkpoint that the model was exported from",
                )
            plan = _with_names(plan, found, source.description)
        return replace(_specialised(plan, options), model_fingerprint=fingerprint())


@contextlib.contextmanager
def _fingerprinting(model: ModelLike) -> Iterator[Callable[[], str]]:
    """The model's fingerprint, taken while others work: hashing takes as long as compiling a large model."""
    with ThreadPoolExecutor(1, "onnx-refit-fingerprint") as pool:
        yield pool.submit(model_fingerprint, model).result


@contextlib.contextmanager
def _opened(checkpoint: WeightsLike | None) -> Iterator[WeightSource | None]:
    """A checkpoint, closed afterwards unless it was open before."""
    source = None if checkpoint is None else open_weights(checkpoint)
    try:
        yield source
    finally:
        if source is not None and source is not checkpoint:
            source.close()


def _build_module(module: Any, example_inputs: Sequence[Any], engine: str, options: BuildOptions) -> Plan:
    from onnx_refit.weights.sentinel import export_module

    exported = export_module(module, example_inputs)
    with _fingerprinting(exported.model) as fingerprint:
        plan, _ = _compiled(exported.model, engine, None, options)
        found = replace(exported.discovery, names=exported.discovery.names.restrict(plan.refittable.keys()))
        plan = _specialised(_with_names(plan, found, "the module's state dict"), options)
        return replace(plan, model_fingerprint=fingerprint())


def _compiled(
    model: ModelLike, engine: str, source: WeightSource | None, options: BuildOptions
) -> tuple[Plan, onnx.ModelProto]:
    """The plan without names and fingerprint, not specialised, and the model that was compiled."""
    proto = load_model(model, load_external_data=False)
    base_dir = options.base_dir if isinstance(model, onnx.ModelProto) else Path(model).absolute().parent
    ordered = SortNodes().call(proto)
    proto = ordered.model
    # Before the passes: an exporter that merged equal tensors kept their names in Identity nodes at best.
    proto, splits = unmerge(proto, source, base_dir)
    prepared = prepare(proto, for_engine=engine) if options.prepare else None
    if prepared is not None:
        if prepared.blockers:
            first = prepared.blockers[0]
            raise UnsupportedModelError(
                f"{len(prepared.blockers)} nodes cannot run on {engine}, the first a {first.op_type}: {first.reason}",
                where=f"node {first.node!r}",
                hint="See all with: onnx-refit prepare",
            )
        proto = prepared.model
    compilation = compile_model(
        proto, CompileOptions(refittable=options.refittable, constant=options.constant, base_dir=base_dir)
    )
    plan = Plan(
        engine=engine,
        compiled=compilation.compiled,
        weights=compilation.weights,
        model_fingerprint="",
        preprocessors=() if prepared is None else prepared.preprocessors,
        postprocessors=() if prepared is None else prepared.postprocessors,
    )
    return _with_decisions(plan, [*map(_sort_decision, ordered.changes), *map(_split_decision, splits)]), proto


def _specialised(plan: Plan, options: BuildOptions) -> Plan:
    """The plan with what specialising for this host gave, if that is wanted."""
    if not options.specialise:
        return plan
    artefact = specialised(plan.engine, plan.compiled, weights=plan.weights, options=options.engine)
    return plan if artefact is None else plan.with_artefact(plan.engine, artefact)


def _with_names(plan: Plan, found: Discovery, where: str) -> Plan:
    """The plan with the map from a checkpoint's names, and how each doubtful name was decided."""
    action = f"find it in {where}"
    decisions = [
        *(Decision(tie.weight, action, Verdict.ACCEPTED, str(tie)) for tie in found.ties),
        *(
            Decision(
                name, action, Verdict.REJECTED, "no tensor of the checkpoint gives its bits, by any operation tried"
            )
            for name in found.unmatched
        ),
    ]
    return replace(_with_decisions(plan, decisions), names=found.names)


def _sort_decision(change: Change) -> Decision:
    return Decision(f"graph {change.node!r}", "sort the nodes", Verdict.ACCEPTED, change.why)


def _split_decision(split: Split) -> Decision:
    action = f"give {', '.join(split.copies)} tensors of their own instead of this shared one"
    return Decision(split.name, action, Verdict.ACCEPTED, split.reason)


def _with_decisions(plan: Plan, decisions: Sequence[Decision]) -> Plan:
    compiled = replace(plan.compiled, decisions=(*plan.compiled.decisions, *decisions))
    return replace(plan, compiled=compiled)
