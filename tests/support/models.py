"""Small models that several test folders share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_refit.tensors import Array

FEATURES, HIDDEN, CLASSES = 24, 40, 10


def mlp_weights(seed: int = 0) -> dict[str, Array]:
    """Weights of ``mlp``: w1 [24,40], b1 [40], w2 [40,10], b2 [10], float32."""
    rng = np.random.default_rng(seed)
    return {
        "w1": rng.standard_normal((FEATURES, HIDDEN)).astype(np.float32),
        "b1": rng.standard_normal(HIDDEN).astype(np.float32),
        "w2": rng.standard_normal((HIDDEN, CLASSES)).astype(np.float32),
        "b2": rng.standard_normal(CLASSES).astype(np.float32),
    }


def mlp(weights: Mapping[str, Array] | None = None) -> onnx.ModelProto:
    """relu(x @ w1 + b1) @ w2 + b2 for x [N, 24]."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="first"),
        helper.make_node("Add", ["a", "b1"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Gemm", ["c", "w2", "b2"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in (weights or mlp_weights()).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def mlp_reference(weights: Mapping[str, Array], x: Array) -> Array:
    """What ``mlp`` computes, in float64."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    hidden = np.maximum(x.astype(np.float64) @ w["w1"] + w["b1"], 0)
    result: Array = hidden @ w["w2"] + w["b2"]
    return result


def mlp_input(rows: int = 3, seed: int = 7) -> Array:
    """An input of ``mlp``: float32 [rows, 24]."""
    return np.random.default_rng(seed).standard_normal((rows, FEATURES)).astype(np.float32)


def conv_bn_weights(seed: int = 0) -> dict[str, Array]:
    """Weights of ``conv_bn``: w [8,3,3,3], scale, bias, mean, var [8], float32."""
    rng = np.random.default_rng(seed)
    return {
        "w": rng.standard_normal((8, 3, 3, 3)).astype(np.float32),
        "scale": rng.uniform(0.5, 1.5, 8).astype(np.float32),
        "bias": rng.standard_normal(8).astype(np.float32),
        "mean": rng.standard_normal(8).astype(np.float32),
        "var": rng.uniform(0.5, 1.5, 8).astype(np.float32),
    }


def conv_bn(weights: Mapping[str, Array] | None = None) -> onnx.ModelProto:
    """Conv -> BatchNormalization -> Relu for x [N, 3, 9, 9]: a fold, whose source weights cannot be read back."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3]),
        helper.make_node("BatchNormalization", ["c", "scale", "bias", "mean", "var"], ["d"]),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "conv_bn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 9, 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8, 7, 7])],
        [numpy_helper.from_array(array, name) for name, array in (weights or conv_bn_weights()).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
