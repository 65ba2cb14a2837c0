"""Weights, inputs and outputs of four bits an element: ONNX Runtime has two in a byte, NumPy one."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnx_refit.engine.onnxruntime.backend import create
from onnx_refit.engine.onnxruntime.options import OnnxRuntimeOptions
from onnx_refit.plan.compile import CompileOptions, compile_model
from onnx_refit.tensors import Array

from .zoo import n, weight

DTYPES = [ml_dtypes.int4, ml_dtypes.uint4]
Names = dict[str, tuple[int, list[int | str]]]


def four_bits(dtype: type, *shape: int, seed: int = 0) -> Array:
    low, high = (-8, 8) if dtype is ml_dtypes.int4 else (0, 16)
    made: Array = np.random.default_rng(seed).integers(low, high, shape).astype(dtype)
    return made


def model(
    nodes: list[onnx.NodeProto], inputs: Names, outputs: Names, weights: list[onnx.TensorProto]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, *entry) for name, entry in inputs.items()],
        [helper.make_tensor_value_info(name, *entry) for name, entry in outputs.items()],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("optimise", [True, False])
@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights(dtype: type, recurrent: bool, optimise: bool) -> None:
    rng = np.random.default_rng(0)
    first = four_bits(dtype, 33, 5)
    scale = onnx.numpy_helper.from_array(np.full((), 0.5, np.float32), "s")
    weights = [onnx.numpy_helper.from_array(first, "w"), scale]
    nodes = [n("DequantizeLinear", "w s", "d"), n("MatMul", "h d" if recurrent else "x d", "y")]
    if recurrent:
        weights += [weight(rng, "W", 1, 132, 33), weight(rng, "R", 1, 132, 33)]
        nodes = [n("LSTM", "x W R", "o", hidden_size=33), n("Squeeze", "o axes", "h"), *nodes]
        weights.append(onnx.numpy_helper.from_array(np.array([1], np.int64), "axes"))
    shape: list[int | str] = ["T", 1, 33] if recurrent else ["T", 33]
    result: list[int | str] = ["T", 1, 5] if recurrent else ["T", 5]
    made = model(nodes, {"x": (1, shape)}, {"y": (1, result)}, weights)
    compilation = compile_model(made, CompileOptions(refittable=("w",)))
    backend = create(compilation.compiled, None, OnnxRuntimeOptions(threads=1, optimise=optimise))
    x = rng.standard_normal([3 if d == "T" else int(d) for d in shape]).astype(np.float32)
    hidden = x
    if recurrent:
        part = model(nodes[:2], {"x": (1, shape)}, {"h": (1, ["T", 1, 33])}, weights[2:])
        other = compile_model(part)
        lstm = create(other.compiled, None, OnnxRuntimeOptions(threads=1))
        hidden = lstm.run(lstm.derive(other.weights), {"x": x})["h"]
        lstm.close()
    base = None
    for seed in range(4):
        w = four_bits(dtype, 33, 5, seed=seed)
        base = backend.derive({**compilation.weights, "w": w}, base)
        wanted = hidden @ (w.astype(np.float32) * np.float32(0.5))
        assert np.allclose(backend.run(base, {"x": x})["y"], wanted, atol=1e-4)
        assert base.full_speed.wait(60)
        assert np.allclose(backend.run(base, {"x": x})["y"], wanted, atol=1e-4)
        if "w" in backend.recoverable:
            assert np.array_equal(backend.recover(base, "w"), w)
    backend.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_the_refit_program_computes_with(dtype: type) -> None:
    shape = onnx.numpy_helper.from_array(np.array([15, 11], np.int64), "shape")
    scale = onnx.numpy_helper.from_array(np.full((), 0.5, np.float32), "s")
    w = four_bits(dtype, 11, 15)
    nodes = [n("Cast", "w", "c", to=TensorProto.FLOAT), n("Mul", "c s", "d"), n("Reshape", "d shape", "r")]
    made = model(
        [*nodes, n("MatMul", "x r", "y")],
        {"x": (1, ["M", 15])},
        {"y": (1, ["M", 11])},
        [onnx.numpy_helper.from_array(w, "w"), scale, shape],
    )
    compilation = compile_model(made, CompileOptions(refittable=("w",)))
    backend = create(compilation.compiled, None, OnnxRuntimeOptions(threads=1))
    x = np.eye(15, dtype=np.float32)
    got = backend.run(backend.derive(compilation.weights), {"x": x})["y"]
    assert np.allclose(got, w.astype(np.float32).reshape(15, 11) * np.float32(0.5))
    backend.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_and_outputs(dtype: type) -> None:
    kind = TensorProto.INT4 if dtype is ml_dtypes.int4 else TensorProto.UINT4
    rng = np.random.default_rng(0)
    one = onnx.numpy_helper.from_array(np.ones((), np.float32), "one")
    zero = onnx.numpy_helper.from_array(np.zeros((), dtype), "zero")
    made = model(
        [n("DequantizeLinear", "x one", "d"), n("QuantizeLinear", "d one zero", "q"), n("MatMul", "d w", "y")],
        {"x": (kind, ["M", 3])},
        {"q": (kind, ["M", 3]), "y": (1, ["M", 4])},
        [one, zero, weight(rng, "w", 3, 4)],
    )
    compilation = compile_model(made)
    backend = create(compilation.compiled, None, OnnxRuntimeOptions(threads=1))
    weights = backend.derive(compilation.weights)
    x = four_bits(dtype, 3, 5).T  # not contiguous
    got = backend.run(weights, {"x": x})
    assert got["q"].dtype == dtype
    assert np.array_equal(got["q"].astype(np.int8), x.astype(np.int8))
    assert np.allclose(got["y"], x.astype(np.float32) @ compilation.weights["w"], atol=1e-5)
    backend.close()
