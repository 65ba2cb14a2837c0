"""Hand-made graphs, and the one question every test of the compiler asks: does the compiled model still agree?"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnx_refit.plan.compile import Compilation, CompileOptions, compile_model
from onnx_refit.plan.compiled import CompiledModel, Verdict
from onnx_refit.plan.evaluate import evaluate, ort_value
from onnx_refit.tensors import Array, TensorSpec, dtype_name, numpy_dtype

node = helper.make_node


def array(seed: int, *shape: int, dtype: str = "float32") -> Any:
    values = np.random.default_rng(seed).standard_normal(shape)
    return np.asarray(values.astype(numpy_dtype(dtype)))


def positive(seed: int, *shape: int, dtype: str = "float32") -> Any:
    return np.asarray((np.abs(array(seed, *shape)) + 0.5).astype(numpy_dtype(dtype)))


def value(
    name: str, shape: Sequence[int | str | None] | None = None, dtype: int = TensorProto.FLOAT
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def graph(
    nodes: Sequence[NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Mapping[str, Array] | None = None,
    name: str = "g",
) -> GraphProto:
    tensors = [numpy_helper.from_array(np.asarray(a), key) for key, a in (weights or {}).items()]
    return helper.make_graph(list(nodes), name, list(inputs), list(outputs), tensors)


def model(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Sequence[int | str | None]],
    outputs: Sequence[str] | Mapping[str, Sequence[int | str | None]],
    weights: Mapping[str, Array] | None = None,
    opset: int = 17,
    *,
    contrib: bool = False,
    functions: Sequence[onnx.FunctionProto] = (),
) -> ModelProto:
    """A float32 model."""
    shapes = outputs if isinstance(outputs, Mapping) else {}
    declared = [value(name, shapes.get(name)) for name in outputs]
    body = graph(nodes, [value(k, s) for k, s in inputs.items()], declared, weights)
    domains = [helper.make_opsetid("", opset)] + ([helper.make_opsetid("com.microsoft", 1)] if contrib else [])
    if functions:
        domains.append(helper.make_opsetid("local", 1))
    return helper.make_model(body, opset_imports=domains, ir_version=8, functions=list(functions))


def run(proto: ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """Run without optimisations and without prepacking: a weight gives the same bits as initializer and as input."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    if any(a.dtype == object for a in feeds.values()):  # strings go in only this way
        return [np.asarray(result) for result in session.run(None, dict(feeds))]
    values = {name: ort_value(np.asarray(a)) for name, a in feeds.items()}  # holds what owns the memory
    results = session.run_with_ort_values(None, {name: value for name, (value, _) in values.items()})
    return [np.asarray(result.numpy()) for result in results]


def run_compiled(compiled: CompiledModel, weights: Mapping[str, Array], feeds: Mapping[str, Array]) -> list[Array]:
    return run(compiled.activation, {**feeds, **evaluate(compiled.program, weights)})


