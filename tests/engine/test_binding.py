"""Requests through a binding: each has outputs of its own, whatever came before."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

from onnx_refit.engine.onnxruntime.native import Binding, make_session, session_options, wrap


def binding(kind: int = TensorProto.FLOAT, weight: np.ndarray | None = None) -> Binding:
    """Two outputs, x + w and -x, of any number of rows."""
    nodes = [helper.make_node("Add", ["x", "w"], ["y"]), helper.make_node("Neg", ["x"], ["z"])]
    if kind != TensorProto.FLOAT:
        nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Identity", ["w"], ["z"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, ["N", 3]), helper.make_tensor_value_info("w", kind, [3])],
        [helper.make_tensor_value_info("y", kind, None), helper.make_tensor_value_info("z", kind, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    made = WEIGHT if weight is None else weight
    return Binding(make_session(model, session_options(1)), {"w": wrap(made)}, ["y", "z"])


WEIGHT = np.array([1, 2, 3], np.float32)


def test_outputs_have_the_shape_of_their_own_request_and_stay_as_they_are() -> None:
    bound = binding()
    kept: list[tuple[np.ndarray, list[np.ndarray]]] = []
    for rows in (2, 5, 1, 5, 5):
        x = np.random.default_rng(len(kept)).standard_normal((rows, 3), np.float32)
        kept.append((x, bound.run((("x", x),))))
    for x, (y, z) in kept:
        np.testing.assert_array_equal(y, x + WEIGHT)
        np.testing.assert_array_equal(z, -x)


def test_the_request_after_one_that_failed_is_answered() -> None:
    bound = binding()
    x = np.ones((2, 3), np.float32)
    bound.run((("x", x),))
    with pytest.raises(Exception, match=r"(?i)invalid|dimension"):
        bound.run((("x", np.ones((2, 4), np.float32)),))
    np.testing.assert_array_equal(bound.run((("x", 2 * x),))[0], 2 * x + WEIGHT)


def test_a_view_is_read_as_it_is() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    assert not x.flags.c_contiguous
    np.testing.assert_array_equal(binding().run((("x", x),))[1], -x)


def test_types_that_numpy_does_not_have() -> None:
    weight = WEIGHT.astype(ml_dtypes.bfloat16)
    x = np.full((2, 3), 1.5, ml_dtypes.bfloat16)
    y, z = binding(TensorProto.BFLOAT16, weight).run((("x", x),))
    assert y.dtype == z.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(y.astype(np.float32), x.astype(np.float32))
    np.testing.assert_array_equal(z.astype(np.float32), WEIGHT)
