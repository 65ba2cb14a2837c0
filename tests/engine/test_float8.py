"""Weights, inputs and outputs of eight-bit floats: one of the two is of NumPy's kind for ordinary floats."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnx import helper, numpy_helper

import onnx_refit
from onnx_refit.cli.running import write_outputs
from onnx_refit.tensors import Array, dtype_name, onnx_dtype

DTYPES = [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


def values(dtype: type, seed: int) -> Array:
    return np.asarray(np.random.default_rng(seed).standard_normal((4, 6)).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_inputs_and_outputs(dtype: type) -> None:
    kind = onnx_dtype(dtype_name(dtype))
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["w"], ["w32"], to=1),
            helper.make_node("Cast", ["x"], ["x32"], to=1),
            helper.make_node("Add", ["x32", "w32"], ["y"]),
            helper.make_node("Cast", ["y"], ["y8"], to=kind),
        ],
        "g",
        [helper.make_tensor_value_info("x", kind, [4, 6])],
        [helper.make_tensor_value_info("y", 1, [4, 6]), helper.make_tensor_value_info("y8", kind, [4, 6])],
        [numpy_helper.from_array(values(dtype, 0), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = values(dtype, 1)
    with onnx_refit.load(onnx_refit.build(model)) as engine:
        for seed in (0, 2):
            w = values(dtype, seed)
            engine.refit({"w": w})
            outputs = engine.run({"x": x})
            expected = x.astype(np.float32) + w.astype(np.float32)
            assert np.array_equal(outputs["y"], expected)
            assert outputs["y8"].dtype == dtype
            assert outputs["y8"].tobytes() == expected.astype(dtype).tobytes()


@pytest.mark.parametrize("dtype", [*DTYPES, ml_dtypes.bfloat16])
def test_outputs_are_written_as_float32(dtype: type, tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    write_outputs(path, {"y": values(dtype, 3)})
    with np.load(path, allow_pickle=False) as file:
        assert file["y"].dtype == np.float32
        assert np.array_equal(file["y"], values(dtype, 3).astype(np.float32))
