"""Engines of a small model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import onnx_refit
from tests.support.models import mlp


@pytest.fixture(scope="module")
def plan() -> onnx_refit.Plan:
    return onnx_refit.build(mlp())


@pytest.fixture
def engine(plan: onnx_refit.Plan) -> Iterator[onnx_refit.Engine]:
    with onnx_refit.load(plan, keep=3) as loaded:
        yield loaded
