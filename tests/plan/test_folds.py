"""Folds: the node is gone, the outputs agree, and ONNX Runtime's optimiser finds nothing to calculate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto

from onnx_refit.plan.compile import CompileOptions, compile_model
from onnx_refit.plan.compiled import CompiledModel, Verdict
from onnx_refit.tensors import Array
from tests.plan.support import (
    array,
    check,
    graph,
    model,
    node,
    ops,
    optimiser_leftovers,
    positive,
    program_ops,
    reasons,
    run,
    run_compiled,
    substitute,
    value,
)

REL = 1e-5
IMAGE = array(0, 2, 4, 9, 9)


def batch_norm(channels: int, seed: int = 10) -> dict[str, Array]:
    return {
        "scale": array(seed, channels),
        "shift": array(seed + 1, channels),
        "mean": array(seed + 2, channels),
        "variance": positive(seed + 3, channels),
    }


def bn_node(x: str, y: str, **attributes: Any) -> NodeProto:
    return node("BatchNormalization", [x, "scale", "shift", "mean", "variance"], [y], name="bn", **attributes)


def last_on_big_weights(compiled: CompiledModel, weight: str) -> list[str]:
    """The operators of the program that read the whole weight, in order."""
    assert compiled.program.model is not None
    return [n.op_type for n in compiled.program.model.graph.node if weight in n.input]


CONVOLUTIONS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "plain": ("Conv", (6, 4, 3, 3), {}),
    "grouped": ("Conv", (6, 2, 3, 3), {"group": 2}),
    "depthwise": ("Conv", (4, 1, 3, 3), {"group": 4}),
    "strided": ("Conv", (6, 4, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "transposed": ("ConvTranspose", (4, 6, 3, 3), {}),
    "transposed-grouped": ("ConvTranspose", (4, 3, 3, 3), {"group": 2}),
    "transposed-depthwise": ("ConvTranspose", (4, 1, 3, 3), {"group": 4}),
}


def channels_of(kind: str) -> int:
    op_type, shape, attributes = CONVOLUTIONS[kind]
    return shape[0] if op_type == "Conv" else shape[1] * int(attributes.get("group", 1))


def convolution(kind: str, *, bias: bool) -> tuple[NodeProto, dict[str, Array]]:
    op_type, shape, attributes = CONVOLUTIONS[kind]
    weights = {"w": array(1, *shape)}
    if bias:
        weights["b"] = array(2, channels_of(kind))
    return node(op_type, ["x", *weights], ["c"], name="conv", **attributes), weights


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_batch_norm_behind_a_convolution(kind: str, bias: bool) -> None:
    conv, weights = convolution(kind, bias=bias)
    nodes = [conv, bn_node("c", "n", epsilon=1e-3), node("Relu", ["n"], ["y"])]
    proto = model(nodes, {"x": ["n", 4, 9, 9]}, ["y"], {**weights, **batch_norm(channels_of(kind))})
    compiled = check(proto, {"x": IMAGE}, rel=REL).compiled
    assert ops(compiled) == [conv.op_type, "Relu"]
    assert last_on_big_weights(compiled, "w") == ["Mul"], "the weight is touched once, by one multiply"
    assert not optimiser_leftovers(compiled)
    assert "folded into" in reasons(compiled, Verdict.ACCEPTED)["bn"]
    everything = {"w", "scale", "variance"}
    (scaled,) = [k for k, v in compiled.program.dependencies.items() if "w" in v]
    assert compiled.program.dependencies[scaled] == everything


@pytest.mark.parametrize("operand", ["scalar", "one", "C11", "1C11"])
@pytest.mark.parametrize("op_type", ["Mul", "Add", "Sub", "Div"])
@pytest.mark.parametrize("kind", ["plain", "depthwise", "transposed", "transposed-grouped"])
def test_elementwise_by_a_weight_behind_a_convolution(kind: str, op_type: str, operand: str) -> None:
    channels = channels_of(kind)
    shape = {"scalar": (), "one": (1,), "C11": (channels, 1, 1), "1C11": (1, channels, 1, 1)}[operand]
    conv, weights = convolution(kind, bias=operand != "C11")
    weights["v"] = positive(3, *shape)
    proto = model([conv, node(op_type, ["c", "v"], ["y"])], {"x": [2, 4, 9, 9]}, ["y"], weights)
    compiled = check(proto, {"x": IMAGE}, rel=REL, options=CompileOptions(refittable=("v",))).compiled
    assert ops(compiled) == [conv.op_type]
    assert not optimiser_leftovers(compiled)


def test_a_chain_of_scales_is_one_multiply_of_the_weight() -> None:
    conv, weights = convolution("plain", bias=True)
    weights |= batch_norm(6) | {
        "gain": array(4, 6, 1, 1),
        "offset": array(5, 1, 6, 1, 1)[0],
        "half": np.array(0.5, np.float32),
    }
    proto = model(
        [
            conv,
            node("Mul", ["gain", "c"], ["a"]),
            node("Add", ["offset", "a"], ["b1"]),
            bn_node("b1", "d"),
            node("Mul", ["d", "half"], ["y"]),
        ],
        {"x": [2, 4, 9, 9]},
        ["y"],
        weights,
    )
    compiled = check(proto, {"x": IMAGE}, rel=REL).compiled
    assert ops(compiled) == ["Conv"]
    assert last_on_big_weights(compiled, "w") == ["Mul"]
    assert not optimiser_leftovers(compiled)


def test_a_constant_convolution_with_a_refittable_batch_norm() -> None:
    conv, weights = convolution("plain", bias=False)
    proto = model([conv, bn_node("c", "y")], {"x": [2, 4, 9, 9]}, ["y"], {**weights, **batch_norm(6)})
    compiled = check(proto, {"x": IMAGE}, rel=REL, options=CompileOptions(constant=("w",))).compiled
    assert ops(compiled) == ["Conv"]
    assert not optimiser_leftovers(compiled)


def test_one_weight_with_two_batch_norms_becomes_two_engine_weights() -> None:
    """A head shared over feature levels, each with its own normalisation."""
    weights = {"w": array(1, 4, 4, 3, 3), **batch_norm(4)}
    weights |= {f"{k}2": a for k, a in batch_norm(4, 30).items()}
    proto = model(
        [
            node("Conv", ["x", "w"], ["c"]),
            node("Conv", ["z", "w"], ["d"]),
            bn_node("c", "y"),
            node("BatchNormalization", ["d", "scale2", "shift2", "mean2", "variance2"], ["y2"]),
        ],
        {"x": [2, 4, 9, 9], "z": [2, 4, 9, 9]},
        ["y", "y2"],
        weights,
    )
    compiled = check(proto, {"x": IMAGE, "z": IMAGE[::-1].copy()}, rel=REL).compiled
    assert ops(compiled) == ["Conv", "Conv"]
    assert sum("w" in v for v in compiled.program.dependencies.values()) == 2


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_behind_gemm(trans_b: int, bias: bool) -> None:
    weights = {"w": array(1, *((5, 4) if trans_b else (4, 5)))} | ({"b": array(2, 5)} if bias else {})
    gemm = node("Gemm", ["x", *weights], ["g"], transB=trans_b)
    proto = model([gemm, bn_node("g", "y")], {"x": [3, 4]}, ["y"], {**weights, **batch_norm(5)})
    compiled = check(proto, {"x": array(0, 3, 4)}, rel=REL).compiled
    assert ops(compiled) == ["Gemm"]
    assert not optimiser_leftovers(compiled)


@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_behind_matmul(bias: bool) -> None:
    nodes = [node("MatMul", ["x", "w"], ["m"], name="mm")]
    if bias:
        nodes.append(node("Add", ["m", "b"], ["mb"]))
    nodes.append(bn_node("mb" if bias else "m", "y"))
    weights = {"w": array(1, 4, 5), "b": array(2, 5), **batch_norm(5)}
    compiled = check(model(nodes, {"x": [3, 4]}, ["y"], weights), {"x": array(0, 3, 4)}, rel=REL).compiled
    assert ops(compiled) == ["MatMul", "Add"]
    assert not optimiser_leftovers(compiled)


@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_behind_matmul_through_transpose_and_reshape(bias: bool) -> None:
    """Linear -> BatchNorm1d over [B, T, C]: the channels are the last axis before the Transpose."""
    nodes = [node("MatMul", ["x", "w"], ["m"])]
    if bias:
        nodes.append(node("Add", ["m", "b"], ["mb"]))
    nodes += [
        node("Reshape", ["mb" if bias else "m", "to3"], ["r"]),
        node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
        bn_node("t", "y"),
    ]
    weights = {"w": array(1, 4, 5), "b": array(2, 5), "to3": np.array([2, 3, 5]), **batch_norm(5)}
    compiled = check(model(nodes, {"x": [6, 4]}, ["y"], weights), {"x": array(0, 6, 4)}, rel=REL).compiled
    assert ops(compiled) == ["MatMul", "Add", "Reshape", "Transpose"]
    assert not optimiser_leftovers(compiled)


def test_batch_norm_over_another_axis_of_a_product_is_not_folded() -> None:
    """MatMul [B, 5, 5] -> BatchNormalization over axis 1, which is not the axis of the weight's columns."""
    proto = model(
        [node("MatMul", ["x", "w"], ["m"]), bn_node("m", "y")],
        {"x": [2, 5, 4]},
        ["y"],
        {"w": array(1, 4, 5), **batch_norm(5)},
    )
    compiled = check(proto, {"x": array(0, 2, 5, 4)}, rel=REL).compiled
    assert ops(compiled) == ["MatMul", "BatchNormalization"]
    assert not optimiser_leftovers(compiled)


