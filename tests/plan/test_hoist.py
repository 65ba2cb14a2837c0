"""Weight-only nodes run in the refit program; what must stay at inference stays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from onnx_refit.plan.compiled import Verdict
from tests.plan.support import (
    array,
    check,
    engine_spec,
    graph,
    model,
    node,
    ops,
    positive,
    program_ops,
    reasons,
    source_names,
    value,
)

X = array(0, 3, 4)


def int64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ([node("Transpose", ["w"], ["v"], perm=[1, 0])], {"w": array(1, 5, 4)}),
        ([node("Reshape", ["w", "s"], ["v"])], {"w": array(1, 2, 10), "s": int64(4, -1)}),
        ([node("Concat", ["w", "u"], ["v"], axis=1)], {"w": array(1, 4, 2), "u": array(2, 4, 3)}),
        (
            [node("Slice", ["w", "b", "e", "a"], ["v"])],
            {"w": array(1, 9, 5), "b": int64(1), "e": int64(5), "a": int64(0)},
        ),
        ([node("Gather", ["w", "i"], ["v"], axis=0)], {"w": array(1, 9, 5), "i": int64(3, 1, 8, 1)}),
        ([node("Split", ["w", "s"], ["v", "rest"], axis=0)], {"w": array(1, 6, 5), "s": int64(4, 2)}),
        (
            [node("Unsqueeze", ["w", "a"], ["t"]), node("Squeeze", ["t", "a"], ["v"])],
            {"w": array(1, 4, 5), "a": int64(0)},
        ),
        ([node("Expand", ["w", "s"], ["v"])], {"w": array(1, 1, 5), "s": int64(4, 5)}),
        ([node("Tile", ["w", "s"], ["v"])], {"w": array(1, 2, 5), "s": int64(2, 1)}),
        ([node("Pad", ["w", "p"], ["v"])], {"w": array(1, 3, 5), "p": int64(0, 0, 1, 0)}),
        ([node("Cast", ["w"], ["v"], to=TensorProto.FLOAT)], {"w": array(1, 4, 5, dtype="float16")}),
        ([node("MatMul", ["w", "u"], ["v"])], {"w": array(1, 4, 3), "u": array(2, 3, 5)}),
        (
            [node("DepthToSpace", ["w"], ["t"], blocksize=2), node("Reshape", ["t", "s"], ["v"])],
            {"w": array(1, 1, 4, 5, 1), "s": int64(4, 5)},
        ),
        (
            [
                node("ReduceL2", ["g"], ["n"], axes=[0], keepdims=1),
                node("Div", ["g", "n"], ["d"]),
                node("Mul", ["d", "m"], ["v"]),
            ],
            {"g": array(1, 4, 5), "m": array(2, 5)},
        ),
        ([node("Einsum", ["w"], ["v"], equation="ij->ji")], {"w": array(1, 5, 4)}),
    ],
    ids=lambda p: "+".join(n.op_type for n in p) if isinstance(p, list) else "",
)
def test_weight_only_nodes_leave_the_activation_graph(nodes, weights) -> None:
    proto = model([*nodes, node("MatMul", ["x", "v"], ["y"])], {"x": [3, 4]}, ["y"], weights)
    compilation = check(proto, {"x": X})
    assert ops(compilation.compiled) == ["MatMul"]
    assert engine_spec(compilation.compiled, "v").shape == (4, 5)
    assert program_ops(compilation.compiled) == [n.op_type for n in nodes]


def test_shape_arithmetic_on_a_weight_becomes_constant() -> None:
    """What exporters write for ``w.reshape(w.shape[1], -1)``: the shape of a weight feeds the Reshape of another."""
    proto = model(
        [
            node("Shape", ["w"], ["s"]),
            node("Gather", ["s", "one"], ["n"], axis=0),
            node("Unsqueeze", ["n", "zero"], ["n1"]),
            node("Concat", ["n1", "minus"], ["target"], axis=0),
            node("Reshape", ["u", "target"], ["v"]),
            node("MatMul", ["x", "w"], ["a"]),
            node("MatMul", ["a", "v"], ["y"]),
        ],
        {"x": [3, 4]},
        ["y"],
        {"w": array(1, 4, 5), "u": array(2, 30), "one": np.array(1, np.int64), "zero": int64(0), "minus": int64(-1)},
    )
    compilation = check(proto, {"x": X})
    assert ops(compilation.compiled) == ["MatMul", "MatMul"]
    assert engine_spec(compilation.compiled, "v").shape == (5, 6)
    assert compilation.compiled.program.dependencies["v"] == {"u"}


def test_size_and_partial_shape() -> None:
    proto = model(
        [
            node("Shape", ["w"], ["s"], start=1, end=2),
            node("Size", ["w"], ["n"]),
            node("Mul", ["s", "n"], ["p"]),
            node("Cast", ["p"], ["f"], to=TensorProto.FLOAT),
            node("MatMul", ["x", "w"], ["m"]),
            node("Mul", ["m", "f"], ["y"]),
        ],
        {"x": [3, 4]},
        ["y"],
        {"w": array(1, 4, 5)},
    )
    assert source_names(check(proto, {"x": X}, rel=1e-6).compiled) == {"w"}


@pytest.mark.parametrize("op_type", ["NonZero", "Unique"])
def test_a_node_whose_output_shape_depends_on_values_stays(op_type: str) -> None:
    proto = model(
        [
            node(op_type, ["w"], ["i"]),
            node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
            node("ReduceSum", ["f"], ["r"], keepdims=0),
            node("Add", ["x", "r"], ["y"]),
        ],
        {"x": [3, 4]},
        ["y"],
        {"w": array(1, 4)},
    )
    compilation = check(proto, {"x": X}, sensitive=op_type == "Unique")
    assert op_type in ops(compilation.compiled)
    (why,) = [why for why in reasons(compilation.compiled, Verdict.REJECTED).values() if op_type in why]
    assert "depends on values" in why


@pytest.mark.parametrize(
    "kept",
    [
        node("QuantizeLinear", ["w", "scale", "zero"], ["q"]),
        node("RandomNormalLike", ["w"], ["q"], seed=1.0),
        node("Dropout", ["w"], ["q"]),
        node("Bernoulli", ["p"], ["q"], seed=1.0),
    ],
    ids=lambda n: n.op_type,
)
def test_quantisation_and_random_operators_stay(kept) -> None:
    from onnx_refit.plan.compile import compile_model

    proto = model(
        [kept, node("Cast", ["q"], ["c"], to=TensorProto.FLOAT), node("Add", ["x", "c"], ["y"])],
        {"x": [3, 4]},
        ["y"],
        {
            "w": array(1, 4),
            "p": np.full(4, 0.5, np.float32),
            "scale": np.array(0.1, np.float32),
            "zero": np.array(0, np.int8),
        },
    )
    assert kept.op_type in ops(compile_model(proto).compiled)


def test_a_node_that_would_blow_a_weight_up_stays() -> None:
    proto = model(
        [node("Expand", ["w", "s"], ["v"]), node("MatMul", ["x", "v"], ["y"])],
        {"x": [3, 4]},
        ["y"],
        {"w": array(1, 1, 4), "s": int64(600000, 4, 4)},
    )
    from onnx_refit.plan.compile import compile_model

    compiled = compile_model(proto).compiled
    assert ops(compiled) == ["Expand", "MatMul"]
    assert "9600000 elements" in reasons(compiled, Verdict.REJECTED)["Expand_v"]


def test_nodes_of_constants_alone_stay_and_may_be_read_by_the_program() -> None:
    proto = model(
        [
            node("Exp", ["c"], ["e"]),
            node("Mul", ["w", "e"], ["v"]),
            node("MatMul", ["x", "v"], ["m"]),
            node("Pow", ["m", "e"], ["y"]),
        ],
        {"x": [3, 4]},
        ["y"],
        {"w": array(1, 4, 5), "c": np.array(0.0, np.float32)},
    )
    compilation = check(proto, {"x": X})
    assert ops(compilation.compiled) == ["Exp", "MatMul", "Pow"]
    assert program_ops(compilation.compiled) == ["Exp", "Mul"]


def test_nodes_in_branches_are_hoisted_and_branch_outputs_that_vanish_are_restored() -> None:
    then = graph([node("Transpose", ["w"], ["t"], perm=[1, 0])], [], [value("t")], {"w": array(1, 4, 3)}, "then")
    other = graph(
        [node("Transpose", ["w"], ["t"], perm=[1, 0]), node("Mul", ["x", "t"], ["o"])],
        [],
        [value("o")],
        {"w": array(2, 4, 3)},
        "else",
    )
    proto = model([node("If", ["cond"], ["y"], name="if", then_branch=then, else_branch=other)], {"x": [3, 4]}, ["y"])
    proto.graph.input.append(value("cond", [], TensorProto.BOOL))
    for taken in (True, False):
        compilation = check(proto, {"x": X, "cond": np.array(taken)})
        assert ops(compilation.compiled) == ["If", "Mul", "Identity"] or ops(compilation.compiled) == [
            "If",
            "Identity",
            "Mul",
        ]
        assert sorted(program_ops(compilation.compiled)) == ["Transpose", "Transpose"]


def test_what_depends_on_a_loop_variable_stays_in_the_loop() -> None:
    body = graph(
        [
            node("Identity", ["c"], ["c_out"]),
            node("Gather", ["table", "i"], ["row"], axis=0),
            node("Add", ["h", "row"], ["h_out"]),
        ],
        [value("i", [], TensorProto.INT64), value("c", [], TensorProto.BOOL), value("h", [3, 4])],
        [value("c_out", [], TensorProto.BOOL), value("h_out", [3, 4])],
        None,
        "body",
    )
    proto = model(
        [node("Loop", ["n", "go", "x"], ["y"], name="loop", body=body)],
        {"x": [3, 4]},
        {"y": [3, 4]},
        {"table": array(1, 5, 4), "n": np.array(3, np.int64), "go": np.array(True)},
    )
    compilation = check(proto, {"x": X})
    assert "Gather" in ops(compilation.compiled)


def test_tied_weights_have_one_source() -> None:
    proto = model(
        [
            node("Gather", ["emb", "ids"], ["h"], axis=0),
            node("Transpose", ["emb"], ["head"], perm=[1, 0]),
            node("MatMul", ["h", "head"], ["y"]),
        ],
        {},
        ["y"],
        {"emb": array(1, 7, 4)},
    )
    proto.graph.input.append(value("ids", [2], TensorProto.INT64))
    compilation = check(proto, {"ids": int64(1, 5)})
    compiled = compilation.compiled
    (source,) = compiled.sources
    assert len(source.uses) == 2
    assert compiled.program.dependencies == {"emb": {"emb"}, "head": {"emb"}}
    assert dict(compiled.program.passthrough) == {"emb": "emb"}


def test_a_weight_of_which_only_the_shape_is_read_is_no_source() -> None:
    proto = model(
        [
            node("Shape", ["w"], ["s"]),
            node("Reshape", ["x", "s"], ["r"]),
            node("MatMul", ["r", "v"], ["y"]),
        ],
        {"x": [3, 4]},
        ["y"],
        {"w": array(1, 6, 2), "v": array(2, 2, 2)},
    )
    compilation = check(proto, {"x": X})
    assert source_names(compilation.compiled) == {"v"}
    assert "no engine weight" in reasons(compilation.compiled, Verdict.REJECTED)["w"]


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 18, 21, 23])
def test_operator_sets(opset: int) -> None:
    nodes = [node("Transpose", ["w"], ["v"], perm=[1, 0])]
    weights = {"w": array(1, 5, 4), "g": positive(2, 5)}
    if opset < 13:
        nodes.append(node("Unsqueeze", ["g"], ["u"], axes=[0]))
    else:
        nodes.append(node("Unsqueeze", ["g", "axes"], ["u"]))
        weights["axes"] = int64(0)
    nodes += [node("Mul", ["v", "u"], ["s"]), node("MatMul", ["x", "s"], ["y"])]
    compilation = check(model(nodes, {"x": [3, 4]}, ["y"], weights, opset), {"x": X})
    assert ops(compilation.compiled) == ["MatMul"]
    assert program_ops(compilation.compiled) == ["Transpose", "Unsqueeze", "Mul"]


def test_constant_nodes_feed_hoisting_like_initializers() -> None:
    proto = model(
        [
            node("Constant", [], ["w"], value=numpy_helper.from_array(array(1, 2, 10))),
            node("Constant", [], ["s"], value_ints=[4, 5]),
            node("Reshape", ["w", "s"], ["v"]),
            node("MatMul", ["x", "v"], ["y"]),
        ],
        {"x": [3, 4]},
        ["y"],
    )
    assert ops(check(proto, {"x": X}).compiled) == ["MatMul"]


def test_cast_like_an_activation_is_a_cast() -> None:
    """How PyTorch's exporter writes the bias of a convolution without one: zeros, cast like the activation."""
    proto = model(
        [
            node("CastLike", ["zero", "x"], ["z"]),
            node("Expand", ["z", "s"], ["b"]),
            node("Conv", ["x", "w", "b"], ["c"]),
            node("Mul", ["c", "gain"], ["y"]),
        ],
        {"x": [1, 4, 5, 5]},
        ["y"],
        {"zero": np.array(0, np.int64), "s": int64(6), "w": array(1, 6, 4, 3, 3), "gain": array(2, 6, 1, 1)},
    )
    compilation = check(proto, {"x": array(0, 1, 4, 5, 5)}, rel=1e-5)
    assert "CastLike" not in ops(compilation.compiled)
    assert "Mul" not in ops(compilation.compiled)


