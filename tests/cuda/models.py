"""Models for the engine's tests, exported as people write them."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnx_refit.tensors import Array


def weight(name: str, *shape: int, seed: int = 0) -> onnx.TensorProto:
    rng = np.random.default_rng([seed, *name.encode()])
    return onnx.numpy_helper.from_array((rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32), name)


Shapes = dict[str, list[str | int | None]]


def make(nodes: list[onnx.NodeProto], inputs: Shapes, outputs: Shapes, **tensors: object) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        list(tensors.values()),  # type: ignore[arg-type]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def mlp() -> onnx.ModelProto:
    """x[N,8] through a transposed weight (a recipe) and a plain one; rows do not influence each other."""
    return make(
        [
            helper.make_node("Transpose", ["w0"], ["w0t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "w0t"], ["a"]),
            helper.make_node("Add", ["a", "b0"], ["b"]),
            helper.make_node("Relu", ["b"], ["c"]),
            helper.make_node("MatMul", ["c", "w1"], ["y"]),
        ],
        {"x": ["N", 8]},
        {"y": ["N", 4]},
        w0=weight("w0", 16, 8),
        b0=weight("b0", 16),
        w1=weight("w1", 16, 4),
    )


def wide_mlp() -> onnx.ModelProto:
    """x[N,8] through a hidden layer of 512 and one of 512 by 512: 1 MB, which counts as large."""
    return make(
        [
            helper.make_node("MatMul", ["x", "w0"], ["a"]),
            helper.make_node("Add", ["a", "b0"], ["b"]),
            helper.make_node("Relu", ["b"], ["c"]),
            helper.make_node("MatMul", ["c", "w1"], ["d"]),
            helper.make_node("MatMul", ["d", "w2"], ["y"]),
        ],
        {"x": ["N", 8]},
        {"y": ["N", 4]},
        w0=weight("w0", 8, 512),
        b0=weight("b0", 512),
        w1=weight("w1", 512, 512),
        w2=weight("w2", 512, 4),
    )


def rows_that_influence_each_other() -> onnx.ModelProto:
    """A Softmax over the dimension N: padding it changes the outputs."""
    return make(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"]),
            helper.make_node("Softmax", ["a"], ["y"], axis=0),
        ],
        {"x": ["N", 8]},
        {"y": ["N", 4]},
        w=weight("w", 8, 4),
    )


def random_like(weights: dict[str, Array], seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(array.shape) / np.sqrt(max(1, array.shape[-1]))).astype(array.dtype)
        for name, array in weights.items()
    }