@pytest.mark.parametrize("opset", [7, 9, 14, 15])
def test_a_lone_batch_norm_is_reduced(opset: int) -> None:
    proto = model([bn_node("x", "n"), node("Relu", ["n"], ["y"])], {"x": [2, 4, 9, 9]}, ["y"], batch_norm(4), opset)
    compiled = check(proto, {"x": IMAGE}, rel=REL).compiled
    assert ops(compiled) == ["BatchNormalization", "Relu"]
    bn = compiled.activation.graph.node[0]
    assert next(a.f for a in bn.attribute if a.name == "epsilon") == 0
    assert compiled.program.dependencies[bn.input[1]] == {"scale", "variance"}
    assert compiled.program.dependencies[bn.input[2]] == {"scale", "variance", "shift", "mean"}
    if opset >= 9:
        assert not optimiser_leftovers(compiled)


def test_scale_and_shift_behind_a_lone_batch_norm_go_into_it() -> None:
    weights = {**batch_norm(4), "gain": array(1, 4, 1, 1), "offset": array(2, 1, 4, 1, 1)}
    weights["offset"] = weights["offset"].reshape(1, 4, 1, 1)
    proto = model(
        [bn_node("x", "n"), node("Mul", ["n", "gain"], ["m"]), node("Add", ["m", "offset"], ["y"])],
        {"x": [2, 4, 9, 9]},
        ["y"],
        weights,
    )
    compiled = check(proto, {"x": IMAGE}, rel=REL).compiled
    assert ops(compiled) == ["BatchNormalization"]
    assert not optimiser_leftovers(compiled)


