"""The tracer with optimisers of our own making, whose doings we know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnx_refit.plan.compiled import Verdict
from onnx_refit.plan.trace.recipes import evaluate
from onnx_refit.plan.trace.trace import Traced, Tracer
from onnx_refit.tensors import TensorSpec, numpy_dtype, onnx_dtype

SHAPE = (6, 20)
Change = Callable[[Any], Any]


def graph(dtype: str) -> onnx.ModelProto:
    kind = onnx_dtype(dtype)
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", kind, ["M", 6]), helper.make_tensor_value_info("w", kind, SHAPE)],
        [helper.make_tensor_value_info("y", kind, ["M", 20])],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def optimiser(change: Change, name: str = "Change") -> Callable[[Path, Path, Sequence[str]], None]:
    def optimise(source: Path, target: Path, disabled: Sequence[str]) -> None:
        model = onnx.load(str(source))
        if name not in disabled:
            tensor = model.graph.initializer[0]
            array = np.ascontiguousarray(change(onnx.numpy_helper.to_array(tensor)))
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, f"made_up_{np.random.default_rng().integers(1 << 30)}"))
            model.graph.node[0].input[1] = tensor.name
        onnx.save(model, str(target))

    return optimise


def traced(change: Change, dtype: str = "float32", candidates: Sequence[Sequence[str]] = ()) -> Traced:
    spec = TensorSpec("w", dtype, SHAPE)
    return Tracer(graph(dtype), [spec], optimiser(change)).trace(candidates)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize(
    "change",
    [
        lambda w: w,
        np.transpose,
        lambda w: np.pad(w, ((0, 2), (0, 12))),
        lambda w: w[:, ::-1],
        lambda w: np.concatenate([w[:, 10:], w[:, :10]], axis=1),
    ],
)
def test_rearrangements_are_explained(change: Change, dtype: str) -> None:
    result = traced(change, dtype)
    assert not result.decisions
    (recipe,) = result.recipes.values()
    assert recipe.spec.name == result.model.graph.input[-1].name
    w = np.random.default_rng(0).standard_normal(SHAPE).astype(numpy_dtype(dtype))
    made = evaluate(recipe, {"w": w.reshape(-1)}.__getitem__)
    assert (made.astype(np.float64) == change(w).astype(np.float64)).all()
    assert not [tensor for tensor in result.model.graph.initializer if tensor.dims]


def test_a_cast_is_explained() -> None:
    result = traced(lambda w: w.astype(np.float32), "float16")
    (recipe,) = result.recipes.values()
    w = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float16)
    made = evaluate(recipe, {"w": w.reshape(-1)}.__getitem__)
    assert made.dtype == np.float32
    assert (made == w.astype(np.float32)).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w * np.float32(2),
        lambda w: np.where(w > w.mean(), w, np.float32(0)),
        lambda w: np.sort(w.reshape(-1)).reshape(w.shape),
        lambda w: w + w[:1],
    ],
)
def test_arithmetic_on_values_is_not_explained_and_the_optimisation_left_out(change: Change) -> None:
    result = traced(change, candidates=[["Innocent"], ["Change", "Other"]])
    assert [(d.subject, d.verdict) for d in result.decisions] == [("Change", Verdict.REJECTED)]
    assert list(result.recipes) == ["w"]


def test_without_a_culprit_the_graph_stays_as_it_was() -> None:
    result = traced(lambda w: w * np.float32(2), candidates=[["Innocent"]])
    assert [d.verdict for d in result.decisions] == [Verdict.REJECTED]
    assert result.model.graph.node[0].input[1] == "w"
    assert [value.name for value in result.model.graph.input] == ["x", "w"]


def test_an_optimiser_that_changes_nodes_by_value_is_found_out() -> None:
    def optimise(source: Path, target: Path, disabled: Sequence[str]) -> None:
        model = onnx.load(str(source))
        values = onnx.numpy_helper.to_array(model.graph.initializer[0])
        if "Change" not in disabled and (values < 0).any():
            model.graph.node[0].op_type = "Gemm"
        onnx.save(model, str(target))

    result = Tracer(graph("float32"), [TensorSpec("w", "float32", SHAPE)], optimise).trace([["Change"]])
    assert [d.subject for d in result.decisions] == ["Change"]
    assert result.model.graph.node[0].op_type == "MatMul"


def test_a_weight_that_becomes_a_graph_output_is_copied_there() -> None:
    model = graph("float32")
    model.graph.node.append(helper.make_node("Identity", ["w"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, SHAPE))

    def optimise(source: Path, target: Path, disabled: Sequence[str]) -> None:
        loaded = onnx.load(str(source))
        tensor = onnx.TensorProto()
        tensor.CopyFrom(loaded.graph.initializer[0])
        tensor.name = "z"
        loaded.graph.initializer.append(tensor)
        del loaded.graph.node[1:]
        onnx.save(loaded, str(target))

    result = Tracer(model, [TensorSpec("w", "float32", SHAPE)], optimise).trace()
    onnx.checker.check_model(result.model)
    assert "z" not in result.recipes
    assert len(result.recipes) == 2
