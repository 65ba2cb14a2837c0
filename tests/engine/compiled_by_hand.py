"""Compiled models made without the compiler, so that the engine's tests fail for the engine's faults only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime as ort

from onnx_refit.plan.compiled import CompiledModel, RefitProgram, SourceWeight
from onnx_refit.tensors import Array, spec_of, spec_of_value_info, value_info_of


def compiled_from(model: onnx.ModelProto, names: Sequence[str] | None = None) -> tuple[CompiledModel, dict[str, Array]]:
    """Every floating-point initializer (or the named ones) as an engine weight that is its own source."""
    activation = onnx.ModelProto()
    activation.CopyFrom(model)
    graph = activation.graph
    inputs = tuple(spec_of_value_info(value) for value in graph.input)
    weights: dict[str, Array] = {}
    for tensor in list(graph.initializer):
        array = onnx.numpy_helper.to_array(tensor)
        if tensor.name in names if names is not None else array.dtype.kind == "f" and array.size > 1:
            weights[tensor.name] = array
            graph.initializer.remove(tensor)
    specs = tuple(spec_of(name, array) for name, array in weights.items())
    graph.input.extend(value_info_of(spec) for spec in specs)
    return CompiledModel(
        activation=activation,
        program=RefitProgram(None, {s.name: s.name for s in specs}, {s.name: frozenset({s.name}) for s in specs}),
        sources=tuple(SourceWeight(spec, ()) for spec in specs),
        engine_weights=specs,
        inputs=inputs,
        outputs=tuple(spec_of_value_info(value) for value in graph.output),
    ), weights


def with_weights(model: onnx.ModelProto, weights: dict[str, Array]) -> onnx.ModelProto:
    """The model with other values for these initializers."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights[tensor.name], tensor.name))
    return changed


def baked(model: onnx.ModelProto, threads: int = 1) -> ort.InferenceSession:
    """What people do today: a session with everything folded in."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def random_like(weights: dict[str, Array], seed: int) -> dict[str, Array]:
    """Other weights of the same shapes, of a size that keeps activations in range."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(a.shape) / np.sqrt(max(1, a[0].size if a.ndim > 1 else 10))).astype(a.dtype)
        for name, a in weights.items()
    }


def relative_error(got: Array, wanted: Array) -> float:
    """Largest difference over the largest magnitude."""
    a, b = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return float(np.abs(a - b).max() / (np.abs(b).max() + 1e-30)) if a.size else 0.0
