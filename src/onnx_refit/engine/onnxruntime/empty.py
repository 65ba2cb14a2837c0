"""Answers requests in which a blocked matrix product has no rows: its convolution refuses them, a matrix product not.

An empty batch gives such a product, and so does a model that selects rows, from any input. Nobody looks for it before
a request: the convolution's refusal tells, and the request then runs on a graph that computes the same from the same
weights with plain products. Slower, and rarely asked for, so its session is made when first needed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import GraphProto, NodeProto, helper, numpy_helper

from onnx_refit.engine.onnxruntime.buffers import Buffer
from onnx_refit.engine.onnxruntime.native import NCHWC_DOMAIN, make_session, session_options
from onnx_refit.engine.onnxruntime.nchwc import NODE_PREFIX
from onnx_refit.engine.onnxruntime.weightset import Runner
from onnx_refit.errors import EngineError
from onnx_refit.model.graph import Names, all_graphs, attribute, opset, set_attribute
from onnx_refit.tensors import Array

_PRODUCT = NODE_PREFIX + "Conv"
_RESHAPE = NODE_PREFIX + "Reshape"


class EmptyProducts:
    """Runs what the blocked products of a graph refuse. Thread-safe.

    Args:
        model: the graph with blocked products, serialised; its weights are graph inputs.
        weights: those inputs.
        outputs: the model's outputs.
        block: the host's block size.
        threads: intra-op threads.
    """

    def __init__(self, model: bytes, weights: frozenset[str], outputs: Sequence[str], block: int, threads: int) -> None:
        self._model = model
        self._weights = weights
        self._outputs = tuple(outputs)
        self._block = block
        self._threads = threads
        self._lock = threading.Lock()
        self._session: ort.InferenceSession | None = None

    def concerns(self, error: EngineError) -> bool:
        """Whether a request failed in a blocked product, so that it is worth running here."""
        return _PRODUCT in str(error)

    def run(self, buffers: Mapping[str, Buffer], inputs: Mapping[str, Array]) -> list[Array]:
        """Run one inference with these weights; EngineError where ONNX Runtime fails here too."""
        with self._lock:
            if self._session is None:
                plain = plain_products(onnx.ModelProto.FromString(self._model), self._block)
                self._session = make_session(plain, session_options(self._threads, spinning=False))
        weights = {name: buffers[name] for name in self._weights}
        return Runner(self._session, weights, self._outputs).run(inputs)


def plain_products(model: onnx.ModelProto, block: int) -> onnx.ModelProto:
    """A graph that ``nchwc.rewrite`` made with each blocked product as a plain one of the same blocked weight."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in changed.graph.input
        if value.type.tensor_type.HasField("shape")
    }
    constants = {tensor.name for tensor in changed.graph.initializer}
    names = Names.of(changed.graph)
    version = opset(changed) or 1
    for graph in all_graphs(changed.graph):
        nodes: list[NodeProto] = []
        for node in graph.node:
            if node.domain == NCHWC_DOMAIN and node.name.startswith(_PRODUCT):
                nodes += _product(node, shapes[node.input[1]], block, names)
            elif node.name.startswith(_RESHAPE) and not node.domain and node.input[1] not in constants:
                nodes += _reshape(node, version, names)
            else:
                nodes.append(node)
        copies = [_copy(node) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)
    return changed


def _product(node: NodeProto, shape: Sequence[int], block: int, names: Names) -> Iterator[NodeProto]:
    """``node``, a convolution over a weight of this shape, as a product of its input written plain."""
    columns, rows = shape[:2]
    split, matrix = _ints(names, columns // block, rows, block), _ints(names, rows, columns)
    yield from (split, matrix)
    blocks = _node(names, "Reshape", [node.input[1], split.output[0]])
    turned = _node(names, "Transpose", [blocks.output[0]], perm=[1, 0, 2])
    weight = _node(names, "Reshape", [turned.output[0], matrix.output[0]])
    plain = _node(names, "ReorderOutput", [node.input[0]], NCHWC_DOMAIN, channels=rows, channels_last=1)
    last = _node(names, "MatMul", [plain.output[0], weight.output[0]])
    yield from (blocks, turned, weight, plain, last)
    if len(node.input) > 2:
        last = _node(names, "Add", [last.output[0], node.input[2]])
        yield last
    activation = attribute(node, "activation")
    if isinstance(activation, bytes):
        values: Any = attribute(node, "activation_params", ())
        parameters = dict(zip(("alpha", "beta"), values, strict=False))
        last = _node(names, activation.decode(), [last.output[0]], **parameters)
        yield last
    yield helper.make_node(
        "ReorderInput", [last.output[0]], [node.output[0]], node.name, domain=NCHWC_DOMAIN, channels_last=1
    )


def _reshape(node: NodeProto, version: int, names: Names) -> Iterator[NodeProto]:
    """``node``, whose shape was computed: a zero in it is an extent, not one to take over.

    Before opset 9 it stays: nothing there makes an empty tensor of a computed shape.
    """
    if version >= 14:
        node = _copy(node)
        set_attribute(node, "allowzero", 1)
    elif version >= 9:
        size = _node(names, "ReduceProd", [node.input[1]], keepdims=0)
        some = _node(names, "Cast", [size.output[0]], to=onnx.TensorProto.BOOL)
        yield from (size, some)
        branches = {
            "then_branch": _node(names, "Reshape", list(node.input)),
            "else_branch": _node(names, "ConstantOfShape", [node.input[1]]),
        }
        node = helper.make_node(
            "If", [some.output[0]], list(node.output), **{key: _branch(made) for key, made in branches.items()}
        )
    yield node


def _branch(node: NodeProto) -> GraphProto:
    output = helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)
    return helper.make_graph([node], "rows", [], [output])


def _ints(names: Names, *values: int) -> NodeProto:
    return _node(names, "Constant", [], value=numpy_helper.from_array(np.array(values, np.int64)))


def _node(names: Names, op_type: str, inputs: list[str], domain: str = "", **attributes: Any) -> NodeProto:
    output = names.fresh(f"plain_{op_type.lower()}")
    return helper.make_node(op_type, inputs, [output], names.fresh(f"plain_node_{op_type}"), None, domain, **attributes)


def _copy(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy
