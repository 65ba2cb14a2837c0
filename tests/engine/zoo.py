"""Small models of the structures that the engine treats each in their own way, with inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from onnx_refit.tensors import Array

Case = tuple[onnx.ModelProto, dict[str, Array]]


def weight(rng: np.random.Generator, name: str, *shape: int, positive: bool = False) -> onnx.TensorProto:
    """A random initializer of a size that keeps activations in range."""
    fan = shape[0] if len(shape) < 3 else int(np.prod(shape[1:]))
    array = (rng.standard_normal(shape) / np.sqrt(fan)).astype(np.float32)
    return onnx.numpy_helper.from_array(np.abs(array) + np.float32(0.5) if positive else array, name)


def model(
    nodes: Sequence[NodeProto],
    inputs: Sequence[tuple[str, Sequence[int | str]]],
    outputs: Sequence[tuple[str, Sequence[int | str] | None]],
    initializers: Sequence[onnx.TensorProto],
    opset: int = 17,
) -> onnx.ModelProto:
    """A float32 model."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        list(initializers),
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def ints(name: str, *values: int) -> onnx.TensorProto:
    """An int64 constant."""
    return onnx.numpy_helper.from_array(np.array(values, np.int64), name)


def n(op_type: str, inputs: str, outputs: str, **attributes: Any) -> NodeProto:
    """A node; names separated by blanks."""
    return helper.make_node(op_type, inputs.split(), outputs.split(), **attributes)


def x_of(*shape: int) -> dict[str, Array]:
    return {"x": np.random.default_rng(9).standard_normal(shape).astype(np.float32)}


def chain() -> Case:
    """Three layers, the values between them read by nobody else."""
    r = np.random.default_rng(0)
    nodes = [
        n("MatMul", "x w0", "a"), n("Add", "a b0", "b"), n("Relu", "b", "c"),
        n("MatMul", "c w1", "d"), n("Add", "d b1", "e"), n("Tanh", "e", "f"),
        n("MatMul", "f w2", "g"), n("Add", "g b2", "h"), n("Sigmoid", "h", "y"),
    ]  # fmt: skip
    w = [weight(r, "w0", 40, 72), weight(r, "b0", 72), weight(r, "w1", 72, 30), weight(r, "b1", 30)]
    w += [weight(r, "w2", 30, 20), weight(r, "b2", 20)]
    return model(nodes, [("x", ["M", 40])], [("y", ["M", 20])], w), x_of(5, 40)


def feed_forward() -> Case:
    """A transformer's block of rank 3 with GELU written out, transposed weights and a residual."""
    r = np.random.default_rng(1)
    nodes = [
        n("Transpose", "w0", "w0t", perm=[1, 0]), n("MatMul", "x w0t", "a"), n("Add", "b0 a", "b"),
        n("Div", "b sqrt2", "c"), n("Erf", "c", "d"), n("Add", "d one", "e"),
        n("Mul", "b e", "f"), n("Mul", "f half", "g"),
        n("Transpose", "w1", "w1t", perm=[1, 0]), n("MatMul", "g w1t", "h"), n("Add", "h b1", "i"),
        n("Add", "i x", "j"), n("LayerNormalization", "j s t", "y"),
    ]  # fmt: skip
    scalars = [("sqrt2", np.sqrt(2.0)), ("one", 1.0), ("half", 0.5)]
    w = [onnx.numpy_helper.from_array(np.array(v, np.float32), name) for name, v in scalars]
    w += [weight(r, "w0", 96, 32), weight(r, "b0", 96), weight(r, "w1", 32, 96), weight(r, "b1", 32)]
    w += [weight(r, "s", 32), weight(r, "t", 32)]
    return model(nodes, [("x", ["B", "S", 32])], [("y", ["B", "S", 32])], w), x_of(2, 7, 32)


