"""The public face: load an engine, check weights, refit a plan; ``building`` has the way to a plan."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from onnx_refit.building import BuildOptions, build
from onnx_refit.engine.registry import EngineOptions, create_backend
from onnx_refit.errors import PlanError
from onnx_refit.plan.plan import Plan
from onnx_refit.refit.check import CheckOptions
from onnx_refit.refit.check import check as check_weights
from onnx_refit.refit.check_report import CheckReport
from onnx_refit.refit.constants import floating_constants, refuse_changed_constants
from onnx_refit.refit.ledger import StoreLedger
from onnx_refit.refit.live import NOTHING_TO_REFIT, Engine
from onnx_refit.tensors import Array
from onnx_refit.weights.mapped_view import MappedView
from onnx_refit.weights.open import WeightsLike, open_weights
from onnx_refit.weights.store import StoredVersion

PlanLike = str | os.PathLike[str] | Plan


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
            return Engine(
                opened, backend, first, source=description, keep=keep, ledger=ledger, cold=options.cold == "disk"
            )
        except BaseException:
            backend.close()
            raise
    except BaseException:
        if ledger is not None:
            ledger.close()
        raise


def _first_weights(
    plan: Plan, weights: WeightsLike | None, stored: StoredVersion | None
) -> tuple[Mapping[str, Array], str]:
    """The weights an engine starts with, and where they are from."""
    if stored is not None:
        # They were checked when they were committed, and have the model's own names.
        return stored.read_many(source.spec.name for source in plan.compiled.sources), stored.description
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
    if not plan.refittable:
        raise PlanError("the plan has no refittable weights", where=plan.path, hint=NOTHING_TO_REFIT)
    source = open_weights(weights)
    view = source if plan.names is None else MappedView(source, plan.names)
    held = plan.weights
    current = None if held is None else held.__getitem__
    report, arrays = check_weights(plan.compiled.sources, view, current=current, options=options or CheckOptions())
    report = refuse_changed_constants(report, view, floating_constants(plan.compiled))
    return report, arrays if report.ok else {}


__all__: Sequence[str] = (
    "BuildOptions",
    "EngineOptions",
    "accepted_weights",
    "build",
    "check",
    "load",
    "refit_plan",
)
