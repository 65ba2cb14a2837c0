"""A model as the protocol describes it."""

from __future__ import annotations

from typing import Any

from onnx_refit.errors import InputError, VersionError
from onnx_refit.refit.live import Engine
from onnx_refit.serve.datatypes import datatype_of
from onnx_refit.tensors import TensorSpec

PLATFORM = "onnx-refit"


def metadata(name: str, engine: Engine, version: int | None = None) -> dict[str, Any]:
    """The protocol's model metadata; VersionError for a version that is not held."""
    held = [info.number for info in engine.versions if info.held]
    if version is not None and version not in held:
        raise VersionError(f"version {version} is not held; held are {', '.join(map(str, held))}")
    return {
        "name": name,
        "versions": [str(number) for number in held],
        "platform": f"{PLATFORM}_{engine.plan.engine}",
        "inputs": [_described(spec) for spec in _original_inputs(engine)],
        "outputs": [_described(spec) for spec in engine.outputs],
    }


def config(name: str, engine: Engine) -> dict[str, Any]:
    """Triton's model configuration, as far as its clients and load generators read it."""
    return {
        "name": name,
        "platform": f"{PLATFORM}_{engine.plan.engine}",
        "backend": PLATFORM,
        # Shapes are given whole, with their first dimension, as metadata gives them.
        "max_batch_size": 0,
        "input": [_configured(spec) for spec in _original_inputs(engine)],
        "output": [_configured(spec) for spec in engine.outputs],
    }


def _original_inputs(engine: Engine) -> list[TensorSpec]:
    """The inputs under the names and types the user's model had: strings where a vocabulary was taken out."""
    strings = {vocabulary.output: vocabulary.input for vocabulary in engine.plan.preprocessors}
    return [
        TensorSpec(strings[spec.name], "string", spec.shape) if spec.name in strings else spec for spec in engine.inputs
    ]


def _shape(spec: TensorSpec) -> list[int]:
    if spec.shape is None:
        raise InputError(f"the rank of {spec.name!r} is not known")
    return [dimension if isinstance(dimension, int) else -1 for dimension in spec.shape]


def _described(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": datatype_of(spec.dtype), "shape": _shape(spec)}


def _configured(spec: TensorSpec) -> dict[str, Any]:
    datatype = datatype_of(spec.dtype)
    name = "STRING" if datatype == "BYTES" else datatype
    return {"name": spec.name, "data_type": f"TYPE_{name}", "dims": _shape(spec)}