def test_batch_norm_in_training_mode_stays() -> None:
    training = node(
        "BatchNormalization",
        ["x", "scale", "shift", "mean", "variance"],
        ["y", "running_mean", "running_variance"],
        name="bn",
        training_mode=1,
    )
    proto = model([training], {"x": [2, 4, 9, 9]}, ["y"], batch_norm(4), 15)
    compiled = compile_model(proto).compiled
    assert not compiled.program.model
    assert "training mode" in reasons(compiled, Verdict.REJECTED)["bn"]


@pytest.mark.parametrize("how", ["second reader", "graph output", "sub-graph"])
def test_a_convolution_that_others_read_is_not_folded(how: str) -> None:
    conv, weights = convolution("plain", bias=False)
    nodes, outputs = [conv, bn_node("c", "n"), node("Relu", ["n"], ["y"])], ["y"]
    feeds = {"x": IMAGE}
    if how == "second reader":
        nodes.append(node("Sigmoid", ["c"], ["z"]))
        outputs.append("z")
    elif how == "graph output":
        outputs.append("c")
    else:
        then = graph([node("Neg", ["c"], ["t"])], [], [value("t")])
        other = graph([node("Abs", ["c"], ["e"])], [], [value("e")])
        nodes.append(node("If", ["cond"], ["z"], then_branch=then, else_branch=other))
        outputs.append("z")
        feeds["cond"] = np.array(True)
    proto = model(nodes, {"x": [2, 4, 9, 9]}, outputs, {**weights, **batch_norm(6)})
    if how == "sub-graph":
        proto.graph.input.append(value("cond", [], TensorProto.BOOL))
    compiled = check(proto, feeds, rel=REL).compiled
    assert "BatchNormalization" in ops(compiled)
    rejected = [d for d in compiled.decisions if d.verdict is Verdict.REJECTED and d.subject == "bn"]
    assert "read by other nodes" in rejected[0].reason


