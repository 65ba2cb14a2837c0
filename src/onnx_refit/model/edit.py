"""Changes to ONNX graphs that several passes make: rename a value, take a node out, put nodes in.

All functions change the graph they are given: a pass calls them on its own copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto

from onnx_refit.model.graph import Names, attribute, producers, reads, subgraphs
from onnx_refit.tensors import Array


def copy_model(model: ModelProto) -> ModelProto:
    """A deep copy that a pass may change."""
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def replace_uses(graph: GraphProto, old: str, new: str) -> None:
    """Make every reader of a value, in this graph and its sub-graphs, read another; graph outputs stay."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new
        for inner in subgraphs(node):
            replace_uses(inner, old, new)
            for output in inner.output:
                if output.name == old:
                    output.name = new


def rename_value(graph: GraphProto, old: str, new: str) -> None:
    """Rename a value that a node of this graph makes, wherever it is made, read or described."""
    replace_uses(graph, old, new)
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == old:
                node.output[index] = new
    for index in reversed(range(len(graph.value_info))):
        if graph.value_info[index].name in (old, new):
            del graph.value_info[index]


def bypass(graph: GraphProto, node: NodeProto, source: str, target: str) -> bool:
    """Take out a node that hands its input ``source`` on as its output ``target``.

    Returns:
        Whether it went. It stays where only a node can connect the two: a graph output that is a graph input, an
        initializer, another graph output or a value from outside of this graph.
    """
    if target in {output.name for output in graph.output}:
        maker = producers(graph).get(source)
        if maker is None or source in {output.name for output in graph.output}:
            return False
        graph.node.remove(node)
        replace_uses(graph, target, source)
        rename_value(graph, source, target)
        return True
    graph.node.remove(node)
    replace_uses(graph, target, source)
    drop_value_info(graph, (target,))
    return True


def drop_value_info(graph: GraphProto, names: Iterable[str]) -> None:
    """Forget the described types of values that are gone."""
    gone = set(names)
    for index in reversed(range(len(graph.value_info))):
        if graph.value_info[index].name in gone:
            del graph.value_info[index]


def insert_before(graph: GraphProto, node: NodeProto, new: Sequence[NodeProto]) -> None:
    """Put nodes into the graph's order just before one of its nodes."""
    index = next(i for i, candidate in enumerate(graph.node) if candidate is node or candidate == node)
    for offset, one in enumerate(new):
        graph.node.insert(index + offset, one)


def replace_node(graph: GraphProto, node: NodeProto, new: Sequence[NodeProto]) -> None:
    """Put nodes in the place of one node."""
    insert_before(graph, node, new)
    graph.node.remove(node)


def prune_upwards(graph: GraphProto, names: Iterable[str]) -> list[NodeProto]:
    """Take out the nodes that make these values, and those that made only their inputs, where nothing reads them.

    Returns:
        The nodes that went, the last ones of the graph first. Initializers stay: a pass never drops a weight.
    """
    gone: list[NodeProto] = []
    pending = list(names)
    while pending:
        name = pending.pop()
        maker = producers(graph).get(name)
        if maker is None:
            continue
        kept = {output.name for output in graph.output}
        for other in graph.node:
            kept.update(reads(other))
        if any(output in kept for output in maker.output if output):
            continue
        pending.extend(reads(maker))
        drop_value_info(graph, maker.output)
        graph.node.remove(maker)
        gone.append(maker)
    return gone


def constant_of(graphs: Sequence[GraphProto], name: str) -> Array | None:
    """The value of an initializer or Constant node, looked up in these graphs; None for anything else.

    None too for an initializer whose values lie in a file of their own. Graph inputs of older models may have an
    initializer as a mere default: those are no constants.
    """
    for graph in graphs:
        if name in {value.name for value in graph.input}:
            return None
        for tensor in graph.initializer:
            if tensor.name == name:
                external = tensor.data_location == onnx.TensorProto.EXTERNAL
                return None if external else onnx.numpy_helper.to_array(tensor)
        for node in graph.node:
            if name in node.output:
                return constant_value(node)
    return None


def constant_value(node: NodeProto) -> Array | None:
    """The value of a Constant node with a dense tensor, number or list of numbers; None for other nodes."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    tensor = attribute(node, "value")
    if isinstance(tensor, onnx.TensorProto):
        return onnx.numpy_helper.to_array(tensor)
    for name, dtype in (("value_int", np.int64), ("value_ints", np.int64)):
        if (number := attribute(node, name)) is not None:
            return np.asarray(number, dtype)
    for name in ("value_float", "value_floats"):
        if (number := attribute(node, name)) is not None:
            return np.asarray(number, np.float32)
    return None


def is_onnx(node: NodeProto, *op_types: str) -> bool:
    """Whether a node is one of these operators of the standard domain."""
    return node.domain in ("", "ai.onnx") and node.op_type in op_types


def label(node: NodeProto) -> str:
    """The node's name for messages; for an unnamed node that of its first output."""
    return node.name or next((output for output in node.output if output), "(unnamed)")


class Builder:
    """Makes nodes and small constants with fresh names for one graph of a model.

    Args:
        model: the model; its main graph gives the names already taken.
        graph: the graph that the nodes and constants go to (constants join its initializers).
    """

    def __init__(self, model: ModelProto, graph: GraphProto) -> None:
        self._names = Names.of(model.graph)
        self._graph = graph
        self.nodes: list[NodeProto] = []

    def constant(self, value: object, dtype: object = np.int64, wish: str = "constant") -> str:
        """An initializer; its name."""
        tensor = onnx.numpy_helper.from_array(np.asarray(value, dtype), self._names.fresh(wish))  # type: ignore[call-overload]
        self._graph.initializer.append(tensor)
        return tensor.name

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        *,
        name: str | None = None,
        output: str | None = None,
        **attributes: Any,
    ) -> str:
        """A node with one output; the output's name. ``name`` is a wish, ``output`` is taken as it is."""
        title = self._names.fresh(name or op_type)
        result = output or self._names.fresh(f"{title}_output")
        self.nodes.append(onnx.helper.make_node(op_type, list(inputs), [result], name=title, **attributes))
        return result
