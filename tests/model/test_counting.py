import numpy as np
import pytest
from onnx import helper

from onnx_refit.model.counting import ReplaceCounters, SimplifyPositions
from tests.model.builders import apply, graph, model, node, operators

CASES = [{"x": np.ones((length, 2), np.float32)} for length in (1, 2, 7)]


def scan(body_nodes, states, outputs, weights, *, axis=0, opset=11, first=0, dtype=np.int32, **attributes):
    kind = str(np.dtype(dtype))
    inputs = {states[0]: (kind, [1]), "element": ("float32", [2])}
    body = graph(body_nodes, inputs, {name: (kind, [1]) for name in outputs}, weights)
    given = {} if axis == 0 else {"scan_input_axes": [axis]}
    names = ["last", "y", "z"][: len(outputs)]
    nodes = [node("Scan", ["first", "x"], names, body=body, num_scan_inputs=1, name="loop", **given, **attributes)]
    shape = ["n", 2] if axis in (0, -2) else [2, "n"]
    declared = dict.fromkeys(names[1:], (kind, None))
    return model(nodes, {"x": ("float32", shape)}, declared, {"first": np.array([first], dtype)}, opset=opset)


ADD = node("Add", ["s", "step"], ["next"])


@pytest.mark.parametrize("opset", [9, 11, 13])
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32])
def test_a_counter(opset, dtype):
    nodes = [ADD, node("Identity", ["s"], ["now"])]
    original = scan(nodes, ["s"], ["next", "now"], {"step": np.ones(1, dtype)}, opset=opset, dtype=dtype)
    result = apply(ReplaceCounters(), original, *CASES)
    assert "Scan" not in operators(result.model)
    assert result.changes[0].what == f"replaced by the series from {dtype(0)} by steps of {dtype(1)}"


def test_a_counter_that_starts_and_steps_otherwise_and_hands_out_both():
    nodes = [
        node("Add", ["step", "s"], ["next"]),
        node("Identity", ["s"], ["now"]),
        node("Identity", ["next"], ["out"]),
    ]
    original = scan(nodes, ["s"], ["next", "now", "out"], {"step": np.full(1, 3, np.int32)}, first=5)
    assert "Scan" not in operators(apply(ReplaceCounters(), original, *CASES).model)


@pytest.mark.parametrize("axis", [1, -1, -2])
def test_a_counter_along_another_axis(axis):
    nodes = [ADD, node("Identity", ["s"], ["now"])]
    original = scan(nodes, ["s"], ["next", "now"], {"step": np.ones(1, np.int32)}, axis=axis)
    cases = CASES if axis == -2 else [{"x": case["x"].T.copy()} for case in CASES]
    assert "Scan" not in operators(apply(ReplaceCounters(), original, *cases).model)


def test_what_only_looks_like_a_counter_stays():
    one = {"step": np.ones(1, np.int32)}
    now = node("Identity", ["s"], ["now"])
    doubled = scan([node("Add", ["s", "s"], ["next"]), now], ["s"], ["next", "now"], {})
    product = scan([node("Mul", ["s", "step"], ["next"]), now], ["s"], ["next", "now"], one)
    backwards = scan([ADD, now], ["s"], ["next", "now"], one, scan_output_directions=[1])
    reasons = []
    for original in (doubled, product, backwards):
        result = apply(ReplaceCounters(), original, *CASES)
        assert not result.modified
        reasons.append(result.blockers[0].reason)
    assert "constant" in reasons[0]
    assert "Mul" in reasons[1]
    assert "scan_output_directions" in reasons[2]


def test_a_running_sum_stays():
    body = graph(
        [node("Add", ["s", "element"], ["next"]), node("Identity", ["next"], ["now"])],
        {"s": ("float32", [2]), "element": ("float32", [2])},
        {"next": ("float32", [2]), "now": ("float32", [2])},
    )
    nodes = [node("Scan", ["first", "x"], ["last", "y"], body=body, num_scan_inputs=1)]
    outputs = {"y": ("float32", None), "last": ("float32", [2])}
    original = model(nodes, {"x": ("float32", ["n", 2])}, outputs, {"first": np.zeros(2, np.float32)})
    assert not apply(ReplaceCounters(), original, *CASES).modified


