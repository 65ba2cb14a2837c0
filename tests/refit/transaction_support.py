"""The input of a small model, and whether an engine answers as it should."""

from __future__ import annotations

import numpy as np

import onnx_refit
from onnx_refit.tensors import Array
from tests.support.models import mlp_input, mlp_reference

X = mlp_input()


def answers(engine: onnx_refit.Engine, weights: dict[str, Array]) -> bool:
    return bool(np.allclose(engine.run({"x": X})["y"], mlp_reference(weights, X), rtol=1e-4, atol=1e-4))
