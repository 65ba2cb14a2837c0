import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from onnx_refit.model.compress import ReplaceCompress
from tests.model.builders import apply, graph, model, node, operators


def compress_model(shape, axis, condition=None, opset=11, declared=None, as_node=False):
    attributes = {} if axis is None else {"axis": axis}
    nodes = [node("Compress", ["x", "c"], ["y"], name="pick", **attributes)]
    inputs = {"x": ("float32", declared or shape)}
    weights = {}
    if condition is None:
        inputs["c"] = ("bool", ["k"])
    elif as_node:
        nodes.insert(0, node("Constant", [], ["c"], value=numpy_helper.from_array(condition)))
    else:
        weights["c"] = condition
    return model(nodes, inputs, {"y": ("float32", None)}, weights, opset=opset)


@st.composite
def cases(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    opset = draw(st.sampled_from([9, 11, 13]))
    low = -len(shape) if opset >= 11 else 0
    axis = draw(st.none() | st.integers(low, len(shape) - 1))
    length = int(np.prod(shape)) if axis is None else shape[axis]
    shorter = draw(st.integers(1, length))
    condition = np.array(draw(st.lists(st.booleans(), min_size=shorter, max_size=shorter)))
    return shape, opset, axis, condition, draw(st.booleans())


@settings(deadline=None, max_examples=60)
@given(cases(), st.booleans())
def test_compress(case, constant):
    shape, opset, axis, condition, dynamic = case
    declared = [f"d{place}" for place, _ in enumerate(shape)] if dynamic else shape
    original = compress_model(shape, axis, condition if constant else None, opset, declared)
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    feeds = {"x": x} if constant else {"x": x, "c": condition}
    result = apply(ReplaceCompress(), original, feeds)
    assert "Compress" not in operators(result.model)
    (got,) = ReferenceEvaluator(result.model).run(None, feeds)
    np.testing.assert_array_equal(got, np.compress(condition, x.ravel() if axis is None else x, axis or 0))


def test_a_constant_condition_becomes_constant_places():
    condition = np.array([True, False, True])
    result = apply(ReplaceCompress(), compress_model((3, 2), 0, condition), {"x": np.ones((3, 2), np.float32)})
    assert operators(result.model) == ["Gather"]
    assert "2 constant places" in result.changes[0].what


def test_a_condition_of_a_constant_node():
    condition = np.array([False, True])
    result = apply(ReplaceCompress(), compress_model((2, 2), 1, condition, as_node=True), {"x": np.eye(2, dtype="f")})
    assert "NonZero" not in operators(result.model)


@pytest.mark.parametrize("condition", [[False, False], [True, True]])
def test_none_and_all(condition):
    case = {"x": np.eye(2, dtype=np.float32), "c": np.array(condition)}
    apply(ReplaceCompress(), compress_model((2, 2), 0), case)


def test_compress_in_a_branch_with_a_condition_from_outside():
    then = graph([node("Compress", ["x", "c"], ["t"], axis=0)], {}, {"t": ("float32", ["m"])})
    other = graph([node("Neg", ["x"], ["e"])], {}, {"e": ("float32", ["m"])})
    nodes = [node("If", ["flag"], ["y"], then_branch=then, else_branch=other)]
    inputs = {"flag": ("bool", []), "x": ("float32", [3])}
    original = model(nodes, inputs, {"y": ("float32", ["m"])}, {"c": np.array([True, False, True])})
    runs = [{"flag": np.array(flag), "x": np.arange(3, dtype=np.float32)} for flag in (True, False)]
    assert "constant places" in apply(ReplaceCompress(), original, *runs).changes[0].what


def test_strings_can_be_compressed_too():
    nodes = [node("Compress", ["x", "c"], ["y"])]
    original = model(nodes, {"x": ("string", [3]), "c": ("bool", [3])}, {"y": ("string", ["n"])})
    apply(ReplaceCompress(), original, {"x": np.array(["a", "b", "c"], object), "c": np.array([True, False, True])})