def substitute(proto: ModelProto, weights: Mapping[str, Array]) -> ModelProto:
    """The user's model with other weights: initializers, Constant and ConstantOfShape nodes, also in sub-graphs."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    _substitute(copy.graph, weights, "")
    return copy


def _substitute(body: GraphProto, weights: Mapping[str, Array], owner: str) -> None:
    def find(name: str) -> Array | None:
        qualified = weights.get(f"{owner}/{name}")
        return weights.get(name) if qualified is None else qualified

    for tensor in body.initializer:
        new = find(tensor.name)
        if new is not None:
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(new), tensor.name))
    for sparse in list(body.sparse_initializer):
        new = find(sparse.values.name)
        if new is not None:
            body.initializer.append(numpy_helper.from_array(np.asarray(new), sparse.values.name))
            body.sparse_initializer.remove(sparse)
    for inner in body.node:
        if inner.op_type in {"Constant", "ConstantOfShape"}:
            new = find(inner.output[0])
            if new is not None:
                inner.CopyFrom(node("Constant", [], [inner.output[0]], value=numpy_helper.from_array(np.asarray(new))))
        for attribute in inner.attribute:
            if attribute.type == AttributeProto.GRAPH:
                _substitute(attribute.g, weights, f"{inner.name}/{attribute.name}")


def random_weights(compiled: CompiledModel, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(1000 + seed)
    found = {}
    for source in compiled.sources:
        shape, kind = source.spec.static_shape, source.spec.dtype
        if kind in {"int8", "uint8", "int32"}:
            found[source.spec.name] = rng.integers(1, 100, shape).astype(numpy_dtype(kind))
            continue
        values = rng.standard_normal(shape)
        if any("(BatchNormalization)[4]" in use or "Sqrt" in use for use in source.uses):
            values = np.abs(values) + 0.5
        if any("QuantizeLinear)[1]" in use for use in source.uses):
            values = np.abs(values) * 0.01 + 0.01
        found[source.spec.name] = np.asarray(values.astype(numpy_dtype(kind)))
    return found


def assert_close(expected: Sequence[Array], got: Sequence[Array], rel: float) -> None:
    assert len(expected) == len(got)
    for left, right in zip(expected, got, strict=True):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        if rel == 0:
            np.testing.assert_array_equal(left, right)
        elif left.size:
            wide, other = left.astype(np.float64), right.astype(np.float64)
            assert np.abs(wide - other).max() <= rel * max(np.abs(wide).max(), 1e-30)


def check(
    proto: ModelProto,
    feeds: Mapping[str, Array],
    *,
    rel: float = 0.0,
    options: CompileOptions | None = None,
    seeds: Sequence[int] = (1, 2),
    sensitive: bool = True,
) -> Compilation:
    """Compile; the contract holds, and outputs agree with the user's model for its own and for random weights.

    ``rel`` 0 asks for equal bits. ``sensitive``: random weights must change the outputs, or the test shows nothing.
    """
    before = proto.SerializeToString()
    compilation = compile_model(proto, options)
    assert proto.SerializeToString() == before, "the compiler changed its argument"
    compiled = compilation.compiled
    assert_contract(compilation)
    first = run(proto, feeds)
    assert_close(first, run_compiled(compiled, compilation.weights, feeds), rel)
    for seed in seeds:
        weights = random_weights(compiled, seed)
        expected = run(substitute(proto, weights), feeds)
        if sensitive and weights:
            assert any(not np.array_equal(a, b) for a, b in zip(first, expected, strict=True))
        assert all(np.isfinite(e.astype(np.float64)).all() for e in expected if e.dtype.kind == "f")
        assert_close(expected, run_compiled(compiled, weights, feeds), rel)
    return compilation


def assert_contract(compilation: Compilation) -> None:
    compiled, weights = compilation.compiled, compilation.weights
    names = [spec.name for spec in compiled.engine_weights]
    activation = compiled.activation.graph
    assert [v.name for v in activation.input] == [*(spec.name for spec in compiled.inputs), *names]
    assert [v.name for v in activation.output] == [spec.name for spec in compiled.outputs]
    assert set(compiled.program.dependencies) == set(names)
    assert set(compiled.program.passthrough) <= set(names)
    sources = {source.spec.name: source for source in compiled.sources}
    assert set().union(*compiled.program.dependencies.values()) == set(sources)
    assert set(weights) == set(sources)
    for name, source in sources.items():
        assert weights[name].shape == source.spec.static_shape
        assert dtype_name(weights[name].dtype) == source.spec.dtype
        assert weights[name].flags.c_contiguous
    derived = evaluate(compiled.program, weights)
    for spec in compiled.engine_weights:
        assert derived[spec.name].shape == spec.static_shape
        assert dtype_name(derived[spec.name].dtype) == spec.dtype
    for name, source_name in compiled.program.passthrough.items():
        assert derived[name] is weights[source_name]
    if compiled.program.model is not None:
        onnx.checker.check_model(compiled.program.model, full_check=True)
        computed = {v.name for v in compiled.program.model.graph.output}
        assert computed == set(names) - set(compiled.program.passthrough)
    if all(entry.domain in {"", "ai.onnx", "ai.onnx.ml"} for entry in compiled.activation.opset_import):
        onnx.checker.check_model(compiled.activation)


def ops(compiled: CompiledModel) -> list[str]:
    """The operators of the activation graph, sub-graphs included, in order."""
    return _ops(compiled.activation.graph)


def _ops(body: GraphProto) -> list[str]:
    found = []
    for inner in body.node:
        found.append(inner.op_type)
        for attribute in inner.attribute:
            if attribute.type == AttributeProto.GRAPH:
                found.extend(_ops(attribute.g))
    return found


def program_ops(compiled: CompiledModel) -> list[str]:
    return [] if compiled.program.model is None else [n.op_type for n in compiled.program.model.graph.node]


def source_names(compiled: CompiledModel) -> set[str]:
    return {source.spec.name for source in compiled.sources}


def engine_spec(compiled: CompiledModel, name: str) -> TensorSpec:
    return next(spec for spec in compiled.engine_weights if spec.name == name)


def reasons(compiled: CompiledModel, verdict: Verdict) -> dict[str, str]:
    """Subject -> action and reason of the decisions with this verdict (the last of each subject)."""
    return {d.subject: f"{d.action}: {d.reason}" for d in compiled.decisions if d.verdict is verdict}


def optimiser_leftovers(compiled: CompiledModel, seed: int = 5) -> list[str]:
    """Initializers of the graph that ONNX Runtime's own optimiser makes whose values it computed from weights.

    The optimiser may rearrange engine weights, never calculate with them: every value of the result must be one of
    the values it was given.
    """
    derived = evaluate(compiled.program, random_weights(compiled, seed))
    baked = ModelProto()
    baked.CopyFrom(compiled.activation)
    kept = [v for v in baked.graph.input if v.name not in derived]
    del baked.graph.input[:]
    baked.graph.input.extend(kept)
    baked.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in derived.items())
    given = [numpy_helper.to_array(t).reshape(-1) for t in baked.graph.initializer]
    known = np.unique(np.concatenate([np.zeros(1), *(a.astype(np.float64) for a in given if a.dtype.kind in "fiu")]))
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        ort.InferenceSession(baked.SerializeToString(), options, providers=["CPUExecutionProvider"])
        optimised = onnx.load(options.optimized_model_filepath)
    return [
        tensor.name
        for tensor in optimised.graph.initializer
        if tensor.data_type not in {TensorProto.INT64, TensorProto.STRING}  # shapes are folded from static dimensions
        and not np.isin(numpy_helper.to_array(tensor).astype(np.float64), known).all()
    ]
