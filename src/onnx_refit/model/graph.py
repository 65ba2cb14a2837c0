"""Small readers of ONNX graphs that the passes and the compiler share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

NESTING = frozenset({"If", "Loop", "Scan", "SequenceMap"})
"""The operators of the default domain that hold graphs."""


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs a node holds in its attributes, one level down."""
    if node.op_type not in NESTING and node.domain in {"", "ai.onnx"}:
        return  # most nodes, and looking at all their attributes takes ten times as long
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and every graph nested in it, outer ones first."""
    yield graph
    for node in graph.node:
        if node.op_type in NESTING or node.domain:
            for inner in subgraphs(node):
                yield from all_graphs(inner)


def attribute(node: NodeProto, name: str, default: object = None) -> object:
    """The value of a node's attribute, or the default where it is absent (bytes attributes stay bytes)."""
    for candidate in node.attribute:
        if candidate.name == name:
            value: object = onnx.helper.get_attribute_value(candidate)
            return value
    return default


def set_attribute(node: NodeProto, name: str, value: object) -> None:
    """Set or replace a node's attribute."""
    for index, candidate in enumerate(node.attribute):
        if candidate.name == name:
            del node.attribute[index]
            break
    node.attribute.append(onnx.helper.make_attribute(name, value))


def captured(node: NodeProto) -> Iterator[str]:
    """Names that the node's sub-graphs read, from the outer scope or their own."""
    for graph in subgraphs(node):
        for inner in graph.node:
            yield from (name for name in inner.input if name)
            yield from captured(inner)
        for output in graph.output:
            yield output.name


def reads(node: NodeProto) -> Iterator[str]:
    """Every name the node reads: its inputs and what its sub-graphs capture."""
    yield from (name for name in node.input if name)
    yield from captured(node)


def producers(graph: GraphProto) -> dict[str, NodeProto]:
    """Value name -> the node of this graph that makes it."""
    return {output: node for node in graph.node for output in node.output if output}


def consumers(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """Value name -> the nodes of this graph that read it, directly or through a sub-graph (each node once a read)."""
    found: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in reads(node):
            found.setdefault(name, []).append(node)
    return found


def value_names(graph: GraphProto) -> set[str]:
    """Every value name used in the graph and its sub-graphs."""
    names: set[str] = set()
    for inner in all_graphs(graph):
        names.update(value.name for value in (*inner.input, *inner.output, *inner.value_info))
        names.update(tensor.name for tensor in inner.initializer)
        for node in inner.node:
            names.update(name for name in (*node.input, *node.output) if name)
    return names


class Names:
    """Gives value and node names that clash with none in the graph."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)

    @classmethod
    def of(cls, graph: GraphProto) -> Names:
        """A giver of names for this graph."""
        nodes = (node.name for inner in all_graphs(graph) for node in inner.node)
        return cls({*value_names(graph), *nodes})

    def fresh(self, wish: str) -> str:
        """The wished name, or with a number behind it if it is taken."""
        name, number = wish, 1
        while name in self._taken:
            number += 1
            name = f"{wish}_{number}"
        self._taken.add(name)
        return name


def opset(model: ModelProto, domain: str = "") -> int | None:
    """The opset version of a domain that the model imports, or None."""
    wanted = {"", "ai.onnx"} if domain in {"", "ai.onnx"} else {domain}
    for entry in model.opset_import:
        if entry.domain in wanted:
            return int(entry.version)
    return None


def without_initializers(model: ModelProto) -> ModelProto:
    """A copy of a model without the initializers of its main graph; their bytes are not touched."""
    bare = ModelProto()
    for field, value in model.ListFields():
        if field.name != "graph":
            _copy_field(bare, field.name, value)
    for field, value in model.graph.ListFields():
        if field.name != "initializer":
            _copy_field(bare.graph, field.name, value)
    return bare


def _copy_field(target: Any, name: str, value: Any) -> None:
    if isinstance(value, str | int | bytes):
        setattr(target, name, value)
    else:
        getattr(target, name).MergeFrom(value)


def has_external_tensors(model: ModelProto) -> bool:
    """Whether any tensor of a model, its sub-graphs and functions lies in a file of its own."""
    nodes = [node for graph in all_graphs(model.graph) for node in graph.node]
    for function in model.functions:
        for node in function.node:
            nodes.append(node)
            nodes += [inner for sub in subgraphs(node) for graph in all_graphs(sub) for inner in graph.node]
    graphs = [*all_graphs(model.graph), *(g for node in nodes for sub in subgraphs(node) for g in all_graphs(sub))]
    tensors = [tensor for graph in graphs for tensor in graph.initializer]
    for graph in graphs:
        for sparse in graph.sparse_initializer:
            tensors += [sparse.values, sparse.indices]
    for node in nodes:
        for entry in node.attribute:
            tensors += [entry.t, *entry.tensors, entry.sparse_tensor.values, entry.sparse_tensor.indices]
    return any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors)
