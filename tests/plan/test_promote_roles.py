"""Which tensors are parameters, and which are states, masks and scalars that stay as they are."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

from onnx_refit.errors import ModelError
from onnx_refit.plan.compile import CompileOptions, compile_model
from onnx_refit.plan.compiled import Verdict
from onnx_refit.tensors import Array
from tests.plan.promote_support import X
from tests.plan.support import array, check, model, node, reasons, source_names


def test_one_element_tensors_are_constant_unless_they_are_parameters_or_named() -> None:
    proto = model(
        [
            node("Gemm", ["x", "w", "b"], ["a"], name="head"),
            node("Mul", ["a", "temperature"], ["c"]),
            node("Pow", ["c", "exponent"], ["y"]),
        ],
        {"x": [3, 4]},
        ["y"],
        {
            "w": array(1, 4, 1),
            "b": array(2, 1),
            "temperature": np.array(0.5, np.float32),
            "exponent": np.array(2, np.float32),
        },
    )
    compilation = check(proto, {"x": X}, rel=1e-5)
    assert source_names(compilation.compiled) == {"w", "b"}
    assert "one element" in reasons(compilation.compiled, Verdict.REJECTED)["temperature"]
    named = check(proto, {"x": X}, rel=1e-5, options=CompileOptions(refittable=("temperature",)))
    assert source_names(named.compiled) == {"w", "b", "temperature"}


def test_a_one_element_bias_behind_a_matmul_is_a_parameter() -> None:
    proto = model(
        [node("MatMul", ["x", "w"], ["a"]), node("Add", ["a", "b"], ["y"])],
        {"x": [3, 4]},
        ["y"],
        {"w": array(1, 4, 1), "b": array(2, 1)},
    )
    assert source_names(check(proto, {"x": X}).compiled) == {"w", "b"}


def test_the_caller_may_keep_a_tensor_constant() -> None:
    proto = model(
        [node("MatMul", ["x", "w"], ["a"]), node("Add", ["a", "b"], ["y"])],
        {"x": [3, 4]},
        ["y"],
        {"w": array(1, 4, 4), "b": array(2, 4)},
    )
    compilation = check(proto, {"x": X}, options=CompileOptions(constant=("b",)))
    assert source_names(compilation.compiled) == {"w"}
    assert "asked" in reasons(compilation.compiled, Verdict.REJECTED)["b"]


def test_a_name_that_is_not_in_the_model_is_an_error_with_the_nearest_one() -> None:
    proto = model([node("MatMul", ["x", "weight"], ["y"])], {"x": [3, 4]}, ["y"], {"weight": array(1, 4, 4)})
    with pytest.raises(ModelError, match=r"wieght.*'weight'"):
        compile_model(proto, CompileOptions(refittable=("wieght",)))


def test_structure_and_unused_tensors_are_left_out_with_reasons() -> None:
    proto = model(
        [
            node("Mul", ["x", "w"], ["a"]),
            node("Resize", ["a", "", "scales"], ["y"]),
        ],
        {"x": [1, 1, 3, 4]},
        ["y"],
        {"w": array(1, 4), "scales": np.array([1, 1, 2, 2], np.float32), "unused": array(2, 7)},
    )
    compilation = check(proto, {"x": array(3, 1, 1, 3, 4)})
    assert source_names(compilation.compiled) == {"w"}
    why = reasons(compilation.compiled, Verdict.REJECTED)
    assert "Resize (input 2)" in why["scales"]
    assert "nothing reads it" in why["unused"]


def test_the_quantised_weights_and_their_scales_are_sources() -> None:
    proto = model(
        [
            node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
            node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=1),
            node("MatMul", ["xd", "wd"], ["y"]),
        ],
        {"x": [3, 4]},
        ["y"],
        {
            "xs": np.array(0.02, np.float32),
            "xz": np.array(128, np.uint8),
            "w": np.arange(-10, 10).reshape(4, 5).astype(np.int8),
            "ws": np.linspace(0.01, 0.02, 5, dtype=np.float32),
            "wz": np.zeros(5, np.int8),
        },
    )
    compilation = check(proto, {"x": X})
    assert source_names(compilation.compiled) == {"w", "ws"}
    assert "symmetric" in reasons(compilation.compiled, Verdict.REJECTED)["wz"]
    assert compilation.compiled.activation.graph.node[2].op_type == "DequantizeLinear"


def test_the_weight_scale_of_dynamic_quantisation_is_a_source() -> None:
    proto = model(
        [
            node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
            node("MatMulInteger", ["xq", "w", "xz", "wz"], ["m"]),
            node("Cast", ["m"], ["f"], to=TensorProto.FLOAT),
            node("Mul", ["xs", "ws"], ["s"]),
            node("Mul", ["f", "s"], ["y"]),
        ],
        {"x": [3, 4]},
        ["y"],
        {
            "w": np.arange(100, 120).reshape(4, 5).astype(np.uint8),
            "wz": np.array(110, np.uint8),
            "ws": np.array([0.01], np.float32),
        },
    )
    assert source_names(check(proto, {"x": X}).compiled) == {"w", "ws", "wz"}


def test_an_initial_state_of_zeros_is_constant_and_a_learned_one_is_not() -> None:
    def lstm(state: Array) -> ModelProto:
        return model(
            [
                node("Expand", ["h0", "s"], ["h"]),
                node("LSTM", ["x", "w", "r", "", "", "h", "c0"], ["y"], hidden_size=5),
            ],
            {"x": [3, 2, 4]},
            ["y"],
            {
                "w": array(1, 1, 20, 4),
                "r": array(2, 1, 20, 5),
                "h0": state,
                "c0": np.zeros((1, 2, 5), np.float32),
                "s": np.array([1, 2, 5]),
            },
        )

    zeros = check(lstm(np.zeros((1, 1, 5), np.float32)), {"x": array(0, 3, 2, 4)})
    assert source_names(zeros.compiled) == {"w", "r"}
    assert "state of zeros" in reasons(zeros.compiled, Verdict.REJECTED)["h0"]
    learned = check(lstm(array(3, 1, 1, 5)), {"x": array(0, 3, 2, 4)})
    assert source_names(learned.compiled) == {"w", "r", "h0"}


@pytest.mark.parametrize("low", [-np.inf, np.finfo(np.float32).min])
def test_a_mask_is_constant(low: float) -> None:
    mask = np.where(np.tri(3, dtype=bool), 0, low).astype(np.float32)
    proto = model(
        [node("MatMul", ["x", "w"], ["s"]), node("Add", ["s", "mask"], ["a"]), node("Softmax", ["a"], ["y"])],
        {"x": [3, 4]},
        ["y"],
        {"w": array(1, 4, 3), "mask": mask},
    )
    compilation = check(proto, {"x": X})
    assert source_names(compilation.compiled) == {"w"}
    assert "mask" in reasons(compilation.compiled, Verdict.REJECTED)["mask"]


def test_neutral_constants_of_a_group_norm_are_no_parameters_but_other_ones_and_zeros_are() -> None:
    """Exporters write GroupNormalization as InstanceNormalization by ones and zeros; a new model's bias is zero too."""
    proto = model(
        [
            node("Constant", [], ["one"], value=numpy_helper.from_array(np.ones(4, np.float32))),
            node("Constant", [], ["zero"], value=numpy_helper.from_array(np.zeros(4, np.float32))),
            node("InstanceNormalization", ["x", "one", "zero"], ["n"]),
            node("Mul", ["n", "gain"], ["m"]),
            node("Constant", [], ["bias"], value=numpy_helper.from_array(np.zeros((4, 1), np.float32))),
            node("Add", ["m", "bias"], ["y"]),
        ],
        {"x": [1, 4, 9]},
        ["y"],
        {"gain": np.ones((4, 1), np.float32)},
    )
    assert source_names(check(proto, {"x": array(0, 1, 4, 9)}).compiled) == {"gain", "bias"}


