"""Tensors of a checkpoint that the plan holds as constants or computes: equal ones are no news, others are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from onnx import numpy_helper

from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.plan.folds.quantised import is_product
from onnx_refit.refit.check_report import CheckReport, Rejected, RejectReason
from onnx_refit.tensors import Array, dtype_name, is_floating, spec_of
from onnx_refit.weights.scan import same_bits
from onnx_refit.weights.source import WeightSource


@dataclass(frozen=True)
class Fixed:
    """What a checkpoint may repeat and cannot change.

    Attributes:
        constants: the floating-point tensors of the main graph that are not refittable, by name.
        derived: tensor that is computed from two others -> those two, source weights or constants.
    """

    constants: Mapping[str, Array]
    derived: Mapping[str, tuple[str, str]]


def floating_constants(compiled: CompiledModel) -> Fixed:
    """What is fixed in a plan."""
    found = {}
    for tensor in compiled.activation.graph.initializer:
        array: Array = numpy_helper.to_array(tensor)
        if is_floating(dtype_name(array.dtype)):
            found[tensor.name] = array
    return Fixed(found, compiled.derived)


def refuse_changed_constants(report: CheckReport, given: WeightSource, fixed: Fixed) -> CheckReport:
    """The report, with everything refused that the checkpoint gives and that is otherwise in the plan.

    Such a value cannot be applied: a one-element parameter, say, that was not named refittable when the plan was
    built, or a bias scale that is not the product of the two scales that it is computed from. To ignore it would give
    wrong answers in silence.
    """
    refused = []
    for unused in report.unused:
        spec = given.specs.get(unused.name)
        text = None if spec is None else _contradiction(unused.name, given, fixed)
        if spec is not None and text is not None:
            refused.append(Rejected(unused.name, (unused.name,), RejectReason.CONSTANT, text, spec))
    if not refused:
        return report
    names = {one.name for one in refused}
    left = tuple(unused for unused in report.unused if unused.name not in names)
    return replace(report, rejected=(*report.rejected, *refused), unused=left)


def _contradiction(name: str, given: WeightSource, fixed: Fixed) -> str | None:
    """Why the checkpoint's tensor cannot be ignored; None where it says what the plan says."""
    constant = fixed.constants.get(name)
    if constant is not None and given.specs[name] == spec_of(name, constant):
        if same_bits(given.read(name), constant):
            return None
        return "it is constant in this plan and has another value here; name it refittable when building the plan"
    factors = fixed.derived.get(name)
    if factors is None:
        return None
    found = [
        fixed.constants[factor] if factor in fixed.constants else given.read(factor)
        for factor in factors
        if factor in fixed.constants or factor in given.specs
    ]
    text = f"this plan computes it as {factors[0]!r} times {factors[1]!r}"
    if len(found) < len(factors):
        return f"{text}, and they are not given with it"
    return None if is_product(given.read(name), *found) else f"{text}, and here it is not their product"
