"""Weights of many dtypes, a model and shards that hold them, and their comparison with what a reader gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from onnx_refit.weights.source import WeightSource, read_all

ARRAYS: dict[str, Any] = {
    "w": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.linspace(-1, 1, 5).astype(np.float16),
    "bf": np.linspace(-2, 2, 6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "f8": np.array([0.5, -1.5], ml_dtypes.float8_e4m3fn),
    "count": np.array(7, np.int64),
    "mask": np.array([True, False]),
    "none": np.zeros((0, 3), np.float32),
}


def same(source: WeightSource, expected: dict[str, Any]) -> None:
    got = dict(read_all(source))
    assert sorted(got) == sorted(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        assert got[name].shape == array.shape == source.specs[name].shape
        assert got[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


def write_shards(directory: Path) -> Path:
    save_file({"a": ARRAYS["w"]}, directory / "model-1.safetensors")
    save_file({"b": ARRAYS["half"]}, directory / "model-2.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    )
    return index


def onnx_model(**external: str) -> onnx.ModelProto:
    w = numpy_helper.from_array(ARRAYS["w"], "w")
    typed = helper.make_tensor("typed", TensorProto.FLOAT, [2], [1.5, 2.5])
    half = helper.make_tensor("half", TensorProto.FLOAT16, [2], np.array([1, 2], np.float16))
    packed = helper.make_tensor("packed", TensorProto.INT4, [3], [1, -2, 3])
    text = numpy_helper.from_array(np.array(["hello"], object), "text")
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["branch"], value=numpy_helper.from_array(np.ones(2, np.float32)))],
        "then",
        [],
        [helper.make_tensor_value_info("branch", TensorProto.FLOAT, [2])],
    )
    nodes = [
        helper.make_node("Constant", [], ["const"], value=numpy_helper.from_array(np.full((2, 2), 3, np.float32))),
        helper.make_node("Constant", [], ["floats"], value_floats=[1.0, 2.0]),
        helper.make_node("Constant", [], ["shape"], value_ints=[2, 3]),
        helper.make_node("ConstantOfShape", ["shape"], ["filled"], value=helper.make_tensor("v", 1, [1], [5.0])),
        helper.make_node("If", ["cond"], ["out"], then_branch=inner, else_branch=inner),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [w, typed, half, packed, text],
    )
    return helper.make_model(graph)


ONNX_ARRAYS: dict[str, Any] = {
    "w": ARRAYS["w"],
    "typed": np.array([1.5, 2.5], np.float32),
    "half": np.array([1, 2], np.float16),
    "packed": np.array([1, -2, 3], ml_dtypes.int4),
    "const": np.full((2, 2), 3, np.float32),
    "floats": np.array([1, 2], np.float32),
    "shape": np.array([2, 3]),
    "filled": np.full((2, 3), 5, np.float32),
    "branch": np.ones(2, np.float32),
}


def external_model(directory: Path) -> Path:
    path = directory / "m.onnx"
    onnx.save(onnx_model(), path, save_as_external_data=True, location="m.data", size_threshold=0)
    return path
