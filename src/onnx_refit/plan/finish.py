"""Finish: turn a draft into the compiled model, its shapes inferred and its dead nodes gone."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from onnx_refit.model.graph import reads, subgraphs
from onnx_refit.plan.compiled import CompiledModel, SourceWeight
from onnx_refit.plan.draft import Draft
from onnx_refit.tensors import TensorSpec, spec_of_value_info, value_info_of

_INLINE = 1 << 16  # constants up to this many bytes are shown to shape inference


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
    draft.graph.input.extend(value_info_of(spec) for spec in specs)
    activation = infer_shapes(draft.model)
    outputs = tuple(spec_of_value_info(value) for value in activation.graph.output)
    return CompiledModel(activation, program, sources, specs, inputs, outputs, tuple(draft.decisions))


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


def _restore_outputs(draft: Draft) -> None:
    """Give every graph output that is no longer made inside its graph an Identity node (Identity-1)."""
    for graph in list(draft.graphs()):
        made = {output for node in graph.node for output in node.output}
        made.update(value.name for value in graph.input)
        for value in graph.output:
            if value.name in made:
                continue
            source = value.name
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
    expressions = program.prune(pending)
    for offset, node in enumerate(expressions):
        draft.graph.node.insert(offset, node)
        read.update(dict.fromkeys(name for name in node.input if name))
    rename = {name: draft.names.fresh(f"{name}_weight") for name in read if name in outputs and _is_bound(draft, name)}
    if rename:
        _rename_inputs(draft.nodes(), rename)
    engine = {}
    for name in read:
        bound = rename.get(name, name)
        if name in program.constants:
            array = np.ascontiguousarray(program.constants[name])
            draft.graph.initializer.append(numpy_helper.from_array(array, bound))
        elif program.is_weight(name):
            engine[bound] = name
    return engine


def _is_bound(draft: Draft, name: str) -> bool:
    return name in draft.program.constants or draft.program.is_weight(name)


def _rename_inputs(nodes: Iterable[NodeProto], rename: dict[str, str]) -> None:
    for node in nodes:
        for index, name in enumerate(node.input):
            if name in rename:
                node.input[index] = rename[name]


def infer_shapes(model: ModelProto) -> ModelProto:
    """The model with the shapes of its values inferred; large constants are shown by shape only."""
    graph = model.graph
    large = [tensor for tensor in graph.initializer if tensor.ByteSize() > _INLINE]
    small = [tensor for tensor in graph.initializer if tensor.ByteSize() <= _INLINE]
    bare = ModelProto()
    bare.CopyFrom(model) if not large else _copy_without(model, bare, small)
    for tensor in large:
        bare.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return model
    if not large:
        return inferred
    del inferred.graph.input[len(graph.input) :]
    inferred.graph.initializer.extend(large)
    return inferred


def _copy_without(model: ModelProto, bare: ModelProto, kept: list[onnx.TensorProto]) -> None:
    bare.ir_version = model.ir_version
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    graph = bare.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    graph.initializer.extend(kept)
