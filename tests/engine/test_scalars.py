"""Inputs of rank 0 stay of rank 0, however weights are bound."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_refit


@pytest.mark.parametrize("layers", [2, 40])  # few weights are fed with each request, many are bound once
def test_an_input_of_rank_0(layers: int) -> None:
    rng = np.random.default_rng(0)
    weights = {f"w{k}": rng.standard_normal(3).astype(np.float32) for k in range(layers)}
    nodes = [helper.make_node("Identity", ["x"], ["v0"])]
    for k in range(layers):
        nodes.append(helper.make_node("Add", [f"v{k}", f"w{k}"], [f"s{k}"]))
        nodes.append(helper.make_node("Tanh", [f"s{k}"], [f"v{k + 1}"]))
    nodes.append(helper.make_node("Neg", ["x"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [])],
        [
            helper.make_tensor_value_info(f"v{layers}", TensorProto.FLOAT, [3]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, []),
        ],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    x = np.array(1.5, np.float32)
    expected = x
    for k in range(layers):
        expected = np.tanh(expected + weights[f"w{k}"])
    with onnx_refit.load(onnx_refit.build(model)) as engine:
        assert len(engine.refittable) == layers
        outputs = engine.run({"x": x})
        np.testing.assert_allclose(outputs[f"v{layers}"], expected, rtol=1e-5)
        assert outputs["y"].shape == ()
        assert outputs["y"] == -1.5
