import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

import onnx_refit
from onnx_refit.errors import ModelError
from onnx_refit.model.load import check_model, load_model
from onnx_refit.model.order import SortNodes
from onnx_refit.model.prepare import prepare
from tests.model.builders import graph, model, node, values

SHAPE = ("float32", [2, 3])
X = np.array([[-1.5, 2.0, 0.25], [3.0, -4.0, 0.5]], np.float32)


def chain(order=None):
    """y = tanh(relu(x @ w) + |x|), its nodes in the given order."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"], name="product"),
        node("Relu", ["a"], ["b"], name="relu"),
        node("Abs", ["x"], ["c"], name="abs"),
        node("Add", ["b", "c"], ["d"], name="sum"),
        node("Tanh", ["d"], ["y"], name="tanh"),
    ]
    weights = {"w": np.arange(9, dtype=np.float32).reshape(3, 3)}
    return model([nodes[index] for index in order or range(5)], {"x": SHAPE}, {"y": SHAPE}, weights)


def names(graph):
    return [node.name for node in graph.node]


def branches(order):
    """An If whose branches' nodes come in the given order and read ``late``, made behind the If."""
    made = []
    for op_type in ("Neg", "Exp"):
        nodes = [
            node(op_type, ["late"], ["p"], name=f"{op_type}_first"),
            node("Abs", ["p"], ["q"], name=f"{op_type}_second"),
        ]
        made.append(graph([nodes[index] for index in order], {}, {"q": SHAPE}))
    outer = [
        node("If", ["on"], ["z"], name="choose", then_branch=made[0], else_branch=made[1]),
        node("Relu", ["x"], ["late"], name="late"),
        node("Identity", ["z"], ["y"], name="out"),
    ]
    return model(outer, {"x": SHAPE, "on": ("bool", [])}, {"y": SHAPE})


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(5)))
def test_any_order_gives_the_same_model(order):
    proto = chain(order)
    before = proto.SerializeToString()
    load_model(proto)
    result = SortNodes().call(proto)
    check_model(result.model)
    assert proto.SerializeToString() == before
    assert result.modified == (result.model is not proto)
    assert SortNodes().call(result.model).model is result.model
    place = {name: index for index, name in enumerate(names(result.model.graph))}
    assert place["product"] < place["relu"] < place["sum"] < place["tanh"]
    assert place["abs"] < place["sum"]


def test_nodes_keep_their_order_where_it_does_not_matter():
    assert names(SortNodes().call(chain([2, 1, 0, 3, 4])).model.graph) == ["abs", "product", "relu", "sum", "tanh"]
    proto = chain()
    assert SortNodes().call(proto).model is proto


def test_the_checker_wants_them_sorted_unless_told_otherwise():
    with pytest.raises(ModelError, match="topologically sorted"):
        check_model(chain([4, 3, 2, 1, 0]))
    check_model(chain([4, 3, 2, 1, 0]), any_order=True)


def test_preparing_records_it():
    prepared = prepare(chain([4, 3, 2, 1, 0]))
    assert [(change.node, change.what) for change in prepared.changes] == [("g", "nodes sorted")]
    assert not prepare(chain()).changes


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_plan_of_an_unsorted_model_computes_the_same_and_says_so(tmp_path, saved, prepared):
    options = onnx_refit.BuildOptions(prepare=prepared)
    with onnx_refit.load(onnx_refit.build(chain(), options=options)) as engine:
        expected = engine.run({"x": X})["y"]
    proto = chain([4, 3, 2, 1, 0])
    path = tmp_path / "unsorted.onnx"
    onnx.save(proto, path)
    plan = onnx_refit.build(path if saved else proto, options=options)
    assert [d.subject for d in plan.compiled.decisions if d.action == "sort the nodes"] == ["graph 'g'"]
    with onnx_refit.load(plan) as engine:
        assert np.array_equal(engine.run({"x": X})["y"], expected)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("on", [False, True])
def test_sub_graphs_and_what_they_capture(order, on):
    prepared = prepare(load_model(branches(order)))
    assert names(prepared.model.graph)[:2] == ["late", "choose"]
    inputs = {"x": X, "on": np.array(on)}
    with onnx_refit.load(onnx_refit.build(branches(order))) as engine:
        expected = np.maximum(X, 0) if on else np.exp(np.maximum(X, 0))
        np.testing.assert_allclose(engine.run(inputs)["y"], expected, rtol=1e-6)


def test_a_name_that_a_branch_makes_itself_is_no_dependency():
    inner = graph([node("Neg", ["x"], ["b"])], {}, {"b": SHAPE})
    nodes = [
        node("If", ["on"], ["a"], name="choose", then_branch=inner, else_branch=inner),
        node("Abs", ["a"], ["b"], name="abs"),
    ]
    proto = model(nodes, {"x": SHAPE, "on": ("bool", [])}, {"b": SHAPE})
    assert SortNodes().call(proto).model is proto


def test_functions():
    body = [node("Add", ["b", "a"], ["c"]), node("Neg", ["a"], ["b"])]
    proto = model([node("Cancel", ["x"], ["y"], domain="my.ops")], {"x": SHAPE}, {"y": SHAPE})
    proto.opset_import.append(helper.make_opsetid("my.ops", 1))
    opsets = [helper.make_opsetid("", 13)]
    proto.functions.append(helper.make_function("my.ops", "Cancel", ["a"], ["c"], body, opsets))
    with onnx_refit.load(onnx_refit.build(proto)) as engine:
        assert not engine.run({"x": X})["y"].any()


def test_nodes_in_a_circle(tmp_path):
    proto = chain()
    proto.graph.node[2].input[0] = "y"
    path = tmp_path / "circle.onnx"
    onnx.save(proto, path)
    for source in (proto, path):
        with pytest.raises(ModelError, match="need each other's values: abs -> sum -> tanh -> abs"):
            load_model(source)


def test_a_value_that_nobody_makes_is_the_checkers_business():
    proto = chain([4, 3, 2, 1, 0])
    proto.graph.node[2].input[0] = "nobody"
    with pytest.raises(ModelError, match=r"not valid ONNX: .*nobody"):
        load_model(proto)


def test_declared_values_stay():
    proto = chain([4, 3, 2, 1, 0])
    proto.graph.value_info.extend(values({"a": SHAPE}))
    assert [value.name for value in SortNodes().call(proto).model.graph.value_info] == ["a"]
