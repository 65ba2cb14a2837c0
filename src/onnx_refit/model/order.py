"""Nodes in topological order, which ONNX demands and ONNX Runtime does not: each after those whose values it reads."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

from onnx_refit.errors import ModelError
from onnx_refit.model.edit import copy_model, label
from onnx_refit.model.graph import all_graphs, subgraphs
from onnx_refit.model.passes import Change, PassResult, Rewrite


class SortNodes(Rewrite):
    """Nodes of the main graph, of sub-graphs and of functions come after those whose values they read."""

    name = "sort-nodes"

    def ensures(self, model: ModelProto) -> str | None:
        """Every graph is in order."""
        unsorted = next((graph for graph in _bodies(model) if not _is_sorted(graph.node)), None)
        return None if unsorted is None else f"the nodes of {unsorted.name!r} are in no topological order"

    def call(self, model: ModelProto) -> PassResult:
        """Run the pass on a copy of the model; ModelError where nodes need each other's values."""
        if all(_is_sorted(body.node) for body in _bodies(model)):
            return PassResult(model)
        copy = copy_model(model)
        why = "ONNX demands that they come after those whose values they read"
        return PassResult(copy, tuple(Change(name, "graph", "nodes sorted", why) for name in sort_nodes(copy)))


def sort_nodes(model: ModelProto, path: Path | None = None) -> list[str]:
    """Sort the nodes of all graphs and functions in place; the names of those that were not sorted.

    Nodes keep their order wherever it does not matter. Values that nobody makes are left for the checker to find.

    Args:
        model: the model.
        path: where it was read from, for the error.

    Raises:
        ModelError: nodes need each other's values.
    """
    changed = []
    for body in reversed(list(_bodies(model))):  # inner ones first: sorting copies nodes with the graphs in them
        if not _is_sorted(body.node):
            nodes = [_copy(body.node[index]) for index in _order(body.node, path)]
            del body.node[:]
            body.node.extend(nodes)
            changed.append(body.name)
    return changed


def _bodies(model: ModelProto) -> Iterator[GraphProto | FunctionProto]:
    """Everything that has nodes, outer graphs first."""
    yield from all_graphs(model.graph)
    for function in model.functions:
        yield function
        for node in function.node:
            for inner in subgraphs(node):
                yield from all_graphs(inner)


def _is_sorted(nodes: Sequence[NodeProto]) -> bool:
    waiting = {output for node in nodes for output in node.output if output}
    for node in nodes:
        if not waiting.isdisjoint(_free(node)):
            return False
        waiting.difference_update(node.output)
    return True


def _free(node: NodeProto) -> set[str]:
    """The values that a node reads from the graph it stands in: its inputs, and what its sub-graphs capture."""
    names = {name for name in node.input if name}
    for graph in subgraphs(node):
        inner = {output.name for output in graph.output}
        own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        own.update(sparse.values.name for sparse in graph.sparse_initializer)
        for step in graph.node:
            inner |= _free(step)
            own.update(step.output)
        names |= inner - own
    return names


def _order(nodes: Sequence[NodeProto], path: Path | None) -> list[int]:
    makers = {output: index for index, node in enumerate(nodes) for output in node.output if output}
    needs = [{makers[name] for name in _free(node) if name in makers} for node in nodes]
    readers: list[list[int]] = [[] for _ in nodes]
    for index, before in enumerate(needs):
        for maker in before:
            readers[maker].append(index)
    missing = [len(before) for before in needs]
    ready = [index for index, count in enumerate(missing) if not count]
    order = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for reader in readers[index]:
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(nodes):
        circle = _circle(needs, set(range(len(nodes))) - set(order))
        named = " -> ".join(label(nodes[index]) for index in circle)
        raise ModelError(f"not valid ONNX: nodes need each other's values: {named}", where=path)
    return order


def _circle(needs: Sequence[set[int]], left: set[int]) -> list[int]:
    """Nodes each of which makes a value that the next one reads, the last being the first again."""
    path, at = [], min(left)
    while at not in path:
        path.append(at)
        at = min(needs[at] & left)
    return [*path[path.index(at) :], at][::-1]


def _copy(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy
