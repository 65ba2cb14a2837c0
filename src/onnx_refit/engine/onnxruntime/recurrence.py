"""Refuses requests that make ONNX Runtime abort the process: recurrences over nothing.

Its LSTM aborts on an empty batch, its GRU on an empty batch or sequence (onnxruntime 1.32, from a thread, so that
nothing can be caught). Which extents of the inputs lead there follows from the graph; who selects nothing inside the
graph is not found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx

from onnx_refit.errors import EngineError
from onnx_refit.model.graph import all_graphs, attribute
from onnx_refit.tensors import Array, TensorSpec

# Operator -> the dimensions of its first input that must not be empty.
_DEADLY: Mapping[str, tuple[int, ...]] = {"LSTM": (1,), "DynamicQuantizeLSTM": (1,), "GRU": (0, 1)}

Extent = tuple[str, int]
"""An input and one of its dimensions; -1: any of them."""


def deadly_extents(model: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> tuple[Extent, ...]:
    """The dimensions of these inputs that make a recurrence empty if they are; all, where the graph does not tell."""
    every = {(spec.name, axis): extent for spec in inputs for axis, extent in _extents(spec)}
    free = {place: extent for place, extent in every.items() if not isinstance(extent, int)}
    nodes = [node for graph in all_graphs(model.graph) for node in graph.node if node.op_type in _DEADLY]
    if not nodes or not free:
        return ()
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        value.name: [d.dim_value if d.HasField("dim_value") else d.dim_param for d in value.type.tensor_type.shape.dim]
        for value in (*inferred.input, *inferred.value_info)
    }
    found: set[Extent] = set()
    for node in nodes:
        shape = shapes.get(node.input[0], [])
        axes = (0, 1) if attribute(node, "layout", 0) else _DEADLY[node.op_type]
        for extent in (shape[axis] if axis < len(shape) else "" for axis in axes):
            if isinstance(extent, int):
                continue
            places = {place for place, symbol in free.items() if symbol and symbol == extent}
            found |= places or free.keys()
    return tuple(sorted(found))


def _extents(spec: TensorSpec) -> Iterable[tuple[int, int | str | None]]:
    return [(-1, None)] if spec.shape is None else enumerate(spec.shape)


def refuse_empty(extents: Sequence[Extent], inputs: Mapping[str, Array]) -> None:
    """Raise EngineError if one of these dimensions is empty."""
    for name, axis in extents:
        shape = inputs[name].shape
        if 0 in shape and (axis < 0 or not shape[axis]):
            raise EngineError(
                f"ONNX Runtime aborts on a recurrence over an empty batch or sequence (the shape is {list(shape)})",
                where=f"input {name!r}",
            )
