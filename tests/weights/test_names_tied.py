"""Tensors that an exporter merged, and tensors that are tied."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_refit.weights.open import open_weights
from onnx_refit.weights.provenance.expression import Stored
from onnx_refit.weights.unmerge import unmerge
from tests.weights.names_support import A, B, C, find, outcome, r


def merged_model() -> onnx.ModelProto:
    zero = numpy_helper.from_array(np.zeros(4, np.float32), "zero")
    nodes = [
        helper.make_node("Identity", ["zero"], ["b.bias"]),
        helper.make_node("Add", ["x", "zero"], ["y"], name="first"),
        helper.make_node("Add", ["y", "b.bias"], ["z"], name="second"),
        helper.make_node("Add", ["z", "zero"], ["out"], name="third"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, [4])], [value("out", TensorProto.FLOAT, [4])], [zero]
    )
    return helper.make_model(graph)


def test_merged_tensors_are_split_where_something_says_they_were_several() -> None:
    model = merged_model()
    before = model.SerializeToString()
    zeros = {name: np.zeros(4, np.float32) for name in ("a.bias", "b.bias", "c.bias")}
    split, splits = unmerge(model, open_weights(zeros))
    assert model.SerializeToString() == before
    assert [n.op_type for n in split.graph.node] == ["Add"] * 3
    assert len({n.input[1] for n in split.graph.node}) == 3
    assert {t.name for t in split.graph.initializer} == {"zero", "b.bias", "zero.2"}
    assert [s.copies for s in splits] == [("b.bias",), ("zero.2",)]
    onnx.checker.check_model(split)


def test_tensors_that_are_tied_for_good_stay_shared() -> None:
    model = merged_model()
    del model.graph.node[0]
    model.graph.node[1].input[1] = "zero"
    zero = np.zeros(4, np.float32)
    assert unmerge(model, open_weights({"a": zero})) == (model, ())
    assert unmerge(model, open_weights({"a": zero, "b": zero})) == (model, ())  # one storage under two names
    assert unmerge(model) == (model, ())
    assert len(unmerge(model, open_weights({"a": zero, "b": zero.copy()}))[1]) == 1


@pytest.mark.parametrize("count", [20, 150])
def test_a_bias_follows_its_weight_where_nothing_else_tells(count: int) -> None:
    checkpoint: dict[str, Any] = {f"m.{i}.weight": r(6, 4) for i in range(count)}
    checkpoint |= {f"m.{i}.bias": np.zeros(6, np.float32) for i in range(count)}
    weights: dict[str, Any] = {}
    for i in range(count):
        weights[f"mm_{i + 1000}"] = checkpoint[f"m.{i}.weight"].T.copy()
        weights[f"{i + 5000}"] = checkpoint[f"m.{i}.bias"]
    found = find(weights, checkpoint)
    assert all(found.names.entries[f"{i + 5000}"] == Stored(f"m.{i}.bias") for i in range(count))


@pytest.mark.parametrize("kept", ["wte.weight", "lm_head.weight"])
def test_tied_tensors_that_were_saved_twice_may_be_saved_once(kept: str) -> None:
    weights = {"embedding": A, "head": A.T.copy()}
    names = find(weights, {"wte.weight": A, "lm_head.weight": A.copy()}).names
    report, arrays = outcome(names, weights, {kept: B})
    assert report.ok
    assert report.unused == ()
    np.testing.assert_array_equal(arrays["embedding"], B)
    np.testing.assert_array_equal(arrays["head"], B.T)
    report, arrays = outcome(names, weights, {"wte.weight": B, "lm_head.weight": C})
    assert report.ok
    np.testing.assert_array_equal(arrays["embedding"], B)
    np.testing.assert_array_equal(arrays["head"], C.T)


def test_layers_that_were_made_by_copying_are_not_tied() -> None:
    weights = {"a": A, "b": A.copy()}
    names = find(weights, {"layers.0.weight": A, "layers.1.weight": A.copy()}).names
    report, _ = outcome(names, weights, {"layers.0.weight": B})
    assert [m.name for m in report.missing] == ["b"]


def test_tied_tensors_that_no_longer_are_one_need_two_weights() -> None:
    names = find({"embedding": A}, {"wte.weight": A, "lm_head.weight": A}).names
    report, _ = outcome(names, {"embedding": A}, {"wte.weight": B, "lm_head.weight": B.copy()})
    assert report.ok
    report, _ = outcome(names, {"embedding": A}, {"wte.weight": B, "lm_head.weight": C})
    assert "one weight for both, but now they differ" in report.rejected[0].text
    # Equal by accident, or by copying: the model never had the other.
    names = find({"embedding": A}, {"online.weight": A, "target.weight": A.copy()}).names
    report, _ = outcome(names, {"embedding": A}, {"online.weight": B, "target.weight": C})
    assert report.ok
