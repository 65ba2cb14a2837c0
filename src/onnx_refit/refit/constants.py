"""Tensors of a checkpoint that the plan holds as constants: equal ones are no news, others must not be ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from onnx import numpy_helper

from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.refit.check_report import CheckReport, Rejected, RejectReason
from onnx_refit.tensors import Array, dtype_name, is_floating, spec_of
from onnx_refit.weights.scan import same_bits
from onnx_refit.weights.source import WeightSource


def floating_constants(compiled: CompiledModel) -> Mapping[str, Array]:
    """The floating-point tensors of the main graph that are not refittable, by name."""
    found = {}
    for tensor in compiled.activation.graph.initializer:
        array: Array = numpy_helper.to_array(tensor)
        if is_floating(dtype_name(array.dtype)):
            found[tensor.name] = array
    return found


def refuse_changed_constants(report: CheckReport, given: WeightSource, constants: Mapping[str, Array]) -> CheckReport:
    """The report, with every constant refused that the checkpoint gives another value.

    Such a value cannot be applied: a one-element parameter, say, that was not named refittable when the plan was
    built. To ignore it would give wrong answers in silence.
    """
    refused = []
    for unused in report.unused:
        constant = constants.get(unused.name)
        if constant is None or given.specs.get(unused.name) != spec_of(unused.name, constant):
            continue
        if not same_bits(given.read(unused.name), constant):
            text = "it is constant in this plan and has another value here; name it refittable when building the plan"
            spec = spec_of(unused.name, constant)
            refused.append(Rejected(unused.name, (unused.name,), RejectReason.CONSTANT, text, spec))
    if not refused:
        return report
    names = {one.name for one in refused}
    left = tuple(unused for unused in report.unused if unused.name not in names)
    return replace(report, rejected=(*report.rejected, *refused), unused=left)