def test_a_model_that_imports_only_other_operator_sets() -> None:
    proto = model(
        [node("Scaler", ["x"], ["y"], domain="ai.onnx.ml", offset=[1.0], scale=[2.0])], {"x": [3, 4]}, {"y": [3, 4]}
    )
    del proto.opset_import[:]
    proto.opset_import.add(domain="ai.onnx.ml", version=3)
    check(proto, {"x": X})


@pytest.mark.parametrize(
    "nothing",
    [
        [node("Identity", ["w"], ["v"])],
        [node("Identity", ["w"], ["u"]), node("Identity", ["u"], ["v"])],
        [node("Cast", ["w"], ["v"], to=TensorProto.FLOAT)],
        [node("Reshape", ["w", "s"], ["v"])],
        [node("Transpose", ["w"], ["v"], perm=[0, 1])],
        [node("Expand", ["w", "s"], ["v"])],
    ],
    ids=lambda nodes: nodes[-1].op_type,
)
def test_nodes_that_change_nothing_leave_the_weight_as_it_is(nothing) -> None:
    proto = model(
        [*nothing, node("MatMul", ["x", "v"], ["y"])],
        {"x": [3, 4]},
        ["y", "v"],
        {"w": array(1, 4, 5), "s": int64(4, 5)},
    )
    compiled = check(proto, {"x": X}).compiled
    assert compiled.program.model is None
    assert list(compiled.program.passthrough.values()) == ["w"]


