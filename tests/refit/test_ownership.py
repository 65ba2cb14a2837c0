"""Whose arrays are whose: folded weights, the caller's arrays, weights read back."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

import onnx_refit
from onnx_refit.tensors import Array
from tests.refit.transaction_support import X, answers
from tests.support.models import conv_bn, conv_bn_weights, mlp, mlp_weights


def test_the_callers_arrays_may_change_after_a_refit(engine: onnx_refit.Engine) -> None:
    new = mlp_weights(1)
    engine.refit(new)
    before = engine.run({"x": X})["y"]
    for array in new.values():
        array[...] = 0
    np.testing.assert_array_equal(engine.run({"x": X})["y"], before)
    engine.refit({"b1": mlp_weights(3)["b1"]}, partial=True)
    assert answers(engine, {**mlp_weights(1), "b1": mlp_weights(3)["b1"]})


def test_folded_weights_refit_partially_and_roll_back() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 9, 9)).astype(np.float32)

    def expected(weights: dict[str, Array]) -> Array:
        session = ort.InferenceSession(conv_bn(weights).SerializeToString(), providers=["CPUExecutionProvider"])
        result: Array = session.run(None, {"x": x})[0]
        return result

    with onnx_refit.load(onnx_refit.build(conv_bn())) as engine:
        weights = conv_bn_weights(0)
        for seed, name in enumerate(["scale", "w", "mean", "var", "bias"], start=1):
            weights[name] = conv_bn_weights(seed)[name]
            given = weights[name].copy()
            engine.refit({name: given}, partial=True)
            given[...] = np.nan  # the engine must not look at the caller's array again
            np.testing.assert_allclose(engine.run({"x": x})["y"], expected(weights), rtol=1e-4, atol=1e-5)
            for other, array in weights.items():
                np.testing.assert_array_equal(engine.weights().read(other), array)
        engine.rollback()
        weights["bias"] = conv_bn_weights(0)["bias"]
        np.testing.assert_allclose(engine.run({"x": x})["y"], expected(weights), rtol=1e-4, atol=1e-5)


def test_the_arrays_given_at_load_may_change_afterwards() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 9, 9)).astype(np.float32)
    given, weights = conv_bn_weights(1), conv_bn_weights(1)
    with onnx_refit.load(onnx_refit.build(conv_bn()), weights=given) as engine:
        fingerprint = engine.fingerprint()
        for array in given.values():
            array[...] = 9
        assert engine.fingerprint() == fingerprint
        weights["scale"] = conv_bn_weights(2)["scale"]
        engine.refit({"scale": weights["scale"]}, partial=True)
        session = ort.InferenceSession(conv_bn(weights).SerializeToString(), providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(engine.run({"x": x})["y"], session.run(None, {"x": x})[0], rtol=1e-4, atol=1e-5)


def test_weights_read_back_cannot_be_used_to_change_the_engine() -> None:
    with onnx_refit.load(onnx_refit.build(conv_bn())) as engine:
        for name in engine.refittable:
            array = engine.weights().read(name)
            edited = array.copy()
            if array.flags.writeable:
                array[...] = 7  # a copy: the engine must not see it
                np.testing.assert_array_equal(engine.weights().read(name), edited)
            edited.reshape(-1)[-1] += 1.0
            assert engine.refit({name: edited}, partial=True).changed == (name,)


def test_a_plan_keeps_its_weights_when_the_callers_arrays_change() -> None:
    given = mlp_weights(3)
    plan = onnx_refit.refit_plan(onnx_refit.build(mlp()), given)
    given["w1"][...] = 0
    assert plan.weights is not None
    np.testing.assert_array_equal(plan.weights["w1"], mlp_weights(3)["w1"])
