"""Folds inside branches, in other dtypes, of quantised weights; and what is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto

from onnx_refit.plan.compile import compile_model
from onnx_refit.plan.compiled import Verdict
from onnx_refit.tensors import Array
from tests.plan.folds_support import IMAGE, REL, batch_norm, bn_node, convolution
from tests.plan.support import array, check, graph, model, node, ops, reasons, run, run_compiled, substitute, value


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
