"""Where a test of device refits runs: on PyTorch's CPU device, and again on a GPU under its mark."""

from __future__ import annotations

from typing import Any

import pytest

from onnx_refit.weights.sources import arrays


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    torch = pytest.importorskip("torch")
    where: str = request.param
    if where != "cpu" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return where


@pytest.fixture
def no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(value: object, *, where: str) -> Any:
        raise AssertionError(f"{where} was read by the host")

    monkeypatch.setattr(arrays, "to_array", fail)
