import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from onnx_refit.model.argmax import ReplaceHardmax, SelectByArgMax
from onnx_refit.model.graph import producers
from tests.model.builders import apply, graph, model, node, operators


def hardmax_model(shape, opset, axis=None, dtype="float32", declared=None):
    attributes = {} if axis is None else {"axis": axis}
    declared = shape if declared is None else declared
    nodes = [node("Hardmax", ["x"], ["y"], name="mark", **attributes)]
    return model(nodes, {"x": (dtype, declared)}, {"y": (dtype, declared)}, opset=opset)


def ties(shape, seed, dtype=np.float32):
    """Few different numbers, so that most maxima are there more than once."""
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(dtype)


@st.composite
def cases(draw):
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    opset = draw(st.sampled_from([9, 11, 12, 13, 18]))
    low = -len(shape) if opset >= 11 else 0
    axis = draw(st.integers(low, len(shape) - 1))
    dynamic = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    declared = [f"d{place}" if free else size for place, (size, free) in enumerate(zip(shape, dynamic, strict=True))]
    return tuple(shape), opset, axis, declared, draw(st.integers(0, 1000))


@settings(deadline=None, max_examples=60)
@given(cases())
def test_hardmax_alone(case):
    shape, opset, axis, declared, seed = case
    original = hardmax_model(shape, opset, axis, declared=declared)
    result = apply(ReplaceHardmax(), original, {"x": ties(shape, seed)})
    assert "Hardmax" not in operators(result.model)
    if opset >= 13:  # the reference evaluator has the semantics of opset 13 only
        (expected,) = ReferenceEvaluator(original).run(None, {"x": ties(shape, seed)})
        (got,) = ReferenceEvaluator(result.model).run(None, {"x": ties(shape, seed)})
        np.testing.assert_array_equal(got, expected)


def flattened_hardmax(x, axis):
    """Hardmax before opset 13, by its words: rows of the input made two-dimensional."""
    rows = x.reshape(int(np.prod(x.shape[:axis])), -1)
    out = np.zeros_like(rows)
    out[np.arange(len(rows)), rows.argmax(1)] = 1
    return out.reshape(x.shape)


@pytest.mark.parametrize("opset", [9, 11])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_before_opset_13_the_input_is_flattened(opset, axis):
    x = ties((2, 3, 4), 5)
    result = apply(ReplaceHardmax(), hardmax_model((2, 3, 4), opset, axis), {"x": x})
    (got,) = ReferenceEvaluator(result.model).run(None, {"x": x})
    np.testing.assert_array_equal(got, flattened_hardmax(x, axis))
    assert np.sum(got) == np.prod(x.shape[:axis])


@pytest.mark.parametrize(("opset", "axis"), [(9, None), (11, None), (13, None)])
def test_the_default_axis(opset, axis):
    apply(ReplaceHardmax(), hardmax_model((2, 3, 4), opset, axis), {"x": ties((2, 3, 4), 1)})


def test_the_axis_behind_the_last_gives_ones():
    original = hardmax_model((2, 3), 9, 2)
    x = ties((2, 3), 1)
    (got,) = ReferenceEvaluator(ReplaceHardmax().call(original).model).run(None, {"x": x})
    np.testing.assert_array_equal(got, np.ones((2, 3)))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_types(dtype):
    result = ReplaceHardmax().call(hardmax_model((2, 3), 13, 1, dtype))
    x = ties((2, 3), 3, dtype)
    (got,) = ReferenceEvaluator(result.model).run(None, {"x": x})
    assert np.asarray(got).dtype == np.dtype(dtype)
    np.testing.assert_array_equal(got, flattened_hardmax(x, 1))


def test_hardmax_of_unknown_rank_stays():
    result = ReplaceHardmax().call(hardmax_model(None, 13))
    assert not result.modified
    assert (result.blockers[0].node, result.blockers[0].reason) == ("mark", "the rank of its input is not known")


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 1, 2, 2), (1, 5, 1)])
@pytest.mark.parametrize(("opset", "axis"), [(9, 0), (9, 1), (11, 2)])
def test_flattening_needs_no_rank(shape, opset, axis):
    nodes = [node("Reshape", ["v", "shape"], ["x"]), node("Hardmax", ["x"], ["y"], axis=axis)]
    inputs = {"v": ("float32", ["n"]), "shape": ("int64", ["r"])}
    original = model(nodes, inputs, {"y": ("float32", None)}, opset=opset)
    x = ties(shape, 2)
    case = {"v": x.ravel(), "shape": np.array(shape)}
    result = apply(ReplaceHardmax(), original, case)
    assert "Hardmax" not in operators(result.model)
    (got,) = ReferenceEvaluator(result.model).run(None, case)
    np.testing.assert_array_equal(got, flattened_hardmax(x, axis))


