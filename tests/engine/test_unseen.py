"""Operators that read only weights and yet stay in the graph: what they give hangs on coincidences of values."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

import onnx_refit
from onnx_refit.plan.compiled import Verdict
from onnx_refit.tensors import Array

node = helper.make_node
CASES = {
    "Unique": [node("Unique", ["w"], ["z"], sorted=0)],
    "NonZero": [node("NonZero", ["w"], ["i"]), node("Cast", ["i"], ["z"], to=TensorProto.FLOAT)],
    "Compress": [
        node("Greater", ["w", "half"], ["b"]),
        node("Reshape", ["b", "flat"], ["c"]),
        node("Compress", ["w", "c"], ["z"]),
    ],
}
WEIGHTS = [
    np.array([[1, 1, 0], [0, 2, 1]], np.float32),
    np.array([[3, 2, 2], [0, 0, 0]], np.float32),
    np.array([[0.25, 4, 5], [6, 7, 8]], np.float32),
]


def weighed(nodes: list[NodeProto], w: Array) -> onnx_refit.Plan:
    """y = x @ w, and z."""
    rest = [node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(
        [*nodes, *rest],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "yz"],
        [
            numpy_helper.from_array(w, "w"),
            numpy_helper.from_array(np.array(0.5, np.float32), "half"),
            numpy_helper.from_array(np.array([-1], np.int64), "flat"),
        ],
    )
    return onnx_refit.build(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


def expected(name: str, w: Array) -> Array:
    if name == "Unique":  # in the order in which they first come
        return np.array(list(dict.fromkeys(w.reshape(-1).tolist())), np.float32)
    return np.array(np.nonzero(w), np.float32) if name == "NonZero" else w[w > 0.5]


@pytest.mark.parametrize("name", CASES)
def test_what_depends_on_equal_or_zero_elements_is_computed_at_every_inference(name: str) -> None:
    x = np.array([[1, 2], [3, 4], [0, 1]], np.float32)
    plan = weighed(CASES[name], WEIGHTS[0])
    with onnx_refit.load(plan) as engine:
        for w in WEIGHTS:
            engine.refit({"w": w})
            outputs = engine.run({"x": x})
            np.testing.assert_allclose(outputs["y"], x @ w, rtol=1e-6)
            assert np.array_equal(outputs["z"], expected(name, w))
        shown = [d for d in engine.decisions if d.action == "let the optimiser see it"]
        assert shown
        assert {d.verdict for d in shown} == {Verdict.REJECTED}
