"""Every form a weight can have in a model becomes a source weight; what is structure stays constant, with a reason."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnx_refit.errors import ModelError, UnsupportedModelError
from onnx_refit.plan.compile import Compilation, CompileOptions, compile_model
from onnx_refit.plan.compiled import Verdict
from onnx_refit.tensors import Array
from tests.plan.support import (
    array,
    check,
    graph,
    model,
    node,
    reasons,
    run,
    source_names,
    value,
)

X = array(0, 3, 4)


def origin_of(compilation: Compilation, name: str) -> str:
    return next(s.origin for s in compilation.compiled.sources if s.spec.name == name)


def test_initializer_keeps_its_name_and_knows_its_uses() -> None:
    proto = model(
        [node("MatMul", ["x", "w"], ["a"], name="first"), node("MatMul", ["a", "w"], ["y"], name="second")],
        {"x": [3, 4]},
        ["y"],
        {"w": array(1, 4, 4)},
    )
    compilation = check(proto, {"x": X})
    (source,) = compilation.compiled.sources
    assert source.uses == ("first (MatMul)[1]", "second (MatMul)[1]")
    assert (source.spec.name, source.origin) == ("w", "initializer")
    assert dict(compilation.compiled.program.passthrough) == {"w": "w"}
    assert compilation.compiled.program.model is None


@pytest.mark.parametrize(
    "attribute",
    [
        {"value": numpy_helper.from_array(np.array([1.5, -2, 3, 4], np.float32))},
        {"value_floats": [1.5, -2.0, 3.0, 4.0]},
        {
            "sparse_value": helper.make_sparse_tensor(
                numpy_helper.from_array(np.array([1.5, -2], np.float32), "v"),
                numpy_helper.from_array(np.array([0, 2], np.int64), "i"),
                [4],
            )
        },
    ],
    ids=["value", "value_floats", "sparse_value"],
)
def test_constant_node_is_a_source_weight(attribute) -> None:
    proto = model([node("Constant", [], ["w"], **attribute), node("Mul", ["x", "w"], ["y"])], {"x": [3, 4]}, ["y"])
    if "sparse_value" in attribute:  # ONNX Runtime runs no sparse Constant: compare the weights alone
        compilation = compile_model(proto)
        np.testing.assert_array_equal(compilation.weights["w"], np.array([1.5, 0, -2, 0], np.float32))
    else:
        compilation = check(proto, {"x": X})
    assert origin_of(compilation, "w") == "constant"
    assert "Constant" not in [n.op_type for n in compilation.compiled.activation.graph.node]


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ({"value_int": 3}, np.array(3, np.int64)),
        ({"value_ints": [3, -4]}, np.array([3, -4], np.int64)),
        ({"value_float": 0.5}, np.array(0.5, np.float32)),
        ({"value_string": b"a"}, np.array("a", object)),
        ({"value_strings": [b"a", b"bc"]}, np.array(["a", "bc"], object)),
    ],
)
def test_other_constants_stay_constant_with_value_and_shape(attribute, expected: Array) -> None:
    proto = model([node("Constant", [], ["c"], **attribute), node("Identity", ["c"], ["y"])], {"x": [3, 4]}, ["y"])
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_empty_tensor_value_info("y"))
    compiled = compile_model(proto).compiled
    assert not compiled.sources
    (tensor,) = compiled.activation.graph.initializer
    got = numpy_helper.to_array(tensor)
    assert got.shape == expected.shape
    assert [v.decode() if isinstance(v, bytes) else v for v in got.reshape(-1)] == list(expected.reshape(-1))


def test_constant_of_shape_is_a_weight_where_a_parameter_is_read_and_a_constant_where_a_state_is() -> None:
    shape = numpy_helper.from_array(np.array([4, 6], np.int64), "shape")
    proto = model(
        [
            node("ConstantOfShape", ["shape"], ["w"], value=numpy_helper.from_array(np.array([0.5], np.float32))),
            node("MatMul", ["x", "w"], ["a"]),
            node("ConstantOfShape", ["shape2"], ["state"]),
            node("Concat", ["a", "state"], ["y"], axis=0),
        ],
        {"x": [3, 4]},
        ["y"],
    )
    proto.graph.initializer.extend([shape, numpy_helper.from_array(np.array([2, 6], np.int64), "shape2")])
    compilation = check(proto, {"x": X})
    assert source_names(compilation.compiled) == {"w"}
    assert origin_of(compilation, "w") == "constant-of-shape"
    assert (compilation.weights["w"] == 0.5).all()
    assert "ConstantOfShape" in reasons(compilation.compiled, Verdict.REJECTED)["state"]


@pytest.mark.parametrize("coordinates", [False, True])
def test_sparse_initializer_is_densified(coordinates: bool) -> None:
    dense = np.zeros((4, 5), np.float32)
    dense[1, 2], dense[3, 4] = 2.5, -1
    indices = np.array([[1, 2], [3, 4]] if coordinates else [7, 19], np.int64)
    proto = model([node("MatMul", ["x", "w"], ["y"])], {"x": [3, 4]}, ["y"])
    proto.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            numpy_helper.from_array(np.array([2.5, -1], np.float32), "w"), numpy_helper.from_array(indices, "i"), [4, 5]
        )
    )
    compilation = compile_model(proto)
    np.testing.assert_array_equal(compilation.weights["w"], dense)
    assert origin_of(compilation, "w") == "sparse-initializer"


def test_old_models_whose_initializers_are_inputs_too() -> None:
    proto = model([node("MatMul", ["x", "w"], ["y"])], {"x": [3, 4], "w": [4, 5]}, ["y"], {"w": array(1, 4, 5)}, 7)
    proto.ir_version = 3
    compilation = check(proto, {"x": X})
    assert [spec.name for spec in compilation.compiled.inputs] == ["x"]


def test_a_weight_that_is_an_output_of_the_graph() -> None:
    proto = model(
        [node("MatMul", ["x", "w"], ["y"]), node("Transpose", ["w"], ["t"])],
        {"x": [3, 4]},
        ["y", "w", "t"],
        {"w": array(1, 4, 4)},
    )
    compilation = check(proto, {"x": X})
    assert {spec.name for spec in compilation.compiled.engine_weights}.isdisjoint({"w", "t"})


def branch(tag: str, name: str = "w", seed: int = 1, *, constant: bool = False) -> onnx.GraphProto:
    weights = {name: array(seed, 4, 4)}
    nodes = [node("MatMul", ["x", name], [f"{tag}_out"], name=f"{tag}_matmul")]
    if constant:
        nodes.insert(0, node("Constant", [], [name], value=numpy_helper.from_array(weights[name])))
    return graph(nodes, [], [value(f"{tag}_out")], None if constant else weights, tag)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("taken", [True, False])
def test_weights_inside_if_branches_are_lifted_and_qualified_where_a_name_repeats(constant: bool, taken: bool) -> None:
    proto = model(
        [
            node(
                "If",
                ["cond"],
                ["y"],
                name="choose",
                then_branch=branch("then", seed=1, constant=constant),
                else_branch=branch("else", seed=2, constant=constant),
            )
        ],
        {"x": [3, 4]},
        ["y"],
    )
    proto.graph.input.append(value("cond", [], TensorProto.BOOL))
    compilation = check(proto, {"x": X, "cond": np.array(taken)})
    assert source_names(compilation.compiled) == {"choose/then_branch/w", "choose/else_branch/w"}
    assert origin_of(compilation, "choose/then_branch/w") == ("constant" if constant else "initializer")
    np.testing.assert_array_equal(compilation.weights["choose/else_branch/w"], array(2, 4, 4))


def test_a_name_that_does_not_repeat_is_not_qualified() -> None:
    proto = model(
        [
            node(
                "If",
                ["cond"],
                ["y"],
                name="choose",
                then_branch=branch("then", "first", 1),
                else_branch=branch("else", "second", 2),
            )
        ],
        {"x": [3, 4]},
        ["y"],
    )
    proto.graph.input.append(value("cond", [], TensorProto.BOOL))
    compilation = check(proto, {"x": X, "cond": np.array(True)})
    assert source_names(compilation.compiled) == {"first", "second"}


def test_a_branch_that_only_gives_a_weight() -> None:
    then = graph([], [], [value("w")], {"w": array(1, 3, 4)}, "then")
    other = graph([node("Identity", ["x"], ["e"])], [], [value("e")], None, "else")
    proto = model(
        [node("If", ["cond"], ["y"], name="choose", then_branch=then, else_branch=other)], {"x": [3, 4]}, ["y"]
    )
    proto.graph.input.append(value("cond", [], TensorProto.BOOL))
    compilation = compile_model(proto)
    weights = {"w": array(9, 3, 4)}
    compiled = compilation.compiled
    feeds = {"x": X, "cond": np.array(True), **weights}
    np.testing.assert_array_equal(run(compiled.activation, feeds)[0], weights["w"])


def loop(trip: int = 3) -> onnx.ModelProto:
    body = graph(
        [
            node("Identity", ["c"], ["c_out"]),
            node("Transpose", ["w"], ["wt"], perm=[1, 0]),
            node("MatMul", ["h", "wt"], ["m"], name="inner"),
            node("Add", ["m", "b"], ["a"]),
            node("Tanh", ["a"], ["h_out"]),
        ],
        [value("i", [], TensorProto.INT64), value("c", [], TensorProto.BOOL), value("h", [3, 4])],
        [value("c_out", [], TensorProto.BOOL), value("h_out", [3, 4])],
        {"w": array(1, 4, 4)},
        "body",
    )
    return model(
        [node("Loop", ["n", "go", "x"], ["l"], name="loop", body=body), node("MatMul", ["l", "w"], ["y"])],
        {"x": [3, 4]},
        {"y": [3, 4]},
        {"w": array(2, 4, 4), "b": array(3, 4), "n": np.array(trip), "go": np.array(True)},
    )


def test_loop_with_an_inner_weight_of_an_outer_name_and_a_captured_one() -> None:
    compilation = check(loop(), {"x": X})
    assert source_names(compilation.compiled) == {"loop/body/w", "w", "b"}
    assert not any("Transpose" in n.op_type for n in compilation.compiled.activation.graph.node[0].attribute[0].g.node)


def test_scan_with_weights_inside_and_as_its_state() -> None:
    body = graph(
        [node("MatMul", ["row", "w"], ["m"]), node("Add", ["m", "s"], ["s_out"]), node("Identity", ["s_out"], ["o"])],
        [value("s", [5]), value("row", [4])],
        [value("s_out", [5]), value("o", [5])],
        {"w": array(1, 4, 5)},
        "body",
    )
    proto = model(
        [node("Scan", ["s0", "x"], ["last", "y"], name="scan", body=body, num_scan_inputs=1)],
        {"x": [3, 4]},
        ["y", "last"],
        {"s0": array(2, 5)},
    )
    compilation = check(proto, {"x": X})
    assert source_names(compilation.compiled) == {"w", "s0"}


def test_functions_are_inlined_and_their_constants_promoted() -> None:
    function = helper.make_function(
        "local",
        "Linear",
        ["a", "w"],
        ["b"],
        [
            node("Constant", [], ["shift"], value=numpy_helper.from_array(array(5, 4))),
            node("MatMul", ["a", "w"], ["p"]),
            node("Add", ["p", "shift"], ["b"]),
        ],
        [helper.make_opsetid("", 17)],
    )
    proto = model(
        [
            node("Linear", ["x", "w1"], ["h"], domain="local"),
            node("Linear", ["h", "w2"], ["y"], domain="local"),
        ],
        {"x": [3, 4]},
        ["y"],
        {"w1": array(1, 4, 4), "w2": array(2, 4, 4)},
        functions=[function],
    )
    compilation = compile_model(proto)
    compiled = compilation.compiled
    assert len(compiled.sources) == 4
    assert not compiled.activation.functions
    feeds = {"x": X, **compilation.weights}
    np.testing.assert_array_equal(run(proto, {"x": X})[0], run(compiled.activation, feeds)[0])
    assert sum((a == array(5, 4)).all() for a in compilation.weights.values() if a.shape == (4,)) == 2


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


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_floating_dtypes(dtype: str) -> None:
    code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    proto = model(
        [
            node("Cast", ["x"], ["c"], to=code),
            node("MatMul", ["c", "w"], ["m"]),
            node("Cast", ["m"], ["y"], to=TensorProto.FLOAT),
        ],
        {"x": [3, 4]},
        ["y"],
        {"w": array(1, 4, 4, dtype=dtype)},
    )
    compilation = check(proto, {"x": X})
    assert compilation.compiled.sources[0].spec.dtype == dtype


def test_bfloat16_weight_is_cast_in_the_program() -> None:
    proto = model(
        [node("Cast", ["w"], ["wf"], to=TensorProto.FLOAT), node("MatMul", ["x", "wf"], ["y"])],
        {"x": [3, 4]},
        ["y"],
        {"w": array(1, 4, 4, dtype="bfloat16")},
    )
    compilation = check(proto, {"x": X})
    assert compilation.compiled.sources[0].spec.dtype == "bfloat16"
    assert [spec.dtype for spec in compilation.compiled.engine_weights] == ["float32"]


def test_models_without_weights_compile_to_themselves() -> None:
    proto = model([node("Relu", ["x"], ["y"])], {"x": [3, 4]}, ["y"])
    compilation = check(proto, {"x": X})
    assert not compilation.compiled.engine_weights


def test_old_operator_sets_are_refused() -> None:
    proto = model([node("Relu", ["x"], ["y"])], {"x": [3, 4]}, ["y"], opset=6)
    with pytest.raises(UnsupportedModelError, match="operator set 6"):
        compile_model(proto)


def test_unnamed_and_equally_named_nodes_get_names_of_their_own() -> None:
    proto = model(
        [
            node("MatMul", ["x", "w"], ["a"]),
            node("Relu", ["a"], ["b"], name="same"),
            node("Neg", ["b"], ["y"], name="same"),
        ],
        {"x": [3, 4]},
        ["y"],
        {"w": array(1, 4, 4)},
    )
    names = [n.name for n in compile_model(proto).compiled.activation.graph.node]
    assert len(set(names)) == 3
    assert all(names)
    assert names[1] == "same"


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


def test_a_loop_variable_that_is_called_like_an_outer_weight() -> None:
    body = graph(
        [
            node("Identity", ["c"], ["c_out"]),
            node("MatMul", ["w", "v"], ["m"]),
            node("Tanh", ["m"], ["w_out"]),
        ],
        [value("i", [], TensorProto.INT64), value("c", [], TensorProto.BOOL), value("w", [3, 4])],
        [value("c_out", [], TensorProto.BOOL), value("w_out", [3, 4])],
        {"v": array(3, 4, 4)},
        "body",
    )
    proto = model(
        [node("Loop", ["n", "go", "x"], ["l"], name="loop", body=body), node("MatMul", ["l", "w"], ["y"])],
        {"x": [3, 4]},
        {"y": [3, 4]},
        {"w": array(2, 4, 4), "n": np.array(2), "go": np.array(True)},
    )
    assert source_names(check(proto, {"x": X}).compiled) == {"w", "v"}


def test_both_spellings_of_the_default_domain() -> None:
    proto = model(
        [node("Transpose", ["w"], ["t"], domain="ai.onnx"), node("MatMul", ["x", "t"], ["y"])],
        {"x": [3, 4]},
        ["y"],
        {"w": array(1, 4, 4)},
    )
    assert [n.op_type for n in check(proto, {"x": X}).compiled.activation.graph.node] == ["MatMul"]


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
