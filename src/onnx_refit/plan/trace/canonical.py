"""Names and skeletons that two runs of an optimiser can be compared by."""

from __future__ import annotations

import copy

import onnx

from onnx_refit.model.graph import all_graphs, subgraphs

TensorKey = tuple[int, str]
"""An initializer: the number of its graph (outer first, as ``all_graphs`` counts) and its name."""


def rename_by_use(model: onnx.ModelProto) -> None:
    """Rename, in place, every value and node by order of use: optimisers invent names that change from run to run.

    Inputs and outputs of the main graph keep their names.
    """
    graph = model.graph
    kept = {value.name for value in (*graph.input, *graph.output)}
    names: dict[str, str] = {}
    nodes = 0

    def name(old: str) -> str:
        if not old or old in kept:
            return old
        if old not in names:
            number = len(names)
            while (fresh := f"v{number}") in kept:
                number += 1_000_000
            names[old] = fresh
        return names[old]

    def walk(graph: onnx.GraphProto, *, main: bool) -> None:
        nonlocal nodes
        if not main:
            for value in graph.input:
                value.name = name(value.name)
        for node in graph.node:
            nodes += 1
            node.name = f"n{nodes}"
            node.doc_string = ""
            node.input[:] = [name(old) for old in node.input]
            for inner in subgraphs(node):
                walk(inner, main=False)
            node.output[:] = [name(old) for old in node.output]
        if not main:
            for value in graph.output:
                value.name = name(value.name)
        for tensor in graph.initializer:
            tensor.name = name(tensor.name)
        for value in graph.value_info:
            value.name = name(value.name)

    walk(graph, main=True)


def skeleton(model: onnx.ModelProto) -> bytes:
    """Everything of a model but its initializers and the optimiser's notes on shapes."""
    bare = copy.deepcopy(model)
    for graph in all_graphs(bare.graph):
        shapes = sorted((t.name, t.data_type, tuple(t.dims)) for t in graph.initializer)
        del graph.initializer[:]
        del graph.value_info[:]
        graph.doc_string = repr(shapes)
    bare.doc_string = ""
    data: bytes = bare.SerializeToString(deterministic=True)
    return data
