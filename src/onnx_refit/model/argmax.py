"""The passes that replace Hardmax by ArgMax.

Hardmax marks the first maximum with one and all else with zero. Followed by a Cast to bool and a Compress it is a
roundabout way to pick one element: ArgMax and Gather say the same and run everywhere. Alone it becomes a comparison
of every place with the place of the maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto

from onnx_refit.model.compress import data_and_axis
from onnx_refit.model.counting import positions
from onnx_refit.model.edit import Builder, is_onnx, label, prune_upwards, replace_node
from onnx_refit.model.graph import attribute, producers
from onnx_refit.model.nodewise import Facts, NodeRewrite, Site
from onnx_refit.model.passes import Blocker, Change
from onnx_refit.model.shapes import Dims, Shapes, product

_NUMERIC = frozenset(
    {
        onnx.TensorProto.BOOL,
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.DOUBLE,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
        onnx.TensorProto.INT8,
        onnx.TensorProto.INT16,
        onnx.TensorProto.INT32,
        onnx.TensorProto.INT64,
        onnx.TensorProto.UINT8,
        onnx.TensorProto.UINT16,
        onnx.TensorProto.UINT32,
        onnx.TensorProto.UINT64,
    }
)


@dataclass(frozen=True)
class _Axis:
    """How a Hardmax works: along one axis, or (before opset 13) on rows of the input flattened at that axis."""

    axis: int
    flattens: bool

    @classmethod
    def of(cls, node: NodeProto, version: int) -> _Axis:
        axis = attribute(node, "axis", -1 if version >= 13 else 1)
        assert isinstance(axis, int)
        return cls(axis, version < 13)

    def rows(self, dims: Dims) -> int | None:
        """How many maxima there are; None where that depends on a dynamic dimension."""
        if self.flattens:
            return product(dims[: self.axis] if self.axis >= 0 else dims[: len(dims) + self.axis])
        return product([size for place, size in enumerate(dims) if place != self.axis % len(dims)])


class SelectByArgMax(NodeRewrite):
    """Hardmax -> Cast -> (Reshape, ...) -> Compress becomes ArgMax -> Gather."""

    name = "select-by-argmax"
    operator = "Compress"

    def rewrite(self, site: Site) -> list[Change]:
        """Rewrite one Compress whose condition marks one maximum; nothing where it is something else."""
        return _select(site.model, site.graph, site.node, site.facts)


def _select(model: ModelProto, graph: GraphProto, compress: NodeProto, facts: Facts) -> list[Change]:
    chain = _condition_chain(graph, compress.input[1])
    if chain is None:
        return []
    hardmax, shapes = chain[0], facts.shapes
    dims = shapes.dims(hardmax.input[0])
    kind = _Axis.of(hardmax, facts.opset)
    if not (_picks_one(compress, shapes) or (dims and kind.rows(dims) == 1)):
        return []  # several maxima: ReplaceHardmax and ReplaceCompress do what is right in general
    build = Builder(model, graph)
    scores, title = hardmax.input[0], hardmax.name or "Hardmax"
    axis = kind.axis % len(dims) if dims else 0
    if dims and len(dims) <= 2 and product([size for place, size in enumerate(dims) if place != axis]) == 1:
        keep = 1 if len(dims) == 1 else 0
    else:  # the maximum over a block of several dimensions, behind leading ones, or of a tensor of unknown rank
        scores = build.node("Reshape", [scores, build.constant([-1], wish="flat")], name=f"{title}_flat")
        axis, keep = 0, 1
    index = build.node("ArgMax", [scores], name=f"{title}_ArgMax", axis=axis, keepdims=keep)
    data, along = data_and_axis(build, compress, shapes)
    build.node("Gather", [data, index], name=f"{label(compress)}_Gather", output=compress.output[0], axis=along)
    replace_node(graph, compress, build.nodes)
    gone = prune_upwards(graph, [compress.input[1]])
    names = ", ".join(f"{label(node)} ({node.op_type})" for node in reversed(gone))
    why = "Hardmax over a dynamic axis and Compress run on few engines; the first maximum picks one element"
    return [
        Change(label(compress), "Compress", f"replaced by ArgMax of {hardmax.input[0]} -> Gather", why),
        *([Change(label(hardmax), "Hardmax", f"taken out: {names}", "nothing else reads the mark")] if gone else []),
    ]


def _picks_one(compress: NodeProto, shapes: Shapes) -> bool:
    """Whether a Compress is declared to give one element (along its axis): then its mark has one maximum."""
    picked, axis = shapes.dims(compress.output[0]), attribute(compress, "axis")
    if axis is None:
        return picked == (1,)
    return picked is not None and isinstance(axis, int) and -len(picked) <= axis < len(picked) and picked[axis] == 1


def _condition_chain(graph: GraphProto, name: str) -> list[NodeProto] | None:
    """Hardmax and the nodes behind it that hand its mark on unchanged, up to the value ``name``."""
    made = producers(graph)
    chain: list[NodeProto] = []
    casts = 0
    for _ in graph.node:  # a bound: a model that was never checked may have a cycle
        node = made.get(name)
        if node is None:
            return None
        chain.append(node)
        if is_onnx(node, "Hardmax"):
            return chain[::-1] if casts else None
        if is_onnx(node, "Cast"):
            if attribute(node, "to") not in _NUMERIC:
                return None
            casts += 1
        elif not is_onnx(node, "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"):
            return None
        name = node.input[0]
    return None


class ReplaceHardmax(NodeRewrite):
    """Hardmax becomes ArgMax and a comparison of every place with it."""

    name = "replace-hardmax"
    operator = "Hardmax"

    def rewrite(self, site: Site) -> list[Change | Blocker]:
        """Replace one Hardmax, where its type and rank are known."""
        node, shapes, version = site.node, site.facts.shapes, site.facts.opset
        if version < 9:
            reason = f"opset {version} has no operators to say it in; convert the model to opset 9 or later"
            return [Blocker(label(node), "Hardmax", reason)]
        dims, code = shapes.dims(node.input[0]), shapes.element_type(node.input[0])
        kind = _Axis.of(node, version)
        if not dims and kind.flattens and kind.axis >= 0:
            dims = (None,) * max(3, kind.axis + 2)  # of unknown rank: all that flattening needs to know
        if not dims or code is None:
            unknown = "type" if code is None else "rank"
            return [Blocker(label(node), "Hardmax", f"the {unknown} of its input is not known")]
        return [_compare(site.model, site.graph, node, dims, code, version)]


def _compare(model: ModelProto, graph: GraphProto, node: NodeProto, dims: Dims, code: int, version: int) -> Change:
    build = Builder(model, graph)
    kind = _Axis.of(node, version)
    scores, axis = node.input[0], kind.axis % len(dims)
    if kind.flattens and kind.axis == len(dims):
        axis = len(dims)  # rows of one element each
    width = product(dims[axis:]) if kind.flattens else product(dims[axis : axis + 1])
    rank = len(dims)
    flat = kind.flattens and (axis != 1 or rank != 2)
    if kind.flattens:
        if flat:
            scores = build.node("Flatten", [scores], name=f"{label(node)}_rows", axis=axis)
        axis, rank = 1, 2
    index = build.node("ArgMax", [scores], name=f"{label(node)}_ArgMax", axis=axis, keepdims=1)
    places = _places(build, scores, axis, rank, width, version)
    mark = build.node("Equal", [index, places], name=f"{label(node)}_mark")
    target = None if flat else node.output[0]
    result = build.node("Cast", [mark], name=f"{label(node)}_number", output=target, to=code)
    if flat:
        shape = build.node("Shape", [node.input[0]], name=f"{label(node)}_shape")
        build.node("Reshape", [result, shape], name=f"{label(node)}_result", output=node.output[0])
    replace_node(graph, node, build.nodes)
    how = f"flattened at axis {kind.axis}" if kind.flattens else f"along axis {kind.axis}"
    why = "engines build Hardmax only for a static axis, if at all"
    return Change(label(node), "Hardmax", f"replaced by ArgMax and a comparison of places, {how}", why)


def _places(build: Builder, scores: str, axis: int, rank: int, width: int | None, version: int) -> str:
    """The numbers 0, 1, ... along an axis, shaped so that they broadcast against the scores."""
    tail = (1,) * (rank - axis - 1)
    if width is not None:
        return build.constant(np.arange(width).reshape(-1, *tail), wish="places")
    numbers = positions(build, scores, axis, version)
    return build.node("Reshape", [numbers, build.constant((-1, *tail), wish="column")])
