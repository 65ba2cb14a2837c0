"""The passes that find counting in a graph: a Scan that only numbers its steps, and a choice among such numbers.

Exporters of recurrent frameworks (CNTK is one) write "the position in the sequence" as a Scan with a counter as its
state. Step by step that is slow, and few engines run Scan; in one piece it is an arithmetic series. Where the numbers
0, 1, 2, ... are only used to look up the number at an index, the index itself is the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto

from onnx_refit.model.edit import (
    Builder,
    constant_of,
    constant_value,
    copy_model,
    is_onnx,
    label,
    prune_upwards,
    replace_node,
)
from onnx_refit.model.graph import attribute, consumers, opset, producers
from onnx_refit.model.passes import Blocker, Change, PassResult, Rewrite
from onnx_refit.model.shapes import Shapes, product
from onnx_refit.tensors import Array


@dataclass(frozen=True)
class _Counter:
    """A Scan whose one state grows by a constant at each step."""

    step: Array
    before: tuple[int, ...]
    """Scan outputs (by number) that hand out the state before it grows."""
    after: tuple[int, ...]
    """Scan outputs that hand out the state after it has grown."""


class ReplaceCounters(Rewrite):
    """A Scan that only counts becomes the series ``start + step * (0, 1, 2, ...)``."""

    name = "replace-counters"

    def call(self, model: ModelProto) -> PassResult:
        """Run the pass on a copy of the model."""
        version = opset(model) or 1
        if version < 9 or not any(is_onnx(node, "Scan") for node in model.graph.node):
            return PassResult(model)
        copy = copy_model(model)
        shapes = Shapes(model)
        changes: list[Change] = []
        blockers: list[Blocker] = []
        for node in list(copy.graph.node):
            if not is_onnx(node, "Scan"):
                continue
            change = _replace_scan(copy, node, shapes, version)
            if isinstance(change, Blocker):
                blockers.append(change)
            else:
                changes.append(change)
        return PassResult(copy if changes else model, tuple(changes), tuple(blockers))


def _replace_scan(model: ModelProto, node: NodeProto, shapes: Shapes, version: int) -> Change | Blocker:
    graph = model.graph
    counter = _recognise(node)
    if isinstance(counter, str):
        return Blocker(label(node), "Scan", counter)
    start = constant_of((graph,), node.input[0])
    if start is None or product(start.shape) != 1:
        return Blocker(label(node), "Scan", "its first state is not one constant number")
    if node.output[0] and (node.output[0] in consumers(graph) or node.output[0] in _outputs(graph)):
        return Blocker(label(node), "Scan", "its last state is used")
    build = Builder(model, graph)
    axes = attribute(node, "scan_input_axes", [0])
    axis = axes[0] if isinstance(axes, list) else 0
    dims = shapes.dims(node.input[1])
    if axis < 0 and dims is None:
        return Blocker(label(node), "Scan", "the rank of its sequence is not known")
    axis = axis if axis >= 0 or dims is None else axis + len(dims)
    steps = positions(build, node.input[1], axis, version)
    element = onnx.helper.np_dtype_to_tensor_dtype(start.dtype)
    typed = build.node("Cast", [steps], name=f"{label(node)}_steps", to=element)
    column = build.node("Reshape", [typed, build.constant((-1, *((1,) * start.ndim)), wish="column")])
    for number, output in enumerate(node.output[1:]):
        if not output or (output not in consumers(graph) and output not in _outputs(graph)):
            continue
        first = start.item() if number in counter.before else start.item() + counter.step.item()
        grown = column
        if counter.step.item() != 1:
            grown = build.node("Mul", [column, build.constant(counter.step, start.dtype, "step")])
        build.node("Add", [grown, build.constant(first, start.dtype, "first")], output=output)
    replace_node(graph, node, build.nodes)
    what = f"replaced by the series from {start.item()} by steps of {counter.step.item()}"
    return Change(label(node), "Scan", what, "it only counts its steps; few engines run Scan, and none fast")


def _outputs(graph: GraphProto) -> set[str]:
    return {output.name for output in graph.output}


def _recognise(node: NodeProto) -> _Counter | str:
    """The counter that a Scan is, or why it is none, in words."""
    body = attribute(node, "body")
    assert isinstance(body, GraphProto)
    sequences = attribute(node, "num_scan_inputs", 0)
    assert isinstance(sequences, int)
    if len(body.input) - sequences != 1 or sequences < 1:
        return "it does more than count: it has not exactly one state"
    for name in ("scan_output_axes", "scan_output_directions"):
        given = attribute(node, name, [])
        if isinstance(given, list) and any(given):
            return f"it writes its outputs with {name}, which this pass does not follow"
    state, weights = body.input[0].name, {tensor.name for tensor in body.initializer}
    kinds: dict[str, str] = {state: "before"}
    step: Array | None = None
    for inner in body.node:
        if is_onnx(inner, "Identity") and inner.input[0] in kinds:
            kinds[inner.output[0]] = kinds[inner.input[0]]
        elif is_onnx(inner, "Add") and step is None and any(kinds.get(name) == "before" for name in inner.input):
            other = next((name for name in inner.input if name not in kinds), "")
            step = constant_of((body,), other)
            if step is None or step.size != 1:
                return "it does more than count: its state does not grow by a constant"
            kinds[inner.output[0]] = "after"
        elif constant_value(inner) is None or inner.output[0] in weights:
            return f"it does more than count: it holds {inner.op_type}"
    wanted = [kinds.get(output.name) for output in body.output]
    if step is None or None in wanted or wanted[0] != "after":
        return "it does more than count: an output is not the counter"
    outs = list(enumerate(wanted[1:]))
    return _Counter(
        step, tuple(n for n, kind in outs if kind == "before"), tuple(n for n, kind in outs if kind == "after")
    )


def positions(build: Builder, value: str, axis: int, version: int) -> str:
    """Add nodes for the int64 numbers 0, 1, ..., n-1 (one dimension), n being a dimension of ``value``."""
    shape = build.node("Shape", [value])
    size = build.node("Gather", [shape, build.constant([axis], wish="axis")], axis=0)
    if version >= 11:
        scalar = build.node("Reshape", [size, build.constant([], wish="scalar")])
        return build.node("Range", [build.constant(0), scalar, build.constant(1)], name="positions")
    ones = onnx.helper.make_tensor("one", onnx.TensorProto.INT64, [1], [1])
    filled = build.node("ConstantOfShape", [size], value=ones)
    found = build.node("NonZero", [filled], name="positions")
    return build.node("Reshape", [found, build.constant([-1], wish="flat")])


class SimplifyPositions(Rewrite):
    """Gather of the numbers 0, 1, 2, ... at an index becomes the index."""

    name = "simplify-positions"

    def call(self, model: ModelProto) -> PassResult:
        """Run the pass on a copy of the model."""
        if not any(is_onnx(node, "Range", "NonZero") for node in model.graph.node):
            return PassResult(model)
        copy = copy_model(model)
        graph, shapes = copy.graph, Shapes(model)
        changes: list[Change] = []
        for node in list(graph.node):
            if not is_onnx(node, "Gather") or attribute(node, "axis", 0) != 0:
                continue
            source, target = shapes.dims(node.input[0]), shapes.element_type(node.output[0])
            index = producers(graph).get(node.input[1])
            if source is None or len(source) != 1 or target is None or index is None or not is_onnx(index, "ArgMax"):
                continue  # only an ArgMax is known to be an index within the range and never negative
            if not _counts_from_zero(graph, node.input[0], shapes):
                continue
            cast = onnx.helper.make_node("Cast", [node.input[1]], [node.output[0]], name=label(node), to=target)
            numbers = node.input[0]
            what = f"replaced by its index {node.input[1]}"
            changes.append(Change(label(node), "Gather", what, "it looks an index up among 0, 1, 2, ..."))
            replace_node(graph, node, [cast])
            prune_upwards(graph, [numbers])
        return PassResult(copy if changes else model, tuple(changes))


def _counts_from_zero(graph: GraphProto, name: str, shapes: Shapes) -> bool:
    """Whether a value is 0, 1, 2, ... in some shape and type that is exact for such numbers."""
    made = producers(graph)
    for _ in graph.node:  # a bound: a model that was never checked may have a cycle
        node = made.get(name)
        if node is None:
            return False
        if is_onnx(node, "Range"):
            first, step = constant_of((graph,), node.input[0]), constant_of((graph,), node.input[2])
            return first is not None and step is not None and first.item() == 0 and step.item() == 1
        if is_onnx(node, "NonZero"):
            return _is_all_ones(graph, made.get(node.input[0]))
        if is_onnx(node, "Add"):
            zero = [other for other in node.input if _is_zero(constant_of((graph,), other))]
            if len(zero) != 1:
                return False
            name = next(other for other in node.input if other != zero[0])
        elif is_onnx(node, "Transpose"):
            dims = shapes.dims(node.input[0])
            if dims is None or sum(size != 1 for size in dims) > 1:
                return False
            name = node.input[0]
        elif is_onnx(node, "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast"):
            if is_onnx(node, "Cast") and attribute(node, "to") not in _EXACT:
                return False
            name = node.input[0]
        else:
            return False
    return False


_EXACT = frozenset({onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE})


def _is_zero(value: Array | None) -> bool:
    return value is not None and value.size == 1 and value.item() == 0


def _is_all_ones(graph: GraphProto, node: NodeProto | None) -> bool:
    """Whether a node is a one-dimensional ConstantOfShape filled with something other than zero."""
    if node is None or not is_onnx(node, "ConstantOfShape"):
        return False
    value = attribute(node, "value")
    filled = isinstance(value, onnx.TensorProto) and bool(np.all(onnx.numpy_helper.to_array(value)))
    size = producers(graph).get(node.input[0])
    if not filled or size is None:
        return False
    if is_onnx(size, "Gather"):
        index = constant_of((graph,), size.input[1])
        return index is not None and index.shape == (1,)
    return False
