import numpy as np
from onnx import TensorProto, helper, numpy_helper

from onnx_refit.model.shapes import Shapes, product, without_weights
from tests.model.builders import model, node


def reshaped():
    weights = {"w": np.ones((300, 3), np.float32), "shape": np.array([-1, 3, 100])}
    nodes = [node("MatMul", ["x", "w"], ["a"], name="m"), node("Reshape", ["a", "shape"], ["y"])]
    return model(nodes, {"x": ("float32", ["n", 300])}, {"y": ("float32", None)}, weights)


def test_shapes_are_inferred():
    shapes = Shapes(reshaped())
    assert shapes.dims("x") == ("n", 300)
    assert shapes.dims("a") == ("n", 3)
    assert shapes.dims("w") == (300, 3)
    last = shapes.dims("y")
    assert last is not None
    assert last[1:] == (3, 100)
    assert shapes.element_type("y") == TensorProto.FLOAT
    assert shapes.dims("nobody") is None
    assert shapes.element_type("nobody") is None


def test_without_weights_all_else_is_there():
    original = reshaped()
    original.producer_name = "me"
    original.metadata_props.add(key="k", value="v")
    before = original.SerializeToString()
    light = without_weights(original)
    assert original.SerializeToString() == before
    assert len(light.SerializeToString()) < 1000
    assert [tensor.name for tensor in light.graph.initializer] == ["w", "shape"]
    assert numpy_helper.to_array(light.graph.initializer[1]).tolist() == [-1, 3, 100]
    for one in (light, original):
        one.graph.ClearField("initializer")
    assert light == original


def test_a_model_that_contradicts_itself_keeps_what_it_declares():
    broken = model(
        [node("Transpose", ["x"], ["y"], perm=[0, 1, 2])], {"x": ("float32", [2, 3])}, {"y": ("float32", [3])}
    )
    assert Shapes(broken).dims("x") == (2, 3)


def test_values_that_are_no_tensors_are_passed_over():
    sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [2])
    made = model([node("SequenceAt", ["s", "i"], ["y"])], {"i": ("int64", [])}, {"y": ("float32", [2])})
    made.graph.input.append(sequence)
    assert Shapes(made).dims("s") is None
    assert Shapes(made).dims("y") == (2,)


def test_product():
    assert product([]) == 1
    assert product([2, 3]) == 6
    assert product([2, "n"]) is None
    assert product([None]) is None
