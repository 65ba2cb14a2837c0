"""Every weight of the main graph gets a name, and a reason where it stays constant."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_refit.errors import UnsupportedModelError
from onnx_refit.plan.compile import compile_model
from onnx_refit.plan.compiled import Verdict
from onnx_refit.tensors import Array
from tests.plan.promote_support import X, origin_of
from tests.plan.support import array, check, model, node, reasons, source_names


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


def test_both_spellings_of_the_default_domain() -> None:
    proto = model(
        [node("Transpose", ["w"], ["t"], domain="ai.onnx"), node("MatMul", ["x", "t"], ["y"])],
        {"x": [3, 4]},
        ["y"],
        {"w": array(1, 4, 4)},
    )
    assert [n.op_type for n in check(proto, {"x": X}).compiled.activation.graph.node] == ["MatMul"]
