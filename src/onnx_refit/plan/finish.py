"""Finish: turn a draft into the compiled model, its shapes inferred and its dead nodes gone."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
from onnx import GraphProto, NodeProto, helper, numpy_helper

from onnx_refit.model.graph import reads, subgraphs
from onnx_refit.plan.compiled import CompiledModel, SourceWeight
from onnx_refit.plan.draft import Draft
from onnx_refit.plan.shapes import infer_light
from onnx_refit.tensors import TensorSpec, spec_of_value_info, value_info_of


def finish(draft: Draft, sources: tuple[SourceWeight, ...]) -> CompiledModel:
    """The compiled model of a draft."""
    inputs = tuple(spec_of_value_info(value) for value in draft.graph.input)
    drop_dead_nodes(draft.graph)
    _restore_outputs(draft)
    engine = _bind(draft)
    program = draft.program.finish(engine)
    specs = tuple(
        TensorSpec(name, draft.program.dtype(value), draft.program.shape(value)) for name, value in engine.items()
    )
    _drop_stale_types(draft)
    draft.graph.input.extend(value_info_of(spec) for spec in specs)
    activation = infer_light(draft.model)
    outputs = tuple(spec_of_value_info(value) for value in activation.graph.output)
    needed = frozenset().union(*program.dependencies.values())
    for source in sources:
        if source.spec.name not in needed:
            draft.reject(source.spec.name, "make refittable", "no engine weight is computed from it")
    kept = tuple(source for source in sources if source.spec.name in needed)
    derived = {name: factors for name, factors in draft.derived.items() if name not in needed}
    return CompiledModel(activation, program, kept, specs, inputs, outputs, tuple(draft.decisions), derived)


def drop_dead_nodes(graph: GraphProto) -> None:
    """Remove the nodes of a graph and of those in it whose outputs nothing reads."""
    live = {value.name for value in graph.output}
    dead = []
    for index in range(len(graph.node) - 1, -1, -1):
        node = graph.node[index]
        if not any(output in live for output in node.output):
            dead.append(index)
            continue
        for inner in subgraphs(node):
            drop_dead_nodes(inner)
        live.update(reads(node))
    for index in dead:
        del graph.node[index]


def _drop_stale_types(draft: Draft) -> None:
    """Remove the declared types of values that no node makes any more."""
    for graph in draft.graphs():
        made = {output for node in graph.node for output in node.output}
        kept = [value for value in graph.value_info if value.name in made]
        if len(kept) < len(graph.value_info):
            del graph.value_info[:]
            graph.value_info.extend(kept)


def _restore_outputs(draft: Draft) -> None:
    """Give every graph output that is no longer made inside its graph an Identity node (Identity-1)."""
    for graph in list(draft.graphs()):
        made = {output for node in graph.node for output in node.output}
        made.update(value.name for value in graph.input)
        for value in graph.output:
            if value.name in made:
                continue
            source = draft.aliases.get(value.name, value.name)
            if graph is not draft.graph:
                value.name = draft.names.fresh(f"{source}_output")
            graph.node.append(
                helper.make_node("Identity", [source], [value.name], name=draft.names.fresh(f"{source}/Identity"))
            )


def _bind(draft: Draft) -> dict[str, str]:
    """Bind what the nodes read: constants as initializers, values of the program as engine weights.

    Returns engine weight name -> value of the program. They differ only where the value has the name of an output.
    """
    program = draft.program
    made = {output for node in draft.nodes() for output in node.output}
    outputs = {value.name for value in draft.graph.output}
    read = dict.fromkeys(name for node in draft.nodes() for name in node.input if name in program)
    pending = [
        name for name in read if name not in made and not program.is_weight(name) and name not in program.constants
    ]
    read.update(dict.fromkeys(_insert_expressions(draft, pending, made)))
    rename = {name: draft.names.fresh(f"{name}_weight") for name in read if name in outputs and _is_bound(draft, name)}
    if rename:
        _rename_inputs(draft.nodes(), rename)
    engine = {}
    for name in read:
        bound = rename.get(name, name)
        if name in program.constants:
            array = np.asarray(program.constants[name], order="C")
            draft.graph.initializer.append(numpy_helper.from_array(array, bound))
        elif program.is_weight(name):
            engine[bound] = name
    return engine


def _insert_expressions(draft: Draft, wanted: list[str], made: Collection[str]) -> list[str]:
    """Put the nodes that compute constant expressions in front of the main graph; the constants they read.

    What the activation graph makes too (``made``) gets a name of its own here.
    """
    nodes = draft.program.prune(wanted)
    rename = {name: draft.names.fresh(name) for node in nodes for name in node.output if name in made}
    read: list[str] = []
    for offset, node in enumerate(nodes):
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = draft.names.fresh(node.name)
        copy.input[:] = [rename.get(name, name) for name in node.input]
        copy.output[:] = [rename.get(name, name) for name in node.output]
        draft.graph.node.insert(offset, copy)
        read.extend(name for name in node.input if name in draft.program.constants)
    return read


def _is_bound(draft: Draft, name: str) -> bool:
    return name in draft.program.constants or draft.program.is_weight(name)


def _rename_inputs(nodes: Iterable[NodeProto], rename: dict[str, str]) -> None:
    for node in nodes:
        for index, name in enumerate(node.input):
            if name in rename:
                node.input[index] = rename[name]
