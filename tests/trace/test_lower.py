"""Refit programs as recipes, against ONNX Runtime: slices of every kind, parts of weights, scalars."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from onnx import helper

from onnx_refit.engine.onnxruntime.backend import create
from onnx_refit.engine.onnxruntime.options import OnnxRuntimeOptions
from onnx_refit.plan.compile import CompileOptions, compile_model
from onnx_refit.plan.compiled import CompiledModel, RefitProgram, SourceWeight
from onnx_refit.plan.trace.lower import lower
from onnx_refit.plan.trace.recipes import evaluate
from onnx_refit.tensors import Array, TensorSpec

LEAST, MOST = -(2**63), 2**63 - 1
node = helper.make_node
bound = st.one_of(st.integers(-9, 9), st.sampled_from([LEAST, LEAST + 1, -(2**31), 2**31 - 1, MOST]))
step = st.one_of(st.integers(-4, 4), st.sampled_from([LEAST, MOST])).filter(bool)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def model(
    nodes: list[onnx.NodeProto], inputs: dict[str, Array], constants: dict[str, Array], outputs: list[str]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, 1, array.shape) for name, array in inputs.items()],
        [helper.make_tensor_value_info(name, 1, None) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def by_onnxruntime(made: onnx.ModelProto, inputs: dict[str, Array]) -> Array:
    result: Array = ort.InferenceSession(made.SerializeToString()).run(None, inputs)[0]
    return result


@given(st.lists(st.tuples(bound, bound, step), min_size=1, max_size=2), st.integers(1, 7))
@example([(31, -100, -2)], 7)
@example([(MOST, LEAST, -1)], 5)
@example([(-100, LEAST, -1)], 5)
@settings(max_examples=300, deadline=None)
def test_slices(cuts: list[tuple[int, int, int]], extent: int) -> None:
    w = np.arange(extent * 5, dtype=np.float32).reshape(extent, 5)
    constants = {"s": ints(*(c[0] for c in cuts)), "e": ints(*(c[1] for c in cuts)), "t": ints(*(c[2] for c in cuts))}
    constants["a"] = ints(*range(len(cuts)))
    made = model([node("Slice", ["w", "s", "e", "a", "t"], ["v"])], {"w": w}, constants, ["v"])
    wanted = by_onnxruntime(made, {"w": w})
    assume(wanted.size)
    typed = onnx.shape_inference.infer_shapes(made, data_prop=True)
    spec, source = TensorSpec("v", "float32", wanted.shape), TensorSpec("w", "float32", w.shape)
    program = RefitProgram(typed, {}, {"v": frozenset({"w"})})
    compiled = CompiledModel(made, program, (SourceWeight(source, ()),), (spec,), (), ())
    recipe = lower(compiled).recipes["v"]
    if recipe.sources != {"w"}:
        return  # computed by ONNX Runtime itself
    assert (evaluate(recipe, {"w": w.reshape(-1)}.__getitem__) == wanted).all()


def test_a_slice_that_runs_past_both_ends_is_no_work_for_the_engine() -> None:
    w = np.arange(14, dtype=np.float32).reshape(2, 7)
    constants = {"s": ints(MOST), "e": ints(LEAST), "a": ints(1), "t": ints(-2)}
    made = model([node("Slice", ["w", "s", "e", "a", "t"], ["v"])], {"w": w}, constants, ["v"])
    typed = onnx.shape_inference.infer_shapes(made, data_prop=True)
    spec, source = TensorSpec("v", "float32", (2, 4)), TensorSpec("w", "float32", w.shape)
    program = RefitProgram(typed, {}, {"v": frozenset({"w"})})
    recipe = lower(CompiledModel(made, program, (SourceWeight(source, ()),), (spec,), (), ())).recipes["v"]
    assert recipe.sources == {"w"}
    assert (evaluate(recipe, {"w": w.reshape(-1)}.__getitem__) == w[:, ::-2]).all()


def random(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


THIRDS = ints(32, 32, 32)
PARTS = {
    "rows": (
        [node("Slice", ["w", "s", "e", "a"], ["p"]), node("Add", ["x", "p"], ["y"])],
        random(3, 32),
        {"w": random(512, 32), "s": ints(0), "e": ints(3), "a": ints(0)},
    ),
    "bias": (
        [
            node("Split", ["w", "n"], ["q", "k", "v"], axis=0),
            node("Add", ["x", "q"], ["b"]),
            node("Mul", ["b", "k"], ["c"]),
            node("Add", ["c", "v"], ["y"]),
        ],
        random(5, 32),
        {"w": random(96), "n": THIRDS},
    ),
    "projection": (
        [
            node("Split", ["w", "n"], ["q", "k", "v"], axis=0),
            node("MatMul", ["q", "x"], ["b"]),
            node("MatMul", ["k", "x"], ["c"]),
            node("Add", ["b", "c"], ["y"]),
        ],
        random(32, 5),
        {"w": random(96, 32), "n": THIRDS},
    ),
    "one": (
        [node("Gather", ["w", "i"], ["q"]), node("Add", ["x", "q"], ["y"])],
        random(4, 32),
        {"w": random(2, 32), "i": np.array(0, np.int64)},
    ),
    "filters": (
        [node("Slice", ["w", "s", "e", "a"], ["p"]), node("Conv", ["x", "p"], ["y"])],
        random(1, 3, 8, 8),
        {"w": random(8, 3, 3, 3), "s": ints(0), "e": ints(5), "a": ints(0)},
    ),
    "turned": (
        [
            node("Transpose", ["w"], ["t"]),
            node("Slice", ["t", "s", "e", "a"], ["p"]),
            node("MatMul", ["x", "p"], ["y"]),
        ],
        random(4, 8),
        {"w": random(24, 16), "s": ints(0), "e": ints(8), "a": ints(0)},
    ),
}


@pytest.mark.parametrize("optimise", [True, False])
@pytest.mark.parametrize("name", PARTS)
def test_the_leading_part_of_a_weight(name: str, optimise: bool) -> None:
    nodes, x, constants = PARTS[name]
    made = model(nodes, {"x": x}, constants, ["y"])
    compilation = compile_model(made)
    backend = create(compilation.compiled, None, OnnxRuntimeOptions(threads=1, optimise=optimise))
    for factor in (1, 2):
        weights = {key: array * np.float32(factor) for key, array in compilation.weights.items()}
        wanted = by_onnxruntime(model(nodes, {"x": x}, {**constants, **weights}, ["y"]), {"x": x})
        got = backend.run(backend.derive(weights), {"x": x})["y"]
        assert np.allclose(got, wanted, rtol=1e-4, atol=1e-4)
    backend.close()


@pytest.mark.parametrize("kind", ["Mul", "Div"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_refittable_scalar_behind_a_product(kind: str, shape: tuple[int, ...]) -> None:
    x = random(3, 8)
    nodes = [node("MatMul", ["x", "w"], ["p"]), node(kind, ["p", "s"], ["y"])]
    constants = {"w": random(8, 64), "s": np.full(shape, 8, np.float32)}
    compilation = compile_model(model(nodes, {"x": x}, constants, ["y"]), CompileOptions(refittable=("s",)))
    backend = create(compilation.compiled, None, OnnxRuntimeOptions(threads=1))
    weights = {key: np.asarray(array * np.float32(3)) for key, array in compilation.weights.items()}
    assert "s" in weights
    wanted = by_onnxruntime(model(nodes, {"x": x}, {**constants, **weights}, ["y"]), {"x": x})
    assert np.allclose(backend.run(backend.derive(weights), {"x": x})["y"], wanted, rtol=1e-4, atol=1e-4)
    backend.close()
