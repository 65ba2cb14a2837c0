"""Small graphs for the tests of the passes, and the comparison of a model with what a pass made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnx_refit.model.passes import Pass, PassResult
from onnx_refit.model.prepare import Prepared
from onnx_refit.model.verify import verify_equivalent
from onnx_refit.tensors import Array

CODES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "float64": TensorProto.DOUBLE,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "int16": TensorProto.INT16,
    "bool": TensorProto.BOOL,
    "string": TensorProto.STRING,
}

Declared = Mapping[str, tuple[str, Any]]
"""Name -> dtype and shape (a sequence of numbers and names, or None)."""


def values(declared: Declared):
    return [helper.make_tensor_value_info(name, CODES[dtype], shape) for name, (dtype, shape) in declared.items()]


def graph(
    nodes: Sequence[NodeProto], inputs: Declared, outputs: Declared, weights: Mapping[str, Array] | None = None
) -> GraphProto:
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()]
    return helper.make_graph(list(nodes), "g", values(inputs), values(outputs), tensors)


def model(
    nodes: Sequence[NodeProto],
    inputs: Declared,
    outputs: Declared,
    weights: Mapping[str, Array] | None = None,
    *,
    opset: int = 13,
    ml: int | None = None,
) -> ModelProto:
    imports = [helper.make_opsetid("", opset)]
    if ml is not None:
        imports.append(helper.make_opsetid("ai.onnx.ml", ml))
    return helper.make_model(graph(nodes, inputs, outputs, weights), opset_imports=imports, ir_version=8)


def node(op_type: str, inputs: Sequence[str], outputs: Sequence[str], **attributes) -> NodeProto:
    return helper.make_node(op_type, list(inputs), list(outputs), **attributes)


def strings(*elements: str, shape: Sequence[int] | None = None) -> Array:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array if shape is None else array.reshape(shape)


def operators(graph_or_model: ModelProto | GraphProto) -> list[str]:
    one = graph_or_model.graph if isinstance(graph_or_model, ModelProto) else graph_or_model
    return [item.op_type for item in one.node]


def apply(step: Pass, original: ModelProto, *cases: Mapping[str, Array]) -> PassResult:
    """Run one pass, check that it left its argument alone, and compare outputs on the given inputs."""
    before = original.SerializeToString()
    result = step.call(original)
    assert original.SerializeToString() == before, "the pass changed its argument"
    assert step.ensures(result.model) is None
    prepared = Prepared(result.model, ((step, result),), result.preprocessors, result.postprocessors)
    if cases:
        verify_equivalent(original, prepared, cases, rtol=0.0, atol=0.0)
    return result
