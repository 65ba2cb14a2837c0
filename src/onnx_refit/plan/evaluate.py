"""Run a refit program: the plain way, for tests, checks and plans without a specialised engine.

The whole program runs as one ONNX Runtime session with every optimisation off. Where ONNX Runtime has no kernel for
an operator and dtype, the program runs node by node, those nodes in ONNX's reference evaluator.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnx_refit.errors import PlanError
from onnx_refit.plan.compiled import RefitProgram
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype, onnx_dtype, spec_of, spec_of_value_info, value_info_of

# Dtypes that ONNX Runtime's Python binding takes only as the bytes of another one.
_CARRIERS: dict[str, type[np.generic]] = {
    "bfloat16": np.uint16,
    "float8e4m3fn": np.uint8,
    "float8e5m2": np.uint8,
    "int4": np.uint8,
    "uint4": np.uint8,
}
PACKED = frozenset({"int4", "uint4"})
"""Dtypes of which ONNX Runtime has two elements in a byte and NumPy one."""


def affected(program: RefitProgram, changed: Collection[str]) -> frozenset[str]:
    """The engine weights that read at least one of the changed sources."""
    names = frozenset(changed)
    return frozenset(weight for weight, sources in program.dependencies.items() if sources & names)


def required(program: RefitProgram, wanted: Collection[str]) -> frozenset[str]:
    """The sources that the wanted engine weights are computed from."""
    return frozenset().union(*(program.dependencies[name] for name in wanted))


def select(program: RefitProgram, wanted: Collection[str]) -> RefitProgram:
    """The part of a program that computes the wanted engine weights, with nothing else in it.

    Raises:
        PlanError: a wanted name is no engine weight.
    """
    for name in wanted:
        if name not in program.dependencies:
            raise PlanError("the plan has no engine weight of this name", where=name)
    names = frozenset(wanted)
    passthrough = {name: source for name, source in program.passthrough.items() if name in names}
    dependencies = {name: sources for name, sources in program.dependencies.items() if name in names}
    computed = [name for name in program.dependencies if name in names and name not in passthrough]
    if not computed or program.model is None:
        return RefitProgram(None, passthrough, dependencies)
    return RefitProgram(_extract(program.model, computed), passthrough, dependencies)


def _extract(model: ModelProto, wanted: Collection[str]) -> ModelProto:
    live, nodes = set(wanted), []
    for node in reversed(model.graph.node):
        if any(output in live for output in node.output):
            live.update(name for name in node.input if name)
            nodes.append(node)
    graph = helper.make_graph(
        nodes[::-1],
        model.graph.name,
        [value for value in model.graph.input if value.name in live],
        [value for value in model.graph.output if value.name in wanted],
        [tensor for tensor in model.graph.initializer if tensor.name in live],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def evaluate(
    program: RefitProgram, sources: Mapping[str, Array], wanted: Collection[str] | None = None
) -> dict[str, Array]:
    """Engine weights from source weights.

    Args:
        program: the refit program.
        sources: source weight name -> array of the declared dtype and shape; at least those that the wanted engine
            weights read.
        wanted: the engine weights to compute; all by default.

    Returns:
        Engine weight name -> array. Those that need no work are the source arrays themselves.

    Raises:
        PlanError: a source is missing or a wanted name is no engine weight.
    """
    part = program if wanted is None else select(program, wanted)
    for weight, names in part.dependencies.items():
        for name in names:
            if name not in sources:
                raise PlanError(f"the engine weight {weight!r} needs it", where=f"source weight {name!r} is missing")
    computed = {} if part.model is None else run_model(part.model, sources)
    return {
        name: sources[part.passthrough[name]] if name in part.passthrough else computed[name]
        for name in part.dependencies
    }


def run_model(model: ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Run a model whose inputs and outputs have static shapes, unoptimised; output name -> array."""
    specs = [spec_of_value_info(value) for value in model.graph.output]
    try:
        session = _session(model)
    except _UNSUPPORTED:
        return _run_node_by_node(model, feeds)
    return _run_session(session, [value.name for value in model.graph.input], specs, feeds)