def test_an_operand_that_does_not_run_along_the_channels_is_not_folded() -> None:
    conv, weights = convolution("plain", bias=False)
    weights["v"] = array(3, 7)
    proto = model([conv, node("Mul", ["c", "v"], ["y"], name="mul")], {"x": [2, 4, 9, 9]}, ["y"], weights)
    compiled = check(proto, {"x": IMAGE}, rel=REL).compiled
    assert ops(compiled) == ["Conv", "Mul"]
    assert "does not run along" in reasons(compiled, Verdict.REJECTED)["mul"]


def test_an_operand_that_raises_the_rank_is_not_folded() -> None:
    conv, weights = convolution("plain", bias=False)
    weights["v"] = array(3, 1, 1, 6, 1, 1)
    proto = model([conv, node("Mul", ["c", "v"], ["y"])], {"x": [2, 4, 9, 9]}, ["y"], weights)
    assert ops(check(proto, {"x": IMAGE}, rel=REL).compiled) == ["Conv", "Mul"]


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", [(5,), (1, 5), (), (1,), (3, 5), (3, 1), None])
def test_gemm_scalars(trans_a: int, trans_b: int, bias: tuple[int, ...] | None) -> None:
    weights = {"w": array(1, *((5, 4) if trans_b else (4, 5)))}
    if bias is not None:
        weights["b"] = array(2, *bias)
    x = array(0, *((4, 3) if trans_a else (3, 4)))
    gemm = node("Gemm", ["x", *weights], ["y"], alpha=0.37, beta=-1.7, transA=trans_a, transB=trans_b)
    compiled = check(model([gemm], {"x": list(x.shape)}, ["y"], weights), {"x": x}, rel=REL).compiled
    (new,) = compiled.activation.graph.node
    assert {a.name: a.f for a in new.attribute if a.name in {"alpha", "beta"}} == {"alpha": 1.0, "beta": 1.0}
    if bias is not None and bias not in {(3, 5), (3, 1)}:
        shapes = {s.name: s.shape for s in compiled.engine_weights}
        assert shapes.get(new.input[2], (5,)) == (5,)


def test_gemm_whose_left_operand_is_the_weight() -> None:
    proto = model([node("Gemm", ["w", "x"], ["y"], alpha=2.5)], {"x": [4, 3]}, ["y"], {"w": array(1, 5, 4)})
    compiled = check(proto, {"x": array(0, 4, 3)}, rel=REL).compiled
    assert program_ops(compiled) == ["Mul"]


def test_gemm_of_activations_keeps_its_scalars() -> None:
    proto = model(
        [node("Gemm", ["x", "z", "b"], ["y"], alpha=2.5, name="gemm")],
        {"x": [3, 4], "z": [4, 5]},
        ["y"],
        {"b": array(1, 5)},
    )
    compiled = check(proto, {"x": array(0, 3, 4), "z": array(1, 4, 5)}, rel=REL).compiled
    assert "product of activations" in reasons(compiled, Verdict.REJECTED)["gemm"]