def test_a_counter_whose_end_is_used_or_whose_start_is_not_constant_stays():
    nodes = [ADD, node("Identity", ["s"], ["now"])]
    original = scan(nodes, ["s"], ["next", "now"], {"step": np.ones(1, np.int32)})
    original.graph.output.add().CopyFrom(original.graph.output[0])
    original.graph.output[1].name = "last"
    result = apply(ReplaceCounters(), original, *CASES)
    assert result.blockers[0].reason == "its last state is used"

    original = scan(nodes, ["s"], ["next", "now"], {"step": np.ones(1, np.int32)})
    original.graph.input.add().CopyFrom(original.graph.output[0])
    original.graph.input[1].name = "first"
    assert "first state" in ReplaceCounters().call(original).blockers[0].reason


def positions(opset=11, extra=(), source="p", start=0, step=1, index="ArgMax"):
    nodes = [node("Shape", ["x"], ["shape"]), node("Gather", ["shape", "zero"], ["size"], axis=0)]
    if opset >= 11:
        nodes += [node("Reshape", ["size", "empty"], ["n"]), node("Range", ["start", "n", "step"], ["p"])]
    else:
        ones = helper.make_tensor("one", 7, [1], [1])
        nodes += [node("ConstantOfShape", ["size"], ["ones"], value=ones), node("NonZero", ["ones"], ["p2"])]
        nodes += [node("Reshape", ["p2", "flat"], ["p"])]
    nodes += list(extra)
    attributes = {"axis": 0, "keepdims": 1} if index == "ArgMax" else {"axis": 0}
    nodes += [node(index, ["x"], ["i"], **attributes), node("Gather", [source, "i"], ["y"], axis=0)]
    weights = {
        "zero": np.array([0]),
        "empty": np.array([], np.int64),
        "flat": np.array([-1]),
        "start": np.array(start),
        "step": np.array(step),
    }
    return nodes, weights


XS = [{"x": np.array(x, np.float32)} for x in ([3, 1, 2], [1, 5, 5, 2], [0])]


@pytest.mark.parametrize("opset", [9, 11])
def test_looking_an_index_up_among_positions(opset):
    nodes, weights = positions(opset)
    original = model(nodes, {"x": ("float32", ["n"])}, {"y": ("int64", [1])}, weights, opset=opset)
    result = apply(SimplifyPositions(), original, *XS)
    assert operators(result.model) == ["ArgMax", "Cast"]


def test_positions_in_another_type_and_shape():
    extra = [node("Cast", ["p"], ["c"], to=1), node("Reshape", ["c", "column"], ["r"])]
    extra += [node("Transpose", ["r"], ["t"]), node("Reshape", ["t", "flat"], ["q"])]
    nodes, weights = positions(extra=extra, source="q")
    weights["column"] = np.array([-1, 1])
    original = model(nodes, {"x": ("float32", ["n"])}, {"y": ("float32", [1])}, weights)
    assert operators(apply(SimplifyPositions(), original, *XS).model) == ["ArgMax", "Cast"]


@pytest.mark.parametrize(("start", "step"), [(1, 1), (0, 2)])
def test_other_numbers_stay(start, step):
    nodes, weights = positions(start=start, step=step)
    original = model(nodes, {"x": ("float32", ["n"])}, {"y": ("int64", [1])}, weights)
    assert not apply(SimplifyPositions(), original, {"x": np.array([3, 1, 2], np.float32)}).modified


def test_rounded_numbers_stay():
    extra = [node("Cast", ["p"], ["q"], to=10)]  # float16 does not hold every position
    nodes, weights = positions(extra=extra, source="q")
    original = model(nodes, {"x": ("float32", ["n"])}, {"y": ("float16", [1])}, weights)
    assert not SimplifyPositions().call(original).modified