def ranks() -> Case:
    """Products of rank 4, and of a rank that shape inference does not see."""
    r = np.random.default_rng(2)
    nodes = [
        n("MatMul", "x w0", "a"),
        n("Reshape", "a shape", "b"),
        n("MatMul", "b w1", "y"),
    ]
    w = [weight(r, "w0", 20, 48), weight(r, "w1", 24, 32)]
    made = model(nodes, [("x", ["A", 3, "C", 20])], [("y", None)], w)
    made.graph.input.append(helper.make_tensor_value_info("shape", TensorProto.INT64, ["R"]))
    return made, {**x_of(2, 3, 5, 20), "shape": np.array([5, -1, 2, 3, 24], np.int64)}


def gemms() -> Case:
    """Gemm with both transposes, scales and missing biases; a bias of shape [1, N]."""
    r = np.random.default_rng(3)
    nodes = [
        n("Gemm", "x w0 b0", "a", transB=1), n("LeakyRelu", "a", "b", alpha=0.2),
        n("Gemm", "b w1", "c", alpha=0.5), n("Transpose", "c", "ct", perm=[1, 0]),
        n("Gemm", "ct w2 b2", "d", transA=1, beta=2.0), n("HardSigmoid", "d", "y"),
    ]  # fmt: skip
    w = [weight(r, "w0", 64, 24), weight(r, "b0", 1, 64), weight(r, "w1", 64, 36), weight(r, "w2", 36, 17)]
    return model(nodes, [("x", ["M", 24])], [("y", ["M", 17])], [*w, weight(r, "b2", 17)]), x_of(6, 24)


