"""Hoist: nodes that read nothing but weights and constants leave the activation graph for the refit program."""

from __future__ import annotations

import math

import numpy as np
from onnx import GraphProto, NodeProto

from onnx_refit.model.graph import attribute, set_attribute, subgraphs
from onnx_refit.plan.draft import Draft
from onnx_refit.plan.program import NotStaticError
from onnx_refit.plan.shapes import draft_specs
from onnx_refit.tensors import Array, onnx_dtype

# Operators that stay where they are even if all they read is weights: the engine's quantised kernels are selected by
# the Quantize/DequantizeLinear nodes around them, and what draws random numbers draws them at every inference.
NEVER = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "RandomNormal",
        "RandomUniform",
        "RandomNormalLike",
        "RandomUniformLike",
        "Multinomial",
        "Bernoulli",
        "Dropout",
    }
)

_GROWTH = 8  # a node whose output is that many times its inputs stays
_LARGE = 1 << 20  # but only from this many elements on


class ResolveCastLike:
    """CastLike (15 to the latest) becomes Cast where the dtype of its second input, all it reads of it, is known.

    PyTorch's exporter writes the bias of a convolution without one so, and no fold could see through it.
    """

    name = "resolve-cast-like"

    def requires(self, draft: Draft) -> str | None:
        """Nothing."""
        return None

    def call(self, draft: Draft) -> int:
        """Rewrite; how many nodes became Cast."""
        found = [node for node in draft.nodes() if node.op_type == "CastLike" and not node.domain]
        specs = draft_specs(draft) if found else {}
        resolved = 0
        for node in found:
            like = specs.get(node.input[1])
            if like is None or node.input[1] in draft.program:
                continue
            node.op_type = "Cast"
            del node.input[1]
            set_attribute(node, "to", onnx_dtype(like.dtype))
            resolved += 1
        return resolved

    def ensures(self, draft: Draft) -> str | None:
        """Nothing."""
        return None


class Hoist:
    """Move every weight-only node of every graph into the refit program.

    ``Shape`` and ``Size`` of a value of the program become constants. Nodes that read constants only stay, and are
    known to the program as constant expressions, so that a hoisted node may read them.
    """

    name = "hoist"

    def requires(self, draft: Draft) -> str | None:
        """Nothing."""
        return None

    def call(self, draft: Draft) -> int:
        """Hoist; the number of nodes that left the activation graph."""
        return _hoist_graph(draft, draft.graph)

    def ensures(self, draft: Draft) -> str | None:
        """Every value of the program has one maker: the activation graph or the program, unless it is constant."""
        for node in draft.nodes():
            for output in node.output:
                if draft.program.is_weight(output):
                    return f"{output!r} is made in the activation graph and in the refit program"
        return None


def _hoist_graph(draft: Draft, graph: GraphProto) -> int:
    moved = []
    inner_count = 0
    for index, node in enumerate(graph.node):
        for place, name in enumerate(node.input):
            if name in draft.aliases:
                node.input[place] = draft.aliases[name]
        for inner in subgraphs(node):
            inner_count += _hoist_graph(draft, inner)
        if _hoist_node(draft, node):
            moved.append(index)
    if moved:
        gone = set(moved)
        kept = [node for index, node in enumerate(graph.node) if index not in gone]
        del graph.node[:]
        graph.node.extend(kept)
    return len(moved) + inner_count


def _hoist_node(draft: Draft, node: NodeProto) -> bool:
    program = draft.program
    inputs = [name for name in node.input if name]
    if not inputs or node.op_type in NEVER or any(True for _ in subgraphs(node)):
        return False
    if not all(name in program for name in inputs):
        return False
    if node.op_type in {"Shape", "Size"} and not node.domain:
        program.add_constant(_shape_of(node, program.shape(inputs[0])), node.output[0])
        return True
    weights = any(program.is_weight(name) for name in inputs)
    if weights and (grown := _growth(draft, node)) is not None:
        draft.reject(node.name, f"hoist {node.op_type}", grown)
        return False
    copy = NodeProto()
    copy.CopyFrom(node)
    try:
        values = program.push(copy)
    except NotStaticError as error:
        if weights:
            draft.reject(node.name, f"hoist {node.op_type}", error.message)
        return False
    draft.aliases.update((name, value) for name, value in values.items() if name != value)
    if weights:
        draft.accept(node.name, f"hoist {node.op_type}", "it reads weights and constants only")
    return weights


def _shape_of(node: NodeProto, shape: tuple[int, ...]) -> Array:
    """Shape-1 to the latest (``start`` and ``end`` since 15), Size-1 to the latest."""
    if node.op_type == "Size":
        return np.array(math.prod(shape), np.int64)
    start, end = attribute(node, "start", 0), attribute(node, "end", None)
    assert isinstance(start, int)
    assert end is None or isinstance(end, int)
    return np.array(shape[start:end], np.int64)


def _growth(draft: Draft, node: NodeProto) -> str | None:
    """Why hoisting would blow the weights up, or None."""
    program = draft.program
    if node.op_type not in {"Expand", "Tile"}:
        return None
    try:
        out = math.prod(program.infer(node)[0].static_shape)
    except NotStaticError:
        return None
    given = math.prod(program.shape(node.input[0]))
    if out > _LARGE and out > _GROWTH * given:
        return f"its output has {out} elements, made of {given}"
    return None