def test_operands_of_resize_are_seen_through_casts() -> None:
    proto = model(
        [
            node("Cast", ["scales"], ["f"], to=TensorProto.FLOAT),
            node("Resize", ["x", "", "f"], ["y"]),
        ],
        {"x": [1, 1, 3, 4]},
        ["y"],
        {"scales": np.array([1, 1, 2, 2], np.float64)},
    )
    assert not source_names(check(proto, {"x": array(3, 1, 1, 3, 4)}).compiled)


def test_four_bit_weights_are_sources() -> None:
    """DequantizeLinear-21 of int4, which is one element a byte in NumPy and half of one in ONNX Runtime."""
    weights: dict[str, Array] = {
        "w": (np.arange(32).reshape(8, 4) % 15 - 7).astype(ml_dtypes.int4),
        "s": np.linspace(0.1, 0.2, 4, dtype=np.float32),
    }
    nodes = [node("DequantizeLinear", ["w", "s"], ["d"], axis=1), node("MatMul", ["x", "d"], ["y"])]
    compilation = check(model(nodes, {"x": [3, 8]}, {"y": [3, 4]}, weights, 21), {"x": array(0, 3, 8)})
    assert {s.spec.name: s.spec.dtype for s in compilation.compiled.sources} == {"w": "int4", "s": "float32"}
    np.testing.assert_array_equal(compilation.weights["w"], weights["w"])
    assert [n.op_type for n in compilation.compiled.activation.graph.node] == ["DequantizeLinear", "MatMul"]


def test_blocks_of_four_bits_are_sources() -> None:
    weights: dict[str, Array] = {
        "b": np.random.default_rng(0).integers(0, 256, (8, 1, 16)).astype(np.uint8),
        "s": np.linspace(0.1, 0.2, 8, dtype=np.float32),
    }
    proto = model(
        [node("MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", K=32, N=8, bits=4, block_size=32)],
        {"x": [3, 32]},
        {"y": [3, 8]},
        weights,
        contrib=True,
    )
    assert source_names(check(proto, {"x": array(0, 3, 32)}).compiled) == {"b", "s"}