def convolutions() -> Case:
    """Convolutions with BatchNormalization, of few and of odd channels, depthwise, transposed; a lone scale."""
    r = np.random.default_rng(4)
    nodes, w, value, channels = [], [], "x", 3
    for k, (out, group, size) in enumerate([(20, 1, 3), (20, 20, 3), (48, 1, 1), (32, 4, 3)]):
        nodes += [
            n("Conv", f"{value} w{k}", f"c{k}", kernel_shape=[size, size], pads=[size // 2] * 4, group=group),
            n("BatchNormalization", f"c{k} s{k} b{k} m{k} v{k}", f"n{k}"),
            n("Relu", f"n{k}", f"r{k}"),
        ]
        w += [weight(r, f"w{k}", out, channels // group, size, size), weight(r, f"s{k}", out), weight(r, f"b{k}", out)]
        w += [weight(r, f"m{k}", out), weight(r, f"v{k}", out, positive=True)]
        value, channels = f"r{k}", out
    nodes += [
        n("ConvTranspose", f"{value} wt bt", "t", strides=[2, 2], kernel_shape=[2, 2]),
        n("GlobalAveragePool", "t", "p"), n("Flatten", "p", "q"), n("Gemm", "q wf bf", "y", transB=1),
    ]  # fmt: skip
    w += [weight(r, "wt", 32, 24, 2, 2), weight(r, "bt", 24), weight(r, "wf", 10, 24), weight(r, "bf", 10)]
    return model(nodes, [("x", ["N", 3, 12, 12])], [("y", ["N", 10])], w), x_of(2, 3, 12, 12)


def recurrent(kind: str = "LSTM", gates: int = 4) -> Case:
    """A bidirectional recurrence between two products."""
    r = np.random.default_rng(5)
    nodes = [
        n("MatMul", "x w0", "a"),
        n(kind, "a W R B", "b", hidden_size=12, direction="bidirectional"),
        n("Transpose", "b", "c", perm=[0, 2, 1, 3]), n("Reshape", "c flat", "d"), n("MatMul", "d w1", "y"),
    ]  # fmt: skip
    w = [weight(r, "w0", 20, 16), weight(r, "W", 2, gates * 12, 16), weight(r, "R", 2, gates * 12, 12)]
    w += [weight(r, "B", 2, 2 * gates * 12), ints("flat", 0, 0, -1), weight(r, "w1", 24, 32)]
    return model(nodes, [("x", ["T", "N", 20])], [("y", ["T", "N", 32])], w), x_of(6, 2, 20)


def branches() -> Case:
    """Weights that only a branch of an If reads, one of them in its own initializers."""
    r = np.random.default_rng(6)
    then = helper.make_graph(
        [
            n("Conv", "x wc", "u", pads=[1] * 4), n("ReduceMean", "u", "v", axes=[2, 3], keepdims=0),
            n("Gemm", "v w1 b1", "t"),
        ],
        "then", [], [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )  # fmt: skip
    other = helper.make_graph(
        [n("Flatten", "x", "f"), n("MatMul", "f w2", "g"), n("Add", "g own", "e")],
        "else", [], [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)], [weight(r, "own", 32)],
    )  # fmt: skip
    nodes = [
        n("ReduceSum", "x", "sum", keepdims=0),
        n("Greater", "sum zero", "positive"),
        helper.make_node("If", ["positive"], ["z"], then_branch=then, else_branch=other),
        n("MatMul", "z w3", "y"),
    ]
    w = [weight(r, "wc", 32, 16, 3, 3), weight(r, "w1", 32, 32), weight(r, "b1", 32), weight(r, "w2", 16 * 36, 32)]
    w += [weight(r, "w3", 32, 40), onnx.numpy_helper.from_array(np.array(0, np.float32), "zero")]
    return model(nodes, [("x", [1, 16, 6, 6])], [("y", [1, 40])], w), x_of(1, 16, 6, 6)


def tied() -> Case:
    """An embedding that is also, transposed, the last product; q, k and v concatenated by the model."""
    r = np.random.default_rng(7)
    nodes = [
        n("Gather", "emb ids", "a"), n("Concat", "q k v", "qkv", axis=1), n("MatMul", "a qkv", "b"),
        n("Slice", "b from to axes", "c"), n("Transpose", "emb", "embt", perm=[1, 0]), n("MatMul", "c embt", "y"),
    ]  # fmt: skip
    w = [weight(r, "emb", 100, 32), *(weight(r, k, 32, 32) for k in "qkv"), ints("from", 32), ints("to", 64)]
    made = model(nodes, [], [("y", ["M", 100])], [*w, ints("axes", 1)])
    made.graph.input.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["M"]))
    return made, {"ids": np.array([3, 99, 0, 41], np.int64)}


def half() -> Case:
    """A float16 model, which ONNX Runtime computes in float32 between casts, large enough to be packed."""
    r = np.random.default_rng(8)
    nodes = [
        n("Cast", "x", "h", to=TensorProto.FLOAT16), n("MatMul", "h w0", "a"), n("Add", "a b0", "b"),
        n("Relu", "b", "c"), n("MatMul", "c w1", "d"), n("Cast", "d", "y", to=TensorProto.FLOAT),
    ]  # fmt: skip
    w = [weight(r, "w0", 64, 96), weight(r, "b0", 96), weight(r, "w1", 96, 80)]
    halves = [onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(t).astype(np.float16), t.name) for t in w]
    return model(nodes, [("x", ["M", 64])], [("y", ["M", 80])], halves), x_of(5, 64)


def keras() -> Case:
    """As tf2onnx writes a Keras model: NHWC outside, kernels [H, W, I, O] turned by nodes, BatchNorm fused.

    Convolutions between Transposes, biases as Add behind Reshape, FusedBatchNorm as Mul and Add of weights, Gemm with
    transB, a depthwise kernel reshaped, and an LSTM whose gates are split off one kernel, reordered and turned.
    """
    r = np.random.default_rng(10)
    nodes = [
        n("Transpose", "x", "xt", perm=[0, 3, 1, 2]),
        n("Transpose", "k0", "k0t", perm=[3, 2, 0, 1]),
        n("Conv", "xt k0t", "c0", pads=[1] * 4),
        n("Reshape", "bias0 bshape", "b0"), n("Add", "c0 b0", "a0"),
        n("Mul", "a0 g0", "m0"), n("Add", "m0 h0", "bn0"), n("Relu", "bn0", "r0"),
        n("Transpose", "k1", "k1t", perm=[2, 3, 0, 1]), n("Reshape", "k1t dshape", "k1d"),
        n("Conv", "r0 k1d", "c1", group=16, pads=[1] * 4), n("Mul", "c1 g1", "m1"), n("Add", "m1 h1", "bn1"),
        n("Clip", "bn1 zero six", "r1"),
        n("Transpose", "r1", "back", perm=[0, 2, 3, 1]), n("Reshape", "back rows", "steps"),
        n("MatMul", "steps w2", "p2"), n("Add", "p2 b2", "q2"), n("Transpose", "q2", "seq", perm=[1, 0, 2]),
        n("Split", "kernel four", "ki kf kc ko", axis=1), n("Concat", "ki ko kf kc", "kernel4", axis=1),
        n("Transpose", "kernel4", "kernelt", perm=[1, 0]), n("Unsqueeze", "kernelt first", "W"),
        n("Split", "inner four", "ri rf rc ro", axis=1), n("Concat", "ri ro rf rc", "inner4", axis=1),
        n("Transpose", "inner4", "innert", perm=[1, 0]), n("Unsqueeze", "innert first", "R"),
        n("Concat", "lbias lzero", "lb", axis=0), n("Unsqueeze", "lb first", "B"),
        n("LSTM", "seq W R B", "h", hidden_size=12), n("Squeeze", "h second", "s"), n("Gather", "s last", "e", axis=0),
        n("Gemm", "e w3 b3", "g", transB=1), n("Transpose", "w4", "w4t", perm=[1, 0]), n("MatMul", "g w4t", "z"),
        n("Add", "z b4", "l"), n("Softmax", "l", "y", axis=-1),
    ]  # fmt: skip
    w = [weight(r, "k0", 3, 3, 4, 16), weight(r, "bias0", 16), weight(r, "g0", 1, 16, 1, 1, positive=True)]
    w += [weight(r, "h0", 1, 16, 1, 1), weight(r, "k1", 3, 3, 16, 1), weight(r, "g1", 1, 16, 1, 1, positive=True)]
    w += [weight(r, "h1", 1, 16, 1, 1), weight(r, "w2", 16, 20), weight(r, "b2", 20), weight(r, "kernel", 20, 48)]
    w += [weight(r, "inner", 12, 48), weight(r, "lbias", 48), weight(r, "w3", 32, 12), weight(r, "b3", 32)]
    w += [weight(r, "w4", 24, 32), weight(r, "b4", 24)]
    w += [
        ints("bshape", 1, 16, 1, 1),
        ints("dshape", 16, 1, 3, 3),
        ints("rows", 0, -1, 16),
        ints("four", 12, 12, 12, 12),
    ]
    w += [ints("first", 0), ints("second", 1), onnx.numpy_helper.from_array(np.array(-1, np.int64), "last")]
    w += [onnx.numpy_helper.from_array(np.zeros(48, np.float32), "lzero")]
    w += [onnx.numpy_helper.from_array(np.array(v, np.float32), k) for k, v in (("zero", 0), ("six", 6))]
    return model(nodes, [("x", ["N", 6, 6, 4])], [("y", ["N", 24])], w), x_of(2, 6, 6, 4)


ZOO: dict[str, Callable[[], Case]] = {
    "chain": chain,
    "feed_forward": feed_forward,
    "ranks": ranks,
    "gemms": gemms,
    "convolutions": convolutions,
    "lstm": recurrent,
    "gru": lambda: recurrent("GRU", 3),
    "branches": branches,
    "tied": tied,
    "half": half,
    "keras": keras,
}
