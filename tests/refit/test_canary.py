"""Canaries: what passes, what stops a refit, and what is committed by force only."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import onnx_refit
from onnx_refit.errors import CanaryError
from onnx_refit.refit.canary import run_canary
from onnx_refit.tensors import Array
from tests.refit.transaction_support import X, answers
from tests.support.models import mlp_reference, mlp_weights


def test_a_canary_judges_bfloat16_as_numbers() -> None:
    def outputs(value: float) -> dict[str, Array]:
        return {"y": np.full(4, value, ml_dtypes.bfloat16)}

    near = onnx_refit.Canary({}, {"y": np.full(4, 1.0, np.float32)}, rtol=0.1, atol=0.1)
    assert run_canary(near, lambda _: outputs(1.05)).worst["y"] < 0.1
    with pytest.raises(CanaryError, match="differs"):
        run_canary(near, lambda _: outputs(2.0))
    with pytest.raises(CanaryError, match="NaN"):
        run_canary(near, lambda _: outputs(float("nan")))


def test_a_good_canary_passes_and_is_timed(engine: onnx_refit.Engine) -> None:
    new = mlp_weights(1)
    staged = engine.stage(new)
    result = staged.canary({"x": X}, {"y": mlp_reference(new, X)}, rtol=1e-3, atol=1e-3)
    assert result.worst["y"] < 1e-3
    report = staged.commit()
    assert report.seconds["canary"] > 0


@pytest.mark.parametrize(
    ("canary", "message"),
    [
        (onnx_refit.Canary({"x": X}, {"y": np.zeros((3, 10))}), "differs from what the canary expects"),
        (onnx_refit.Canary({"x": X}, {"y": np.zeros((2, 10))}), "the shape is"),
        (onnx_refit.Canary({"x": X}, {"z": np.zeros((3, 10))}), "does not have"),
        (onnx_refit.Canary({"x": X}, accept=lambda _: False), "judge refused"),
        (onnx_refit.Canary({"x": X}, accept=lambda _: "too sure of itself"), "too sure of itself"),
        (onnx_refit.Canary({"x": X}, accept=lambda outputs: bool(outputs["nothing"].any())), "KeyError"),
        (onnx_refit.Canary({"x": X * np.float32(np.inf)}), "NaN or Inf"),
    ],
)
def test_a_bad_canary_stops_the_refit(engine: onnx_refit.Engine, canary: onnx_refit.Canary, message: str) -> None:
    with pytest.raises(CanaryError, match=message):
        engine.refit(mlp_weights(1), canary=canary)
    assert engine.version == 1
    assert answers(engine, mlp_weights(0))
    engine.refit(mlp_weights(1))
    assert answers(engine, mlp_weights(1))


def test_what_a_canary_refused_is_committed_by_force_only(engine: onnx_refit.Engine) -> None:
    staged = engine.stage(mlp_weights(1))
    with pytest.raises(CanaryError):
        staged.canary({"x": X}, {"y": np.zeros((3, 10))})
    with pytest.raises(CanaryError, match="refused these weights"):
        staged.commit()
    assert engine.version == 1
    assert staged.commit(force=True).version == 2


def test_the_last_canary_decides(engine: onnx_refit.Engine) -> None:
    staged = engine.stage(mlp_weights(1))
    with pytest.raises(CanaryError):
        staged.canary({"x": X}, {"y": np.zeros((3, 10))})
    staged.canary({"x": X}, {"y": mlp_reference(mlp_weights(1), X)}, rtol=1e-3, atol=1e-3)
    assert staged.commit().version == 2