@pytest.mark.parametrize("op_type", ["Mul", "Div"])
@pytest.mark.parametrize("place", ["front", "behind", "front-right", "behind-right"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learned_scalar_next_to_a_matmul(op_type: str, place: str, shape: tuple[int, ...]) -> None:
    right = place.endswith("right")
    x, w = array(0, *((4, 3) if right else (3, 4))), array(1, *((5, 4) if right else (4, 5)))
    operands = ["w", "s" if place.startswith("front") else "x"]
    if not right:
        operands.reverse()
    if place.startswith("front"):
        nodes = [node(op_type, ["x", "v"], ["s"]), node("MatMul", operands, ["y"])]
    else:
        nodes = [node("MatMul", operands, ["m"]), node(op_type, ["m", "v"], ["y"])]
    proto = model(nodes, {"x": list(x.shape)}, ["y"], {"w": w, "v": positive(2, *shape)})
    compiled = check(proto, {"x": x}, rel=REL, options=CompileOptions(refittable=("v",))).compiled
    assert ops(compiled) == ["MatMul"]
    assert not optimiser_leftovers(compiled)


def test_a_learned_temperature_of_activations_stays_with_a_reason() -> None:
    proto = model(
        [node("MatMul", ["x", "z"], ["m"]), node("Mul", ["m", "v"], ["y"], name="temperature")],
        {"x": [3, 4], "z": [4, 5]},
        ["y"],
        {"v": np.array(0.5, np.float32)},
    )
    feeds = {"x": array(0, 3, 4), "z": array(1, 4, 5)}
    compiled = check(proto, feeds, rel=REL, options=CompileOptions(refittable=("v",))).compiled
    assert "product of activations" in reasons(compiled, Verdict.REJECTED)["temperature"]


@pytest.mark.parametrize("op_type", ["Mul", "Add", "Sub", "Div"])
def test_layer_scale_behind_a_linear_layer(op_type: str) -> None:
    proto = model(
        [
            node("MatMul", ["x", "w"], ["m"]),
            node("Add", ["b", "m"], ["a"]),
            node(op_type, ["a", "v"], ["y"]),
        ],
        {"x": ["n", "t", 4]},
        ["y"],
        {"w": array(1, 4, 5), "b": array(2, 5), "v": positive(3, 5)},
    )
    compiled = check(proto, {"x": array(0, 2, 3, 4)}, rel=REL).compiled
    assert ops(compiled) == ["MatMul", "Add"]
    assert not optimiser_leftovers(compiled)


def test_a_tied_projection_is_not_scaled_into_a_second_copy() -> None:
    proto = model(
        [
            node("MatMul", ["x", "w"], ["m"]),
            node("Mul", ["m", "v"], ["s"], name="mul"),
            node("MatMul", ["s", "w"], ["y"]),
        ],
        {"x": [3, 4]},
        ["y"],
        {"w": array(1, 4, 4), "v": array(2, 4)},
    )
    compiled = check(proto, {"x": array(0, 3, 4)}, rel=REL).compiled
    assert ops(compiled) == ["MatMul", "Mul", "MatMul"]
    assert "held twice" in reasons(compiled, Verdict.REJECTED)["mul"]


def test_folds_inside_branches() -> None:
    conv, weights = convolution("plain", bias=False)
    then = graph([conv, bn_node("c", "t")], [], [value("t")], weights, "then")
    other = graph(
        [node("Conv", ["x", "w2"], ["c2"]), node("Mul", ["c2", "gain"], ["e"])],
        [],
        [value("e")],
        {"w2": array(7, 6, 4, 3, 3), "gain": array(8, 6, 1, 1)},
        "else",
    )
    proto = model(
        [node("If", ["cond"], ["y"], then_branch=then, else_branch=other)],
        {"x": [2, 4, 9, 9]},
        ["y"],
        batch_norm(6),
    )
    proto.graph.input.append(value("cond", [], TensorProto.BOOL))
    for taken in (True, False):
        compiled = check(proto, {"x": IMAGE, "cond": np.array(taken)}, rel=REL).compiled
        assert ops(compiled) == ["If", "Conv", "Conv"]


def test_folds_of_float16_weights_are_rounded_once() -> None:
    weights = {"w": array(1, 6, 4, 3, 3, dtype="float16")}
    weights |= {name: a.astype(np.float16) for name, a in batch_norm(6).items()}
    proto = model(
        [
            node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
            node("Conv", ["h", "w"], ["c"]),
            bn_node("c", "n"),
            node("Cast", ["n"], ["y"], to=TensorProto.FLOAT),
        ],
        {"x": [2, 4, 9, 9]},
        ["y"],
        weights,
    )
    compiled = check(proto, {"x": IMAGE}, rel=5e-3).compiled
    assert ops(compiled) == ["Cast", "Conv", "Cast"]
    assert {spec.dtype for spec in compiled.engine_weights} == {"float16"}


def test_folds_of_float64_weights_stay_in_float64() -> None:
    weights = {
        "w": array(1, 4, 5, dtype="float64"),
        "b": array(2, 5, dtype="float64"),
        "v": array(3, 5, dtype="float64"),
    }
    proto = model(
        [
            node("Cast", ["x"], ["h"], to=TensorProto.DOUBLE),
            node("MatMul", ["h", "w"], ["m"]),
            node("Add", ["m", "b"], ["a"]),
            node("Mul", ["a", "v"], ["y"]),
        ],
        {"x": [3, 4]},
        ["y"],
        weights,
    )
    proto.graph.output[0].CopyFrom(value("y", [3, 5], TensorProto.DOUBLE))
    compiled = check(proto, {"x": array(0, 3, 4)}, rel=1e-14).compiled
    assert ops(compiled) == ["Cast", "MatMul", "Add"]
    assert {spec.dtype for spec in compiled.engine_weights} == {"float64"}


def quantised_conv(bias_scale: Array) -> tuple[ModelProto, dict[str, Any]]:
    weights: dict[str, Any] = {
        "xs": np.array(0.02, np.float32),
        "xz": np.array(120, np.uint8),
        "w": np.random.default_rng(1).integers(-90, 90, (6, 4, 3, 3)).astype(np.int8),
        "ws": np.linspace(0.01, 0.02, 6, dtype=np.float32),
        "wz": np.zeros(6, np.int8),
        "b": np.arange(-3, 3).astype(np.int32) * 40,
        "bs": bias_scale,
        "bz": np.zeros(6, np.int32),
    }
    proto = model(
        [
            node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
            node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
            node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], axis=0),
            node("Conv", ["xd", "wd", "bd"], ["c"], name="conv"),
            node("QuantizeLinear", ["c", "xs", "xz"], ["q"]),
            node("DequantizeLinear", ["q", "xs", "xz"], ["y"]),
        ],
        {"x": [2, 4, 9, 9]},
        ["y"],
        weights,
    )
    return proto, weights