def test_hardmax_before_opset_9_stays():
    result = ReplaceHardmax().call(hardmax_model((2, 3), 7, 1))
    assert "opset 7" in result.blockers[0].reason


def tail(
    shape, *, opset=9, axis=1, casts=(TensorProto.BOOL,), between=(), data_shape=None, compress_axis=None, dynamic=True
):
    """Scores -> Hardmax -> Cast -> Reshape -> Compress of numbers, as exporters write "the position of the best"."""
    attributes = {} if compress_axis is None else {"axis": compress_axis}
    names = iter("pqrstuvw")
    nodes, value = [node("Hardmax", ["x"], ["m"], name="hm", axis=axis)], "m"
    for operator, arguments in (*(("Cast", {"to": code}) for code in casts), *between):
        nodes.append(node(operator, [value], [value := next(names)], **arguments))
    nodes += [
        node("Reshape", [value, "flat"], ["c"]),
        node("Compress", ["data", "c"], ["y"], name="pick", **attributes),
    ]
    data_shape = data_shape or shape
    open_shape = [f"d{i}" if size != 1 and dynamic else size for i, size in enumerate(shape)]
    inputs = {"x": ("float32", open_shape), "data": ("int32", [f"e{i}" for i, _ in enumerate(data_shape)])}
    return model(nodes, inputs, {"y": ("int32", None)}, {"flat": np.array([-1])}, opset=opset)


def tail_case(shape, data_shape=None, seed=0):
    data = np.random.default_rng(seed).integers(0, 99, data_shape or shape).astype(np.int32)
    return {"x": ties(shape, seed), "data": data}


@pytest.mark.parametrize("opset", [9, 11, 13])
@pytest.mark.parametrize("seed", range(3))
def test_the_tail_becomes_argmax_and_gather(opset, seed):
    result = apply(SelectByArgMax(), tail((1, 7), opset=opset), tail_case((1, 7), seed=seed))
    assert operators(result.model) == ["ArgMax", "Reshape", "Gather"]
    assert {change.op_type for change in result.changes} == {"Compress", "Hardmax"}


@pytest.mark.parametrize("shape", [(1, 1), (1, 1000)])
def test_the_tail_on_short_and_long_rows(shape):
    apply(SelectByArgMax(), tail(shape, dynamic=False), tail_case(shape))


TAILS = [
    ({"shape": (7,), "axis": 0, "opset": 13}, (7,)),
    ({"shape": (7,), "axis": 0, "opset": 9}, (7,)),
    ({"shape": (7, 1), "axis": 0, "opset": 9}, (7, 1)),
    ({"shape": (7, 1), "axis": 0, "opset": 13}, (7, 1)),
    ({"shape": (3, 4), "axis": 0, "opset": 9}, (3, 4)),  # flattened: one maximum of all twelve
    ({"shape": (1, 3, 4), "axis": 1, "opset": 11}, (1, 3, 4)),
    ({"shape": (1, 1, 6), "axis": -1, "opset": 13}, (6,)),
    ({"shape": (1, 6), "casts": (TensorProto.INT32, TensorProto.BOOL)}, (6,)),
    ({"shape": (1, 6), "between": (("Unsqueeze", {"axes": [0]}), ("Squeeze", {"axes": [0]}), ("Identity", {}))}, (6,)),
    ({"shape": (1, 6), "data_shape": (6, 3), "compress_axis": 0}, (6, 3)),
    ({"shape": (1, 6), "data_shape": (2, 6), "compress_axis": 1}, (2, 6)),
    ({"shape": (1, 6), "data_shape": (3, 4)}, (3, 4)),  # the condition is shorter than the flattened data
]


@pytest.mark.parametrize(("arguments", "data_shape"), TAILS)
def test_tails_of_other_forms(arguments, data_shape):
    arguments = {"data_shape": data_shape, **arguments}
    original = tail(**arguments)
    for seed in range(4):
        result = apply(SelectByArgMax(), original, tail_case(arguments["shape"], data_shape, seed))
    assert not {"Hardmax", "Compress"} & set(operators(result.model))


@pytest.mark.parametrize("opset", [9, 13])
@pytest.mark.parametrize(("declared", "changed"), [([1], True), (["k"], False), (None, False)])
def test_a_result_declared_to_be_one_element_tells_that_there_is_one_maximum(opset, declared, changed):
    nodes = [
        node("Reshape", ["v", "shape"], ["x"]),  # of unknown rank, as behind a Scan
        node("Hardmax", ["x"], ["m"], axis=1),
        node("Cast", ["m"], ["b"], to=TensorProto.BOOL),
        node("Reshape", ["b", "flat"], ["c"]),
        node("Compress", ["data", "c"], ["y"]),
    ]
    inputs = {"v": ("float32", ["n"]), "shape": ("int64", ["r"]), "data": ("int32", ["a", "b"])}
    original = model(nodes, inputs, {"y": ("int32", declared)}, {"flat": np.array([-1])}, opset=opset)
    x, data = ties((1, 6), 4), np.arange(6, dtype=np.int32).reshape(1, 6)
    result = apply(SelectByArgMax(), original, {"v": x.ravel(), "shape": np.array([1, 6]), "data": data})
    assert result.modified == changed


