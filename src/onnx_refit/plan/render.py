"""A plan as data for machines and as a summary for notebooks."""

from __future__ import annotations

import html
from typing import Any

from onnx_refit.plan.content import PlanContent
from onnx_refit.tensors import TensorSpec


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": None if spec.shape is None else list(spec.shape)}


def dependents(plan: PlanContent) -> dict[str, list[str]]:
    """Source weight -> the engine weights computed from it, in the plan's order."""
    found: dict[str, list[str]] = {source.spec.name: [] for source in plan.compiled.sources}
    for spec in plan.compiled.engine_weights:
        for source in sorted(plan.compiled.program.dependencies.get(spec.name, ())):
            found.setdefault(source, []).append(spec.name)
    return found


def describe_plan(plan: PlanContent) -> dict[str, Any]:
    """What the plan is, as JSON-able data."""
    reads = dependents(plan)
    return {
        "engine": plan.engine,
        "fingerprint": plan.fingerprint,
        "model_fingerprint": plan.model_fingerprint,
        "stripped": plan.stripped,
        "inputs": [_spec(spec) for spec in plan.inputs],
        "outputs": [_spec(spec) for spec in plan.outputs],
        "preprocessors": [
            {"input": v.input, "output": v.output, "node": v.node, "entries": len(v)} for v in plan.preprocessors
        ],
        "weight_bytes": plan.weight_bytes,
        "weights": [
            {
                **_spec(source.spec),
                "bytes": source.spec.nbytes,
                "origin": source.origin,
                "uses": list(source.uses),
                "engine_weights": reads[source.spec.name],
            }
            for source in plan.compiled.sources
        ],
        "decisions": [
            {"subject": d.subject, "action": d.action, "verdict": d.verdict.value, "reason": d.reason}
            for d in plan.compiled.decisions
        ],
        "artefacts": {engine: len(data) for engine, data in plan.artefacts.items()},
    }


def plan_html(plan: PlanContent, rows: int = 20) -> str:
    """A short HTML table of the plan."""
    shown = plan.compiled.sources[:rows]
    body = "".join(
        f"<tr><td>{html.escape(s.spec.name)}</td><td>{s.spec.dtype}</td><td>{list(s.spec.shape or ())}</td>"
        f"<td style='text-align:right'>{s.spec.nbytes:,}</td></tr>"
        for s in shown
    )
    more = len(plan.compiled.sources) - len(shown)
    tail = f"<tr><td colspan=4>and {more} more</td></tr>" if more > 0 else ""
    weights = "stripped" if plan.stripped else f"{plan.weight_bytes / 1e6:.2f} MB"
    return (
        f"<b>plan</b> for {html.escape(plan.engine)}: {len(plan.compiled.sources)} refittable weights ({weights})"
        f"<table><tr><th>weight</th><th>dtype</th><th>shape</th><th>bytes</th></tr>{body}{tail}</table>"
    )