def test_the_scale_of_a_quantised_bias_is_derived() -> None:
    product = np.linspace(0.01, 0.02, 6, dtype=np.float32) * np.float32(0.02)
    proto, weights = quantised_conv(product)
    compilation = compile_model(proto)
    compiled = compilation.compiled
    assert {s.spec.name for s in compiled.sources} == {"w", "ws", "b"}
    assert "times" in reasons(compiled, Verdict.ACCEPTED)["conv"]
    feeds = {"x": array(0, 2, 4, 9, 9)}
    np.testing.assert_array_equal(run(proto, feeds)[0], run_compiled(compiled, compilation.weights, feeds)[0])
    changed = {"w": weights["w"][::-1].copy(), "ws": weights["ws"] * np.float32(1.5), "b": weights["b"] + 7}
    expected = run(substitute(proto, {**changed, "bs": changed["ws"] * np.float32(0.02)}), feeds)
    np.testing.assert_array_equal(expected[0], run_compiled(compiled, changed, feeds)[0])


def test_a_bias_scale_of_its_own_stays_a_source() -> None:
    proto, _ = quantised_conv(np.full(6, 0.3, np.float32))
    compiled = compile_model(proto).compiled
    assert {s.spec.name for s in compiled.sources} == {"w", "ws", "b", "bs"}
    assert "not the product" in reasons(compiled, Verdict.REJECTED)["conv"]


