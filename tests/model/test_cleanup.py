import numpy as np
import onnx
import pytest

from onnx_refit.model.cleanup import RemoveDropout, RemoveIdentity, RemoveUnusedConstants
from tests.model.builders import apply, graph, model, node, operators

X = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
SHAPE = ("float32", [2, 3])


@pytest.mark.parametrize("opset", [7, 10, 12, 13])
def test_dropout_between_nodes(opset):
    nodes = [node("Neg", ["x"], ["a"]), node("Dropout", ["a"], ["b"], name="d"), node("Abs", ["b"], ["y"])]
    result = apply(RemoveDropout(), model(nodes, {"x": SHAPE}, {"y": SHAPE}, opset=opset), X)
    assert operators(result.model) == ["Neg", "Abs"]
    assert result.changes[0].node == "d"


def test_dropout_at_both_ends_of_the_graph():
    inner = model([node("Neg", ["x"], ["a"]), node("Dropout", ["a"], ["y"])], {"x": SHAPE}, {"y": SHAPE})
    assert operators(apply(RemoveDropout(), inner, X).model) == ["Neg"]
    whole = model([node("Dropout", ["x"], ["y"])], {"x": SHAPE}, {"y": SHAPE})
    assert operators(apply(RemoveDropout(), whole, X).model) == ["Identity"]


def test_two_outputs_of_one_value():
    nodes = [node("Neg", ["x"], ["a"]), node("Dropout", ["a"], ["y"]), node("Dropout", ["a"], ["z"])]
    nodes.append(node("Abs", ["a"], ["w"]))
    original = model(nodes, {"x": SHAPE}, {"y": SHAPE, "z": SHAPE, "w": SHAPE, "a": SHAPE})
    apply(RemoveDropout(), original, X)
    apply(RemoveDropout(), model(nodes, {"x": SHAPE}, {"y": SHAPE, "z": SHAPE, "w": SHAPE}), X)


def test_the_mask_at_inference_is_true():
    nodes = [node("Dropout", ["x"], ["y", "mask"]), node("Not", ["mask"], ["dropped"])]
    original = model(nodes, {"x": SHAPE}, {"y": SHAPE, "dropped": ("bool", [2, 3])})
    result = apply(RemoveDropout(), original, X)
    assert "Dropout" not in operators(result.model)
    output = model([node("Dropout", ["x"], ["y", "mask"])], {"x": SHAPE}, {"y": SHAPE, "mask": ("bool", [2, 3])})
    assert "Dropout" not in operators(apply(RemoveDropout(), output, X).model)


def test_the_mask_before_opset_12_is_not_defined():
    nodes = [node("Dropout", ["x"], ["y", "mask"]), node("Not", ["mask"], ["z"])]
    result = RemoveDropout().call(model(nodes, {"x": SHAPE}, {"y": SHAPE, "z": ("bool", [2, 3])}, opset=10))
    assert "mask" in result.blockers[0].reason
    unused = model([node("Dropout", ["x"], ["y", "mask"])], {"x": SHAPE}, {"y": SHAPE}, opset=10)
    assert RemoveDropout().call(unused).modified


@pytest.mark.parametrize(("training", "reason"), [(True, "training mode"), (None, "while the model runs")])
def test_a_dropout_that_trains_stays(training, reason):
    inputs, weights = {"x": SHAPE}, {"ratio": np.array(0.5, np.float32)}
    if training is None:
        inputs["t"] = ("bool", [])
    else:
        weights["t"] = np.array(training)
    nodes = [node("Dropout", ["x", "ratio", "t"], ["y"], name="d")]
    result = RemoveDropout().call(model(nodes, inputs, {"y": SHAPE}, weights))
    assert not result.modified
    assert reason in result.blockers[0].reason


def test_a_dropout_told_not_to_train_goes():
    weights = {"ratio": np.array(0.5, np.float32), "t": np.array(False)}
    nodes = [node("Dropout", ["x", "ratio", "t"], ["a"]), node("Neg", ["a"], ["y"])]
    assert operators(apply(RemoveDropout(), model(nodes, {"x": SHAPE}, {"y": SHAPE}, weights), X).model) == ["Neg"]


def test_dropout_in_a_branch_and_before_one():
    then = graph([node("Dropout", ["d"], ["t"])], {}, {"t": SHAPE})
    other = graph([node("Dropout", ["x"], ["b"]), node("Neg", ["b"], ["e"])], {}, {"e": SHAPE})
    nodes = [
        node("Abs", ["x"], ["a"]),
        node("Dropout", ["a"], ["d"]),
        node("If", ["flag"], ["y"], then_branch=then, else_branch=other),
    ]
    original = model(nodes, {"x": SHAPE, "flag": ("bool", [])}, {"y": SHAPE})
    result = apply(RemoveDropout(), original, *[X | {"flag": np.array(flag)} for flag in (True, False)])
    assert len(result.changes) == 3
    onnx.checker.check_model(result.model)


def test_identity_of_a_weight_keeps_the_name():
    nodes = [node("Identity", ["w"], ["v"]), node("Add", ["x", "v"], ["y"])]
    original = model(nodes, {"x": SHAPE}, {"y": SHAPE}, {"w": np.ones(3, np.float32)})
    result = apply(RemoveIdentity(), original, X)
    assert list(result.model.graph.node[0].input) == ["x", "w"]


def test_chains_of_identities():
    nodes = [node("Neg", ["x"], ["a"]), node("Identity", ["a"], ["b"]), node("Identity", ["b"], ["y"])]
    assert operators(apply(RemoveIdentity(), model(nodes, {"x": SHAPE}, {"y": SHAPE}), X).model) == ["Neg"]


def test_an_identity_from_input_to_output_stays():
    result = apply(RemoveIdentity(), model([node("Identity", ["x"], ["y"])], {"x": SHAPE}, {"y": SHAPE}), X)
    assert not result.modified


def test_unused_constants_go_and_weights_stay():
    weights = {"flat": np.array([-1]), "w": np.ones(2, np.float32), "used": np.array(1, np.float32)}
    nodes = [node("Add", ["x", "used"], ["y"])]
    result = apply(RemoveUnusedConstants(), model(nodes, {"x": SHAPE}, {"y": SHAPE}, weights), X)
    assert [tensor.name for tensor in result.model.graph.initializer] == ["w", "used"]


def test_a_constant_used_in_a_branch_only_stays():
    then = graph([node("Reshape", ["x", "shape"], ["t"])], {}, {"t": ("float32", ["n"])})
    other = graph([node("Reshape", ["x", "shape"], ["e"])], {}, {"e": ("float32", ["n"])})
    nodes = [node("If", ["flag"], ["y"], then_branch=then, else_branch=other)]
    inputs = {"x": SHAPE, "flag": ("bool", [])}
    original = model(nodes, inputs, {"y": ("float32", ["n"])}, {"shape": np.array([-1])})
    assert not RemoveUnusedConstants().call(original).modified