def test_equal_nodes_make_one_engine_weight() -> None:
    """A layer that is called twice: TorchScript transposes its weight at each call."""
    proto = model(
        [
            node("Transpose", ["w"], ["t1"], perm=[1, 0]),
            node("Transpose", ["w"], ["t2"], perm=[1, 0]),
            node("MatMul", ["x", "t1"], ["a"]),
            node("MatMul", ["a", "t2"], ["y"]),
        ],
        {"x": [3, 4]},
        ["y"],
        {"w": array(1, 4, 4)},
    )
    compiled = check(proto, {"x": X}).compiled
    assert len(compiled.engine_weights) == 1
    assert program_ops(compiled) == ["Transpose"]


def test_equal_nodes_in_two_branches_make_one_engine_weight_and_equal_constants_stay_apart() -> None:
    def part(tag: str) -> onnx.GraphProto:
        nodes = [
            node("Transpose", ["w"], [f"{tag}_t"], perm=[1, 0]),
            node("Exp", ["c"], [f"{tag}_e"]),
            node("Identity", [f"{tag}_e"], [f"{tag}_i"]),
            node("Mul", [f"{tag}_t", f"{tag}_i"], [f"{tag}_s"]),
            node("MatMul", ["x", f"{tag}_s"], [f"{tag}_m"]),
            node("Pow", [f"{tag}_m", f"{tag}_i"], [f"{tag}_p"]),
            node("IsNaN", [f"{tag}_p"], [f"{tag}_n"]),
            node("Where", [f"{tag}_n", f"{tag}_m", f"{tag}_p"], [f"{tag}_o"]),
        ]
        return graph(nodes, [], [value(f"{tag}_o")], None, tag)

    proto = model(
        [node("If", ["cond"], ["y"], name="if", then_branch=part("then"), else_branch=part("else"))],
        {"x": [3, 4]},
        ["y"],
        {"w": array(1, 4, 4), "c": np.array(0.3, np.float32)},
    )
    proto.graph.input.append(value("cond", [], TensorProto.BOOL))
    for taken in (True, False):
        compiled = check(proto, {"x": X, "cond": np.array(taken)}).compiled
        assert program_ops(compiled).count("Transpose") == 1
        assert "Identity" not in ops(compiled)