ATTENTION_MASKS = {
    "none": None,
    "2d": np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.int32),
    "3d": np.tril(np.ones((2, 4, 4), np.int32)),
    "1d": np.array([3, 2], np.int32),
}


@pytest.mark.parametrize("mask", ATTENTION_MASKS)
@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("causal", [0, 1])
def test_contrib_attention_is_split(mask: str, opset: int, causal: int) -> None:
    table = ATTENTION_MASKS[mask]
    attributes: dict[str, Any] = {"num_heads": 2, "unidirectional": causal}
    inputs = ["x", "w", "b"] + (["mask"] if table is not None else [])
    proto = model(
        [node("Attention", inputs, ["y"], name="attention", domain="com.microsoft", **attributes)],
        {"x": [2, 4, 8]},
        {"y": [2, 4, 8]},
        {"w": array(1, 8, 24), "b": array(2, 24)},
        opset,
        contrib=True,
    )
    feeds = {"x": array(0, 2, 4, 8)}
    if table is not None:
        proto.graph.input.append(value("mask", list(table.shape), TensorProto.INT32))
        feeds["mask"] = table
    compiled = check(proto, feeds, rel=REL).compiled
    if mask == "1d":
        assert ops(compiled) == ["Attention"]
        assert "rank 1" in reasons(compiled, Verdict.REJECTED)["attention"]
    else:
        assert ops(compiled) == ["MatMul", "Add", "Split", "MultiHeadAttention"]


def test_contrib_attention_with_sizes_of_its_own_and_a_bias_on_the_scores() -> None:
    proto = model(
        [
            node(
                "Attention",
                ["x", "w", "b", "", "", "scores"],
                ["y"],
                domain="com.microsoft",
                num_heads=2,
                qkv_hidden_sizes=[8, 8, 12],
                scale=0.7,
            )
        ],
        {"x": [2, 4, 8], "scores": [2, 2, 4, 4]},
        {"y": [2, 4, 12]},
        {"w": array(1, 8, 28), "b": array(2, 28)},
        contrib=True,
    )
    compiled = check(proto, {"x": array(0, 2, 4, 8), "scores": array(3, 2, 2, 4, 4)}, rel=REL).compiled
    assert ops(compiled) == ["MatMul", "Add", "Split", "MultiHeadAttention"]


def test_recurrent_weights_pass_through() -> None:
    proto = model(
        [node("LSTM", ["x", "w", "r", "b"], ["y"], hidden_size=5, direction="bidirectional")],
        {"x": [3, 2, 4]},
        ["y"],
        {"w": array(1, 2, 20, 4), "r": array(2, 2, 20, 5), "b": array(3, 2, 40)},
    )
    compiled = check(proto, {"x": array(0, 3, 2, 4)}).compiled
    assert dict(compiled.program.passthrough) == {"w": "w", "r": "r", "b": "b"}


def test_operators_of_other_domains_are_not_taken_for_onnx_s() -> None:
    """An operator of a user's own may be called Mul, and mean anything."""
    conv, weights = convolution("plain", bias=False)
    proto = model(
        [conv, node("Mul", ["c", "v"], ["y"], domain="mine")],
        {"x": [2, 4, 9, 9]},
        ["y"],
        {**weights, "v": array(3, 6, 1, 1)},
    )
    proto.opset_import.add(domain="mine", version=1)
    compiled = compile_model(proto).compiled
    assert ops(compiled) == ["Conv", "Mul"]
    assert not compiled.program.model
