"""Scalars of Gemm, learned scales beside products, attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from onnx_refit.plan.compile import CompileOptions
from onnx_refit.plan.compiled import Verdict
from tests.plan.folds_support import REL
from tests.plan.support import (
    array,
    check,
    model,
    node,
    ops,
    optimiser_leftovers,
    positive,
    program_ops,
    reasons,
    value,
)


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
