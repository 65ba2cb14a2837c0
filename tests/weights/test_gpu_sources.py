"""Tensors on a GPU become weights: from PyTorch, and from any library through DLPack."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnx_refit.weights.open import open_weights

pytestmark = pytest.mark.gpu


def test_tensors_on_a_gpu() -> None:
    torch: Any = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    values = np.linspace(-2, 2, 12).astype(np.float32).reshape(3, 4)
    on_gpu = torch.from_numpy(values).cuda()
    arrays: dict[str, Any] = {"plain": on_gpu, "turned": on_gpu.t(), "half": on_gpu.to(torch.bfloat16)}
    source = open_weights(arrays)
    assert source.specs["turned"].shape == (4, 3)
    np.testing.assert_array_equal(source.read("plain"), values)
    np.testing.assert_array_equal(source.read("turned"), values.T)
    assert source.read("half").dtype == ml_dtypes.bfloat16


def test_dlpack_from_a_gpu() -> None:
    cupy: Any = pytest.importorskip("cupy")
    pytest.importorskip("torch")
    source = open_weights({"w": cupy.arange(6, dtype=cupy.float32).reshape(2, 3)})
    np.testing.assert_array_equal(source.read("w"), np.arange(6, dtype=np.float32).reshape(2, 3))