_UNSUPPORTED = (ort.capi.onnxruntime_pybind11_state.NotImplemented, ort.capi.onnxruntime_pybind11_state.InvalidGraph)


def _session(model: ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run_session(
    session: ort.InferenceSession, inputs: Iterable[str], outputs: Iterable[TensorSpec], feeds: Mapping[str, Array]
) -> dict[str, Array]:
    binding, owners, results = session.io_binding(), [], {}
    for name in inputs:
        value, owner = ort_value(feeds[name])
        owners.append(owner)
        binding.bind_ortvalue_input(name, value)
    for spec in outputs:
        value, owner = ort_value(np.empty(spec.static_shape, numpy_dtype(spec.dtype)))
        results[spec.name] = owner
        binding.bind_ortvalue_output(spec.name, value)
    session.run_with_iobinding(binding)
    specs = {spec.name: spec for spec in outputs}
    return {name: unpack(array, specs[name]) for name, array in results.items()}


def ort_value(array: Array) -> tuple[ort.OrtValue, Array]:
    """An OrtValue on the memory of an array, of any dtype of this project, and the array that owns that memory.

    The owner must live as long as the value. It is the array itself, or a copy where the array is not contiguous or
    where four-bit elements, one a byte in NumPy, are packed two a byte (ONNX Runtime then reads the first half).
    """
    spec = spec_of("", array)
    owner = np.asarray(array, order="C")
    carrier = _CARRIERS.get(spec.dtype)
    if carrier is None:
        return ort.OrtValue.ortvalue_from_numpy(owner), owner
    owner = pack(owner, np.zeros(owner.shape, np.uint8)) if spec.dtype in PACKED else owner
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(owner.view(carrier), onnx_dtype(spec.dtype)), owner


def pack(array: Array, packed: Array) -> Array:
    """Write four-bit elements two a byte, the first one low, into (the first half of) a contiguous uint8 array."""
    nibbles = array.astype(np.uint8).reshape(-1) & 15
    flat = packed.reshape(-1)
    flat[: (nibbles.size + 1) // 2] = nibbles[0::2]
    flat[: nibbles.size // 2] |= nibbles[1::2] << 4
    return packed


def unpack(array: Array, spec: TensorSpec) -> Array:
    """The elements that ONNX Runtime wrote for this spec, as NumPy has them: the array itself or an unpacked one."""
    if spec.dtype not in PACKED:
        return array
    flat = array.reshape(-1).view(np.uint8)[: (spec.size + 1) // 2]
    nibbles = np.stack([flat & 15, flat >> 4], axis=1).reshape(-1)[: spec.size].astype(np.int8)
    signed = np.where(nibbles > 7, nibbles - 16, nibbles) if spec.dtype == "int4" else nibbles
    return signed.astype(numpy_dtype(spec.dtype)).reshape(spec.static_shape)


def _run_node_by_node(model: ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    typed = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    specs = {value.name: spec_of_value_info(value) for value in (*typed.value_info, *typed.output)}
    values: dict[str, Array] = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    values.update({value.name: feeds[value.name] for value in model.graph.input})
    for node in model.graph.node:
        read = dict.fromkeys(name for name in node.input if name)
        outputs = [specs[name] for name in node.output if name]
        single = helper.make_model(
            helper.make_graph(
                [node],
                "node",
                [value_info_of(spec_of(name, values[name])) for name in read],
                [value_info_of(spec) for spec in outputs],
            ),
            opset_imports=model.opset_import,
            ir_version=model.ir_version,
        )
        try:
            values.update(_run_session(_session(single), read, outputs, values))
        except _UNSUPPORTED:
            values.update(_run_reference(single, node, values))
    return {value.name: values[value.name] for value in model.graph.output}


def _run_reference(model: ModelProto, node: NodeProto, values: Mapping[str, Array]) -> dict[str, Array]:
    results = ReferenceEvaluator(model).run(None, {name: values[name] for name in node.input if name})
    names = [name for name in node.output if name]
    return {name: np.asarray(result) for name, result in zip(names, results, strict=True)}
