from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnx_refit.engine.onnxruntime.backend import OnnxRuntimeBackend, create
from onnx_refit.engine.onnxruntime.options import OnnxRuntimeOptions
from onnx_refit.errors import EngineError
from onnx_refit.tensors import Array

from .compiled_by_hand import baked, compiled_from, random_like, relative_error, with_weights


def mlp() -> onnx.ModelProto:
    """x[N,32] -> 64 -> 20, MatMul + Add + Relu."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"]),
        helper.make_node("Add", ["a", "b0"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "w1"], ["d"]),
        helper.make_node("Add", ["d", "b1"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 20])],
        [weight("w0", 32, 64), weight("b0", 64), weight("w1", 64, 20), weight("b1", 20)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


X = {"x": np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)}


def backend_of(model: onnx.ModelProto) -> tuple[OnnxRuntimeBackend, dict[str, Array]]:
    compiled, weights = compiled_from(model)
    return create(compiled, weights, OnnxRuntimeOptions(threads=1)), weights


def wanted(model: onnx.ModelProto, weights: dict[str, Array]) -> Array:
    result: Array = baked(with_weights(model, weights)).run(None, X)[0]
    return result


def test_outputs_equal_a_baked_session_before_and_after_a_refit() -> None:
    model = mlp()
    backend, weights = backend_of(model)
    first = backend.derive(weights)
    other = random_like(weights, 5)
    second = backend.derive(other, first)
    assert relative_error(backend.run(second, X)["y"], wanted(model, other)) < 1e-5
    assert relative_error(backend.run(first, X)["y"], wanted(model, weights)) < 1e-5


def test_a_partial_refit_shares_what_did_not_change() -> None:
    model = mlp()
    backend, weights = backend_of(model)
    first = backend.derive(weights)
    other = {**weights, "b1": weights["b1"] + 1}
    changed = frozenset({"b1"})
    second = backend.derive({name: other[name] for name in backend.required(changed)}, first, changed)
    assert relative_error(backend.run(second, X)["y"], wanted(model, other)) < 1e-5
    assert 0 < second.nbytes - second.shared_nbytes < 256
    assert first.shared_nbytes == 0


def test_a_weight_set_survives_the_source_arrays_and_later_refits() -> None:
    model = mlp()
    backend, weights = backend_of(model)
    mine = {name: array.copy() for name, array in weights.items()}
    first = backend.derive(mine)
    before = backend.run(first, X)["y"].copy()
    for array in mine.values():
        array[...] = 7
    for seed in range(20):
        backend.derive(random_like(weights, seed), first)
    assert np.array_equal(backend.run(first, X)["y"], before)


def test_the_memory_of_a_dead_set_is_used_again_and_that_of_a_living_one_is_not() -> None:
    backend, weights = backend_of(mlp())
    first = backend.derive(weights)
    second = backend.derive(weights, first)
    place = {name: buffer.array.ctypes.data for name, buffer in second.buffers.items()}
    del second
    third = backend.derive(weights, first)
    assert {name: buffer.array.ctypes.data for name, buffer in third.buffers.items()} == place
    assert not {b.array.ctypes.data for b in first.buffers.values()} & set(place.values())


def test_recoverable_weights_come_back_bit_for_bit() -> None:
    backend, weights = backend_of(mlp())
    made = backend.derive(weights)
    assert backend.recoverable == set(weights)
    for name in backend.recoverable:
        got = backend.recover(made, name)
        assert got.dtype == weights[name].dtype
        assert np.array_equal(got, weights[name])
    with pytest.raises(EngineError):
        backend.recover(made, "no such weight")


def test_a_subset_of_outputs_and_a_closed_engine() -> None:
    backend, weights = backend_of(mlp())
    made = backend.derive(weights)
    assert list(backend.run(made, X, ["y"])) == ["y"]
    backend.close()
    with pytest.raises(EngineError, match="closed"):
        backend.run(made, X)
