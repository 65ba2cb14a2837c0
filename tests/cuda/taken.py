"""Engines, trainers' tensors, and what an engine holds, as the tests of device refits see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch

import onnx_refit
from onnx_refit.engine.cuda.options import CudaOptions
from onnx_refit.engine.registry import EngineOptions
from onnx_refit.plan.plan import Plan
from onnx_refit.refit.check import Casting, CheckOptions

from .models import mlp
from .test_in_place import scaled
from .test_together import normalised


def planned(model: onnx.ModelProto, checkpoint: Any = None) -> Plan:
    options = onnx_refit.BuildOptions(specialise=False)
    return onnx_refit.build(model, engine="cuda", checkpoint=checkpoint, options=options)


def loaded(plan: Plan, device: str, **options: Any) -> Any:
    return onnx_refit.load(plan, options=EngineOptions(cuda=CudaOptions(devices=(device,), measure=False, **options)))


def there(values: dict[str, Any], device: str, dtype: Any = None) -> dict[str, Any]:
    tensors = {name: torch.from_numpy(np.array(value)).to(device) for name, value in values.items()}
    return tensors if dtype is None else {name: tensor.to(dtype) for name, tensor in tensors.items()}


def bits(engine: Any) -> dict[str, Any]:
    """Every engine weight of the current version, as bytes."""
    held = engine._versions.current.weights
    return {n: held.view(n).contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes() for n in held.places}


def by_host(plan: Plan, device: str, values: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The engine weights that host arrays give."""
    with loaded(plan, device, **options) as engine:
        engine.refit(values, CheckOptions(casting=Casting.ROUND))
        return bits(engine)


def sources(engine: Any) -> dict[str, Any]:
    read = engine.weights()
    return {name: read.read(name) for name in read.specs}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


MODELS: list[Callable[[], onnx.ModelProto]] = [mlp, scaled, normalised]
