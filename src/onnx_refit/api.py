"""The public face: build a plan, load an engine, check weights, refit a plan file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx

from onnx_refit.engine.registry import DEFAULT_ENGINE, EngineOptions, create_backend, require_engine
from onnx_refit.errors import UnsupportedModelError
from onnx_refit.model.load import load_model
from onnx_refit.model.prepare import prepare
from onnx_refit.plan.compile import CompileOptions, compile_model
from onnx_refit.plan.compiled import Decision, Verdict
from onnx_refit.plan.plan import Plan, model_fingerprint
from onnx_refit.refit.check import CheckOptions, CheckReport
from onnx_refit.refit.check import check as check_weights
from onnx_refit.refit.ledger import StoreLedger
from onnx_refit.refit.live import Engine
from onnx_refit.tensors import Array
from onnx_refit.weights.names import find_names
from onnx_refit.weights.open import WeightsLike, open_weights
from onnx_refit.weights.source import WeightSource
from onnx_refit.weights.unmerge import Split, unmerge

ModelLike = str | os.PathLike[str] | onnx.ModelProto
PlanLike = str | os.PathLike[str] | Plan


@dataclass(frozen=True)
class BuildOptions:
    """What a build may be told beyond model and engine.

    Attributes:
        refittable: names of tensors to make refittable that the rules would leave constant (one-element parameters).
        constant: names of tensors to leave constant that the rules would make refittable.
        prepare: run the preparation passes first (vocabulary extraction, operators that engines lack, ...).
        specialise: specialise for this host now and keep the result in the plan, so that loading is quick.
        engine: options of the engine.
    """

    refittable: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    prepare: bool = True
    specialise: bool = True
    engine: EngineOptions = field(default_factory=EngineOptions)


def build(
    model: ModelLike,
    *,
    engine: str = DEFAULT_ENGINE,
    checkpoint: WeightsLike | None = None,
    options: BuildOptions = BuildOptions(),
) -> Plan:
    """Prepare and compile a model.

    Args:
        model: path of an ONNX file, or a model in memory (which stays as it is).
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
    with _opened(checkpoint) as source:
        return _build(model, engine, source, options)


@contextlib.contextmanager
def _opened(checkpoint: WeightsLike | None) -> Iterator[WeightSource | None]:
    """A checkpoint, closed afterwards unless it was open before."""
    source = None if checkpoint is None else open_weights(checkpoint)
    try:
        yield source
    finally:
        if source is not None and source is not checkpoint:
            source.close()


def _build(model: ModelLike, engine: str, source: WeightSource | None, options: BuildOptions) -> Plan:
    proto = load_model(model, load_external_data=False)
    base_dir = None if isinstance(model, onnx.ModelProto) else Path(model).absolute().parent
    fingerprint = model_fingerprint(model)
    # Before anything else: an exporter that merged equal tensors kept their names in Identity nodes at best.
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
        model_fingerprint=fingerprint,
        preprocessors=() if prepared is None else prepared.preprocessors,
        postprocessors=() if prepared is None else prepared.postprocessors,
    )
    if splits:
        plan = _with_decisions(plan, [_split_decision(split) for split in splits])
    if source is not None:
        plan = _with_names(plan, source, proto)
    if options.specialise:
        backend, artefact = create_backend(
            engine, compilation.compiled, weights=compilation.weights, options=options.engine
        )
        backend.close()
        if artefact is not None:
            plan = plan.with_artefact(engine, artefact)
    return plan


def _with_names(plan: Plan, source: WeightSource, model: onnx.ModelProto) -> Plan:
    """The plan with the map from a checkpoint's names, and how each doubtful name was decided."""
    found = find_names(plan.require_weights(), source, model)
    action = f"find it in {source.description}"
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


def _split_decision(split: Split) -> Decision:
    action = f"give {', '.join(split.copies)} tensors of their own instead of this shared one"
    return Decision(split.name, action, Verdict.ACCEPTED, split.reason)


def _with_decisions(plan: Plan, decisions: Sequence[Decision]) -> Plan:
    compiled = replace(plan.compiled, decisions=(*plan.compiled.decisions, *decisions))
    return replace(plan, compiled=compiled)


