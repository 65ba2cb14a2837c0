"""BatchNormalization and elementwise operators folded into convolutions and products, or reduced where alone."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from onnx_refit.plan.compile import CompileOptions, compile_model
from onnx_refit.plan.compiled import CompiledModel, Verdict
from tests.plan.folds_support import CONVOLUTIONS, IMAGE, REL, batch_norm, bn_node, channels_of, convolution
from tests.plan.support import array, check, graph, model, node, ops, optimiser_leftovers, positive, reasons, value


def last_on_big_weights(compiled: CompiledModel, weight: str) -> list[str]:
    """The operators of the program that read the whole weight, in order."""
    assert compiled.program.model is not None
    return [n.op_type for n in compiled.program.model.graph.node if weight in n.input]


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