def test_several_maxima_are_left_to_the_general_passes():
    for arguments in (
        {"shape": (2, 3), "dynamic": False},
        {"shape": (2, 3)},
        {"shape": (3, 4), "axis": 0, "opset": 13},
    ):
        assert not apply(SelectByArgMax(), tail(**arguments)).modified


def test_a_mark_without_a_cast_to_bool_is_no_condition():
    nodes = [node("Hardmax", ["x"], ["m"], axis=1), node("Cast", ["m"], ["s"], to=TensorProto.STRING)]
    nodes += [
        node("Equal", ["s", "s"], ["e"]),
        node("Reshape", ["e", "flat"], ["c"]),
        node("Compress", ["d", "c"], ["y"]),
    ]
    inputs = {"x": ("float32", [1, 4]), "d": ("int32", [4])}
    original = model(nodes, inputs, {"y": ("int32", None)}, {"flat": np.array([-1])}, opset=19)
    assert not SelectByArgMax().call(original).modified


def test_a_mark_that_others_read_stays_for_them():
    nodes = [
        node("Hardmax", ["x"], ["m"], name="hm", axis=1),
        node("Cast", ["m"], ["b"], to=TensorProto.BOOL),
        node("Reshape", ["b", "flat"], ["c"]),
        node("Compress", ["x", "c"], ["y"], name="pick"),
        node("Neg", ["m"], ["z"]),
    ]
    outputs = {"y": ("float32", [1]), "z": ("float32", [1, 4])}
    original = model(nodes, {"x": ("float32", [1, 4])}, outputs, {"flat": np.array([-1])}, opset=9)
    result = apply(SelectByArgMax(), original, {"x": ties((1, 4), 3)})
    assert "Hardmax" in operators(result.model)
    assert "Cast" not in operators(result.model)
    again = apply(ReplaceHardmax(), result.model, {"x": ties((1, 4), 3)})
    assert "Hardmax" not in operators(again.model)


def test_two_choices_by_one_mark():
    nodes = [
        node("Hardmax", ["x"], ["m"], axis=1),
        node("Cast", ["m"], ["b"], to=TensorProto.BOOL),
        node("Reshape", ["b", "flat"], ["c"]),
        node("Compress", ["x", "c"], ["y"]),
        node("Compress", ["data", "c"], ["z"]),
    ]
    inputs = {"x": ("float32", [1, "n"]), "data": ("int32", ["n"])}
    outputs = {"y": ("float32", None), "z": ("int32", None)}
    original = model(nodes, inputs, outputs, {"flat": np.array([-1])}, opset=9)
    result = apply(SelectByArgMax(), original, tail_case((1, 5), (5,)))
    assert not {"Hardmax", "Compress", "Cast"} & set(operators(result.model))
    assert operators(result.model).count("ArgMax") == 2


def test_hardmax_in_a_branch():
    then = graph([node("Hardmax", ["x"], ["t"], axis=1)], {}, {"t": ("float32", [2, "n"])})
    other = graph([node("Neg", ["x"], ["e"])], {}, {"e": ("float32", [2, "n"])})
    nodes = [node("If", ["flag"], ["y"], then_branch=then, else_branch=other)]
    inputs = {"flag": ("bool", []), "x": ("float32", [2, "n"])}
    original = model(nodes, inputs, {"y": ("float32", [2, "n"])})
    runs = [{"flag": np.array(flag), "x": ties((2, 3), 1)} for flag in (True, False)]
    assert apply(ReplaceHardmax(), original, *runs).changes


def test_names_of_others_are_left_alone():
    """A graph that already has the names the pass would like to give."""
    nodes = [
        node("Neg", ["x"], ["hm_ArgMax_output"], name="hm_ArgMax"),
        node("Hardmax", ["hm_ArgMax_output"], ["y"], name="hm", axis=1),
    ]
    original = model(nodes, {"x": ("float32", [2, "n"])}, {"y": ("float32", [2, "n"])}, {"places": np.zeros(1)})
    result = apply(ReplaceHardmax(), original, {"x": ties((2, 3), 1)})
    names = [item.name for item in result.model.graph.node]
    assert len(set(names)) == len(names)
    assert producers(result.model.graph)["hm_ArgMax_output"].op_type == "Neg"
    onnx.checker.check_model(result.model)
