"""The blocked matrix product, alone, for sizes that need padding everywhere and every way to fuse."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from onnx_refit.engine.onnxruntime.backend import create
from onnx_refit.engine.onnxruntime.blocked import Matrix, block_size, blocked_matrix
from onnx_refit.engine.onnxruntime.native import make_session, session_options
from onnx_refit.engine.onnxruntime.nchwc import Rewritten, rewrite
from onnx_refit.engine.onnxruntime.packer import Packer
from onnx_refit.engine.onnxruntime.packing import packing
from onnx_refit.errors import EngineError
from onnx_refit.plan.compile import compile_model
from onnx_refit.plan.trace.compose import simplified
from onnx_refit.plan.trace.recipes import Operand, Piece, Recipe, Walk, c_strides, evaluate
from onnx_refit.tensors import Array, TensorSpec, spec_of, value_info_of

from .compiled_by_hand import relative_error
from .zoo import ints, model, n, weight, x_of

BLOCK = block_size()


def rewritten(
    nodes: list[onnx.NodeProto], shape: list[int | str], weights: list[onnx.TensorProto], outputs: int = 1
) -> tuple[Rewritten, onnx.ModelProto, dict[str, Array]]:
    made = model(nodes, [("x", shape)], [(f"y{k}" if k else "y", None) for k in range(outputs)], weights)
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in weights}
    inputs = onnx.ModelProto()
    inputs.CopyFrom(made)
    del inputs.graph.initializer[:]
    specs = {name: spec_of(name, array) for name, array in arrays.items()}
    inputs.graph.input.extend(value_info_of(spec) for spec in specs.values())
    inputs = onnx.shape_inference.infer_shapes(inputs)
    return rewrite(inputs, specs, lambda k, n, m: True, BLOCK), made, arrays


def compare(result: Rewritten, plain: onnx.ModelProto, arrays: dict[str, Array], inputs: dict[str, Array]) -> None:
    session = make_session(result.model, session_options(1))
    feeds = dict(inputs)
    for value in session.get_inputs():
        if value.name in result.recipes:
            feeds[value.name] = evaluate(result.recipes[value.name], lambda name: arrays[name].reshape(-1))
        elif value.name in arrays:
            feeds[value.name] = arrays[value.name]
    wanted = make_session(plain, session_options(1)).run(None, inputs)
    for got, right in zip(session.run(None, feeds), wanted, strict=True):
        assert got.shape == right.shape
        assert relative_error(got, right) < 1e-5


@pytest.mark.parametrize(
    "sizes", [(200, 200), (200, 10), (10, 200), (200, 1), (7, 5), (12, 8), (64, 300), (1, 16), (33, 17)]
)
@pytest.mark.parametrize("shape", [[3], [1], [2, 3], [2, 3, 5], [2, 3, 5, 2]])
def test_any_size_and_rank(sizes: tuple[int, int], shape: list[int]) -> None:
    k, columns = sizes
    weights = [weight(np.random.default_rng(0), "w", k, columns)]
    symbols: list[int | str] = [f"d{i}" for i in range(len(shape))]
    result, plain, arrays = rewritten([n("MatMul", "x w", "y")], [*symbols, k], weights)
    assert result.count == 1
    compare(result, plain, arrays, x_of(*shape, k))


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [None, (20,), (1, 20)])
def test_gemm(transposed: int, bias: tuple[int, ...] | None) -> None:
    rng = np.random.default_rng(0)
    weights = [weight(rng, "w", *((20, 12) if transposed else (12, 20)))]
    if bias:
        weights.append(weight(rng, "b", *bias))
    result, plain, arrays = rewritten(
        [n("Gemm", "x w b" if bias else "x w", "y", transB=transposed)], ["M", 12], weights
    )
    assert result.count == 1
    compare(result, plain, arrays, x_of(5, 12))


@pytest.mark.parametrize(
    "node",
    [
        *(n(op_type, "b", "y") for op_type in ("Relu", "Tanh", "Sigmoid", "Elu")),
        n("LeakyRelu", "b", "y", alpha=0.3),
        n("HardSigmoid", "b", "y", alpha=0.1, beta=0.4),
    ],
    ids=lambda node: node.op_type,
)
def test_bias_and_activation_behind(node: onnx.NodeProto) -> None:
    rng = np.random.default_rng(0)
    weights = [weight(rng, "w", 24, 20), weight(rng, "b0", 20)]
    result, plain, arrays = rewritten([n("MatMul", "x w", "a"), n("Add", "b0 a", "b"), node], ["B", "S", 24], weights)
    kinds = [made.op_type for made in result.model.graph.node]
    assert "Add" not in kinds
    assert (node.op_type in kinds) == (node.op_type == "Elu")
    compare(result, plain, arrays, x_of(2, 3, 24))


def test_values_between_products_stay_blocked() -> None:
    rng = np.random.default_rng(0)
    nodes = [n("MatMul", "x w0", "a"), n("Erf", "a", "b"), n("MatMul", "b w1", "y")]
    result, plain, arrays = rewritten(nodes, ["M", 12], [weight(rng, "w0", 12, 32), weight(rng, "w1", 32, 36)])
    kinds = [made.op_type for made in result.model.graph.node]
    assert kinds.count("ReorderInput") == kinds.count("ReorderOutput") == 1
    compare(result, plain, arrays, x_of(5, 12))


def test_an_infinite_input_reaches_only_what_it_reaches_in_the_model() -> None:
    rng = np.random.default_rng(0)
    weights = [weight(rng, "w0", 12, 21), weight(rng, "w1", 21, 36)]
    weights[0].CopyFrom(onnx.numpy_helper.from_array(np.abs(onnx.numpy_helper.to_array(weights[0])), "w0"))
    nodes = [n("MatMul", "x w0", "a"), n("Erf", "a", "b"), n("MatMul", "b w1", "y")]
    result, plain, arrays = rewritten(nodes, ["M", 12], weights)
    assert result.count == 2
    inputs = x_of(5, 12)
    inputs["x"][0, 0] = np.inf
    assert np.isfinite(make_session(plain, session_options(1)).run(None, inputs)[0]).all()
    compare(result, plain, arrays, inputs)


def test_a_value_read_by_others_too_is_written_plain_once() -> None:
    rng = np.random.default_rng(0)
    nodes = [n("MatMul", "x w0", "a"), n("MatMul", "a w1", "y"), n("Exp", "a", "y1"), n("Neg", "a", "y2")]
    result, plain, arrays = rewritten(nodes, ["M", 12], [weight(rng, "w0", 12, 20), weight(rng, "w1", 20, 36)], 3)
    kinds = [made.op_type for made in result.model.graph.node]
    assert kinds.count("ReorderOutput") == 2
    compare(result, plain, arrays, x_of(5, 12))


def test_three_products_of_one_value_reorder_it_once() -> None:
    rng = np.random.default_rng(0)
    nodes = [n("MatMul", f"x w{k}", "y" if not k else f"y{k}") for k in range(3)]
    result, plain, arrays = rewritten(nodes, ["B", "S", 32], [weight(rng, f"w{k}", 32, 32) for k in range(3)], 3)
    assert [made.op_type for made in result.model.graph.node].count("ReorderInput") == 1
    compare(result, plain, arrays, x_of(2, 3, 32))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [(64, 64), (64, 36), (40, 100), (7, 160)])
def test_the_packer_writes_what_the_recipe_says(sizes: tuple[int, int], transposed: bool) -> None:
    k, columns = sizes
    recipe = blocked_matrix("t", Matrix("w", k, columns, transposed), BLOCK)
    source = np.random.default_rng(0).standard_normal(k * columns).astype(np.float32)
    wanted = evaluate(recipe, {"w": source}.__getitem__).reshape(-1)
    found = packing(recipe, BLOCK)
    if k % BLOCK:
        assert found is None
        return
    assert found is not None
    got = np.zeros_like(wanted)
    Packer(BLOCK).mould(found, got).write({"w": source}.__getitem__)
    assert np.array_equal(got, wanted)


def test_sub_graphs_are_rewritten_too() -> None:
    rng = np.random.default_rng(0)
    branch = helper.make_graph([n("MatMul", "x w", "t")], "b", [], [helper.make_tensor_value_info("t", 1, None)])
    nodes = [
        n("ReduceMax", "x", "m", keepdims=0),
        n("Cast", "m", "c", to=onnx.TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
    ]
    result, plain, arrays = rewritten(nodes, ["M", 16], [weight(rng, "w", 16, 32)])
    assert result.count == 2
    compare(result, plain, arrays, x_of(3, 16))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(32, 48, 3, 3), (16, 16, 5, 1), (64, 16, 3, 3), (48, 64, 1, 1)])
def test_the_packer_writes_convolutions(shape: tuple[int, ...], scaled: bool) -> None:
    out, into, height, width = shape
    window = height * width
    dims = (out // BLOCK, into // BLOCK, window, BLOCK, BLOCK)
    rows = into * window
    operands = [Operand("w", Walk(0, (BLOCK * rows, BLOCK * window, 1, window, rows)))]
    if scaled:
        operands.append(Operand("s", Walk(3, (2 * BLOCK, 0, 0, 0, 2))))
    piece = simplified(Piece(dims, Walk(0, c_strides(dims)), tuple(operands)))
    recipe = Recipe(TensorSpec("t", "float32", shape), (piece,))
    rng = np.random.default_rng(0)
    tensors: dict[str, Array] = {"w": rng.standard_normal(out * rows).astype(np.float32)}
    tensors["s"] = rng.standard_normal(2 * out + 3).astype(np.float32)
    found = packing(recipe, BLOCK)
    assert found is not None
    assert (found.scale is not None) == scaled
    wanted = evaluate(recipe, tensors.__getitem__).reshape(-1)
    got = np.zeros_like(wanted)
    parts = list(found.parts(BLOCK, rows * BLOCK))
    assert len(parts) == out // BLOCK
    for begin, part in parts:
        Packer(BLOCK).mould(part, got[begin : begin + part.columns * rows]).write(tensors.__getitem__)
    assert np.array_equal(got, wanted)


@pytest.mark.parametrize("shape", [(-1, 3, 32), (2, -1, 32), (0, 2, 16)])
def test_reshapes_around_matrices_are_not_done_twice(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    weights = [weight(rng, "w", 12, 32), weight(rng, "v", 32, 36)]
    constants = [ints("flat", -1, 12), ints("wide", *shape), ints("again", -1, 32)]
    nodes = [n("Reshape", "x flat", "a"), n("Gemm", "a w", "b"), n("Reshape", "b wide", "y")]
    nodes += [n("Reshape", "y again", "c"), n("Gemm", "c v", "y1")]
    made = model(nodes, [("x", ["B", "S", 12])], [("y", None), ("y1", None)], [*weights, *constants])
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in weights}
    inputs = onnx.ModelProto()
    inputs.CopyFrom(made)
    del inputs.graph.initializer[:]
    inputs.graph.initializer.extend(constants)
    specs = {name: spec_of(name, array) for name, array in arrays.items()}
    inputs.graph.input.extend(value_info_of(spec) for spec in specs.values())
    result = rewrite(inputs, specs, lambda k, columns, m: True, BLOCK)
    reshapes = [node.op_type for node in result.model.graph.node].count("Reshape")
    assert reshapes == (4 if 0 in shape else 3)
    compare(result, made, arrays, x_of(2, 3, 12))


def test_a_matrix_behind_a_value_of_unknown_rank() -> None:
    rng = np.random.default_rng(0)
    weights = [weight(rng, "w", 12, 20), weight(rng, "v", 20, 36)]
    nodes = [n("Reshape", "x shape", "a"), n("MatMul", "a w", "b"), n("Reshape", "b flat", "c"), n("Gemm", "c v", "y")]
    made = model(nodes, [("x", ["M", 12])], [("y", None)], [*weights, ints("flat", -1, 20)])
    made.graph.input.append(helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, ["R"]))
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in weights}
    inputs = onnx.ModelProto()
    inputs.CopyFrom(made)
    del inputs.graph.initializer[:2]
    specs = {name: spec_of(name, array) for name, array in arrays.items()}
    inputs.graph.input.extend(value_info_of(spec) for spec in specs.values())
    result = rewrite(inputs, specs, lambda k, columns, m: True, BLOCK)
    assert result.count == 2
    compare(result, made, arrays, {**x_of(12, 12), "shape": np.array([2, 2, 3, 12], np.int64)})


@pytest.mark.parametrize("shape", [["M", "K"], ["B", "M", "K"]])
def test_rows_of_another_length_are_refused_and_not_cut_anew(shape: list[str]) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "free",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [*shape[:-1], 64])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    free = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    compilation = compile_model(free)
    backend = create(compilation.compiled, compilation.weights)
    weights = backend.derive(compilation.weights)
    good = np.ones([2] * (len(shape) - 1) + [64], np.float32)
    np.testing.assert_allclose(backend.run(weights, {"x": good})["y"], good @ weight, rtol=1e-4, atol=1e-4)
    with pytest.raises(EngineError):
        backend.run(weights, {"x": np.ones([16] * (len(shape) - 1) + [60], np.float32)})
    backend.close()
