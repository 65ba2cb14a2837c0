"""The refit program: only what changed sources reach runs, shapes are exact, missing kernels are made up for."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

from onnx_refit.errors import PlanError
from onnx_refit.model.graph import Names
from onnx_refit.plan.compile import compile_model
from onnx_refit.plan.evaluate import affected, evaluate, required, run_model, select
from onnx_refit.plan.program import NotStaticError, ProgramBuilder
from onnx_refit.tensors import TensorSpec, numpy_dtype
from tests.plan.support import array, model, node


def builder(opset: int = 19, **sources: tuple[str, tuple[int, ...]]) -> ProgramBuilder:
    made = ProgramBuilder([helper.make_opsetid("", opset)], 9, Names([]))
    for name, (dtype, shape) in sources.items():
        made.add_source(TensorSpec(name, dtype, shape))
    return made


def three_weights() -> ProgramBuilder:
    made = builder(a=("float32", (2, 3)), b=("float32", (3,)), c=("float32", (4,)))
    made.push(node("Transpose", ["a"], ["at"], perm=[1, 0]))
    made.push(node("Mul", ["a", "b"], ["ab"]))
    made.push(node("Add", ["ab", "b"], ["abb"]))
    made.push(node("Neg", ["c"], ["nc"]))
    return made


def test_dependencies_passthrough_and_pruning() -> None:
    program = three_weights().finish({"at": "at", "abb": "abb", "c": "c"})
    assert program.dependencies == {"at": {"a"}, "abb": {"a", "b"}, "c": {"c"}}
    assert program.passthrough == {"c": "c"}
    assert program.model is not None
    assert [n.op_type for n in program.model.graph.node] == ["Transpose", "Mul", "Add"]
    assert [v.name for v in program.model.graph.input] == ["a", "b"]


def test_an_engine_weight_may_have_another_name_than_its_value() -> None:
    program = three_weights().finish({"renamed": "ab", "abb": "abb", "c_weight": "c"})
    weights = {"a": array(1, 2, 3), "b": array(2, 3), "c": array(3, 4)}
    derived = evaluate(program, weights)
    np.testing.assert_array_equal(derived["renamed"], weights["a"] * weights["b"])
    np.testing.assert_array_equal(derived["abb"], weights["a"] * weights["b"] + weights["b"])
    assert derived["c_weight"] is weights["c"]


def test_only_what_is_wanted_is_computed_from_only_what_it_needs() -> None:
    program = three_weights().finish({"at": "at", "abb": "abb", "nc": "nc", "c": "c"})
    assert affected(program, {"b"}) == {"abb"}
    assert affected(program, {"c"}) == {"nc", "c"}
    assert required(program, {"abb", "nc"}) == {"a", "b", "c"}
    part = select(program, {"at"})
    assert part.model is not None
    assert [n.op_type for n in part.model.graph.node] == ["Transpose"]
    assert set(evaluate(program, {"a": array(1, 2, 3)}, ["at"])) == {"at"}
    assert select(program, {"c"}).model is None


def test_a_missing_source_is_named_with_what_needs_it() -> None:
    program = three_weights().finish({"abb": "abb"})
    with pytest.raises(PlanError, match=r"'b' is missing.*'abb'"):
        evaluate(program, {"a": array(1, 2, 3)})
    with pytest.raises(PlanError, match="nonsense"):
        evaluate(program, {}, ["nonsense"])


def test_shapes_that_depend_on_values_are_refused() -> None:
    made = builder(a=("float32", (2, 3)))
    with pytest.raises(NotStaticError, match="depends on values"):
        made.push(node("NonZero", ["a"], ["i"]))
    with pytest.raises(NotStaticError):
        made.push(node("NoSuchOperator", ["a"], ["i"]))
    with pytest.raises(NotStaticError):
        made.push(node("MatMul", ["a", "a"], ["i"]))
    four_bits = builder(19, a=("int4", (2, 3)))
    with pytest.raises(NotStaticError):  # Transpose knows int4 since 21
        four_bits.push(node("Transpose", ["a"], ["t"]))
    assert not made.nodes


def test_integer_expressions_of_constants_are_computed_for_shape_inference() -> None:
    made = builder(a=("float32", (2, 6)))
    made.add_constant(np.array([3], np.int64), "three")
    made.push(node("Add", ["three", "three"], ["six"]))
    made.push(node("Concat", ["six", "three"], ["wrong"], axis=0))
    made.push(node("Sub", ["six", "three"], ["again"]))
    made.push(node("Concat", ["again", "again"], ["nine"], axis=0))
    made.add_constant(np.array([-1], np.int64), "rest")
    made.push(node("Concat", ["six", "rest"], ["target"], axis=0))
    made.push(node("Reshape", ["a", "target"], ["r"]))
    assert made.shape("r") == (6, 2)
    assert made.depends["r"] == {"a"}
    program = made.finish({"r": "r"})
    weights = {"a": array(1, 2, 6)}
    np.testing.assert_array_equal(evaluate(program, weights)["r"], weights["a"].reshape(6, 2))


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "int8", "uint8", "int64", "bool", "int4", "uint4"]
)
def test_every_dtype_goes_in_and_comes_out(dtype: str) -> None:
    made = builder(23, a=(dtype, (2, 3)))
    made.push(node("Transpose", ["a"], ["t"], perm=[1, 0]))
    weights = {"a": (np.arange(6).reshape(2, 3) % 2).astype(numpy_dtype(dtype))}
    derived = evaluate(made.finish({"t": "t"}), weights)["t"]
    assert derived.dtype == weights["a"].dtype
    np.testing.assert_array_equal(derived, weights["a"].T)


def test_operators_without_a_kernel_run_in_the_reference_evaluator() -> None:
    """ONNX Runtime has no bfloat16 Neg on the CPU: that node alone is run by the reference."""
    made = builder(a=("float32", (2, 3)))
    made.push(node("Cast", ["a"], ["b"], to=TensorProto.BFLOAT16))
    made.push(node("Neg", ["b"], ["n"]))
    made.push(node("Cast", ["n"], ["f"], to=TensorProto.FLOAT))
    made.push(node("Transpose", ["f"], ["t"]))
    weights = {"a": array(1, 2, 3)}
    expected = -weights["a"].astype(ml_dtypes.bfloat16).astype(np.float32).T
    np.testing.assert_array_equal(evaluate(made.finish({"t": "t"}), weights)["t"], expected)


def test_zero_dimensional_and_empty_values() -> None:
    made = builder(a=("float32", ()), b=("float32", (0, 3)))
    made.push(node("Neg", ["a"], ["n"]))
    made.push(node("Transpose", ["b"], ["t"]))
    derived = evaluate(made.finish({"n": "n", "t": "t"}), {"a": array(1), "b": array(2, 0, 3)})
    assert derived["n"].shape == ()
    assert derived["t"].shape == (3, 0)


def test_run_model_takes_views_that_are_not_contiguous() -> None:
    made = builder(a=("float32", (2, 3)))
    made.push(node("Neg", ["a"], ["n"]))
    program = made.finish({"n": "n"})
    assert program.model is not None
    view = array(1, 3, 2).T
    np.testing.assert_array_equal(run_model(program.model, {"a": view})["n"], -view)


def test_perturbing_one_source_changes_exactly_its_dependents() -> None:
    weights = {"w": array(1, 6, 4, 3, 3), "gain": array(2, 6, 1, 1), "u": array(3, 5, 4), "bias": array(4, 6)}
    weights |= {"scale": array(5, 6), "shift": array(6, 6), "mean": array(7, 6), "variance": np.ones(6, np.float32)}
    proto = model(
        [
            node("Conv", ["x", "w", "bias"], ["c"]),
            node("Mul", ["c", "gain"], ["m"]),
            node("BatchNormalization", ["m", "scale", "shift", "mean", "variance"], ["n"]),
            node("Transpose", ["u"], ["ut"], perm=[1, 0]),
            node("MatMul", ["z", "ut"], ["y2"]),
            node("MatMul", ["z2", "u"], ["y3"]),
        ],
        {"x": [2, 4, 9, 9], "z": [3, 4], "z2": [3, 5]},
        ["n", "y2", "y3"],
        weights,
    )
    compilation = compile_model(proto)
    program = compilation.compiled.program
    before = evaluate(program, compilation.weights)
    for name, values in compilation.weights.items():
        changed = {**compilation.weights, name: np.add(np.multiply(values, np.float32(1.25)), np.float32(0.1))}
        after = evaluate(program, changed)
        differing = {weight for weight in after if not np.array_equal(after[weight], before[weight])}
        assert differing == affected(program, {name})
        partial = evaluate(program, {k: changed[k] for k in required(program, differing)}, differing)
        for weight in differing:
            np.testing.assert_array_equal(partial[weight], after[weight])
