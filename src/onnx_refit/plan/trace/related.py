"""Weights that optimisers expect to be computed from others: the scale of a quantised bias.

ONNX Runtime takes its quantised kernels only where that scale is the product of two others. It must be one in coded
and random weights too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from onnx import NodeProto

from onnx_refit.model.graph import all_graphs
from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.plan.evaluate import evaluate, select
from onnx_refit.tensors import Array, TensorSpec


@dataclass(frozen=True)
class Related:
    """Weights computed from other weights of the same graph.

    Attributes:
        names: the weights computed.
        reads: what they are computed from.
        compute: values of ``reads``, shaped -> values of ``names``, shaped.
    """

    names: frozenset[str]
    reads: tuple[TensorSpec, ...]
    compute: Callable[[Mapping[str, Array]], Mapping[str, Array]]


def bias_scales(compiled: CompiledModel) -> Related | None:
    """The engine weights that are scales of quantised biases and computed from other engine weights, if any."""
    program = compiled.program
    specs = {spec.name: spec for spec in compiled.engine_weights}
    places = {source: name for name, source in program.passthrough.items()}
    uses: dict[str, list[tuple[NodeProto, int]]] = {}
    for graph in all_graphs(compiled.activation.graph):
        for node in graph.node:
            for index, name in enumerate(node.input):
                uses.setdefault(name, []).append((node, index))
    found = {
        name: sources
        for name, sources in program.dependencies.items()
        if name not in program.passthrough
        and all(source in places for source in sources)
        and all(_scales_bias(node, index, specs) for node, index in uses.get(name, ()))
    }
    if not found:
        return None
    needed = sorted(frozenset().union(*found.values()))
    part = select(program, found)

    def compute(values: Mapping[str, Array]) -> Mapping[str, Array]:
        return evaluate(part, {source: values[places[source]] for source in needed})

    return Related(frozenset(found), tuple(specs[places[source]] for source in needed), compute)


def _scales_bias(node: NodeProto, index: int, specs: Mapping[str, TensorSpec]) -> bool:
    data = specs.get(node.input[0])
    return node.op_type == "DequantizeLinear" and index == 1 and data is not None and data.dtype == "int32"