def load(
    plan: PlanLike,
    *,
    weights: WeightsLike | None = None,
    store: str | os.PathLike[str] | None = None,
    keep: int = 2,
    options: EngineOptions = EngineOptions(),  # noqa: B008 - frozen
) -> Engine:
    """Load a plan onto its engine, ready to run.

    Args:
        plan: path of a plan file, or a plan.
        weights: the weights to start with; None takes those in the plan. Must be complete for a stripped plan.
        store: directory of a version store (made if it does not exist). Commits and rollbacks are written there,
            durably, before they are published; loading again with the same store starts at the version that was
            current, whatever ended the process. Its versions win over the plan's weights and over ``weights``.
        keep: how many versions to hold for rollback and ``run(version=…)``, the current one included.
        options: options of the engine.

    Raises:
        PlanError: the file is not a plan, is damaged, or is stripped and no weights were given.
        RefitRejectedError: the weights given do not fit; the report says why.
        EngineError: the engine cannot run here.
        StoreLockedError: another process, or another engine, has the store open.
        StoreError: the store cannot be written, is damaged, or belongs to another plan.
    """
    opened = plan if isinstance(plan, Plan) else Plan.load(plan)
    ledger = None if store is None else StoreLedger(store, opened.fingerprint)
    try:
        stored = None if ledger is None else ledger.current()
        first, description = _first_weights(opened, weights, stored)
        backend, _ = create_backend(
            opened.engine,
            opened.compiled,
            weights=first,
            options=options,
            artefact=opened.artefacts.get(opened.engine),
        )
        try:
            return Engine(opened, backend, first, source=description, keep=keep, ledger=ledger)
        except BaseException:
            backend.close()
            raise
    except BaseException:
        if ledger is not None:
            ledger.close()
        raise


def _first_weights(
    plan: Plan, weights: WeightsLike | None, stored: WeightSource | None
) -> tuple[Mapping[str, Array], str]:
    """The weights an engine starts with, and where they are from."""
    if stored is not None:
        # They were checked when they were committed; NaN may have been allowed then.
        return accepted_weights(plan, stored, CheckOptions(allow_nonfinite=True)), stored.description
    if weights is not None:
        return accepted_weights(plan, weights), "the weights given at load"
    return plan.require_weights(), "plan" if plan.path is None else str(plan.path)


def check(plan: PlanLike, weights: WeightsLike, options: CheckOptions | None = None) -> CheckReport:
    """Check weights against a plan without refitting anything.

    Raises:
        PlanError: the plan cannot be read.
        WeightsError: the weights cannot be read.
    """
    return _checked(plan if isinstance(plan, Plan) else Plan.load(plan), weights, options)[0]


def accepted_weights(plan: Plan, weights: WeightsLike, options: CheckOptions | None = None) -> dict[str, Array]:
    """Weights in the plan's names, dtypes and shapes, complete.

    With ``CheckOptions(partial=True)`` those not given come from the plan.

    Raises:
        RefitRejectedError: the check refused; it carries the report.
        PlanError: weights are missing and the plan is stripped.
    """
    report, arrays = _checked(plan, weights, options)
    report.raise_if_rejected()
    if len(arrays) < len(plan.compiled.sources):
        arrays = {**plan.require_weights(), **arrays}
    return arrays


def refit_plan(plan: PlanLike, weights: WeightsLike, options: CheckOptions | None = None) -> Plan:
    """A plan with other weights, to save beside or over the old one; raises as ``accepted_weights``."""
    opened = plan if isinstance(plan, Plan) else Plan.load(plan)
    return opened.with_weights(accepted_weights(opened, weights, options))


def _checked(plan: Plan, weights: WeightsLike, options: CheckOptions | None) -> tuple[CheckReport, dict[str, Array]]:
    source = open_weights(weights)
    view = source if plan.names is None else plan.names.apply(source)
    held = plan.weights
    current = None if held is None else held.__getitem__
    return check_weights(plan.compiled.sources, view, current=current, options=options or CheckOptions())


__all__: Sequence[str] = (
    "BuildOptions",
    "EngineOptions",
    "accepted_weights",
    "build",
    "check",
    "load",
    "refit_plan",
)
