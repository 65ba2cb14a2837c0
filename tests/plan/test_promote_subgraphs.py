"""Weights inside branches, loops, scans and functions."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_refit.plan.compile import compile_model
from tests.plan.promote_support import X, origin_of
from tests.plan.support import array, check, graph, model, node, run, source_names, value


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
