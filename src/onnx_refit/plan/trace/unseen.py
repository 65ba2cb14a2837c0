"""Weights whose values an optimiser must not see, since what it would make of them hangs on coincidences.

The compiler moves every node that reads only weights into the refit program, save those whose output's shape depends
on values (Unique, NonZero, ...). An optimiser folds such a node, and neither coded nor random weights betray it: no two
of their elements are equal, and none is zero.
"""

from __future__ import annotations

from collections.abc import Iterable

from onnx import GraphProto, ModelProto

from onnx_refit.model.graph import subgraphs

# What stays although its shape is known; its output differs wherever its input does.
_HARMLESS = frozenset({"Expand", "Identity", "Tile", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})


def unseen(model: ModelProto, weights: Iterable[str]) -> dict[str, str]:
    """Weights that a node of unknown output shape reads, with nothing but weights and constants -> its operator.

    Args:
        model: the activation graph; its weights are graph inputs.
        weights: those inputs.
    """
    found: dict[str, str] = {}
    _look(model.graph, {name: {name} for name in weights}, set(), found)
    return found


def _look(graph: GraphProto, made_of: dict[str, set[str]], constants: set[str], found: dict[str, str]) -> None:
    """``made_of``: value -> the weights that it is made of, for values made of weights and constants only."""
    constants = constants | {tensor.name for tensor in graph.initializer}
    made_of = dict(made_of)
    for node in graph.node:
        inner = list(subgraphs(node))
        for each in inner:
            _look(each, made_of, constants, found)
        names = [name for name in node.input if name]
        if inner or not all(name in made_of or name in constants for name in names):
            continue
        read = {weight for name in names for weight in made_of.get(name, ())}
        if not read:
            constants = constants | set(node.output)
        elif node.op_type in _HARMLESS:
            made_of.update(dict.fromkeys(node.output, read))
        else:
            found.update(dict.fromkeys(read, node.op_type))
