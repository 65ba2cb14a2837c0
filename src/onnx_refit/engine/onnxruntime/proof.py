"""Whether sessions whose packed weights are written in place answer like sessions that pack the same weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from onnx_refit.engine.onnxruntime.hosts import HostPool
from onnx_refit.engine.onnxruntime.native import PROVIDERS, session_options
from onnx_refit.engine.onnxruntime.packed import Packed, initialised, probe
from onnx_refit.errors import EngineError
from onnx_refit.plan.trace.recipes import fill
from onnx_refit.tensors import Array


def proved(model: onnx.ModelProto, packed: Packed) -> bool:
    """Whether they answer random inputs to the bit alike, with random weights: each kernel of the graph by itself.

    Args:
        model: the graph; its weights are graph inputs.
        packed: what is believed of its kernels.
    """
    nodes = probe(model, packed.specs)
    rng = np.random.Generator(np.random.SFC64())
    weights = {spec.name: rng.random(spec.static_shape, np.float32) - np.float32(0.5) for spec in packed.specs}
    inputs = {
        value.name: rng.standard_normal([d.dim_value for d in value.type.tensor_type.shape.dim], np.float32)
        for value in nodes.graph.input
        if value.name not in weights
    }
    try:
        with ThreadPoolExecutor(1, "onnx-refit-proof") as other:
            packing = other.submit(_packed_by_itself, nodes, packed, weights, inputs)
            written = _written(nodes, packed, weights, inputs)
            return all(a.tobytes() == b.tobytes() for a, b in zip(written, packing.result(), strict=True))
    except (EngineError, OSError):
        return False


def _packed_by_itself(
    nodes: onnx.ModelProto, packed: Packed, weights: Mapping[str, Array], inputs: Mapping[str, Array]
) -> list[Array]:
    """The answers of a session that packs the weights."""
    with tempfile.TemporaryDirectory(prefix="onnx-refit-") as folder:
        path = Path(folder) / "plain.onnx"
        initialised(nodes, ((spec, weights[spec.name]) for spec in packed.specs), path)
        session = ort.InferenceSession(str(path), session_options(1), providers=PROVIDERS)
        answers: list[Array] = session.run(None, dict(inputs))
        return answers


def _written(
    nodes: onnx.ModelProto, packed: Packed, weights: Mapping[str, Array], inputs: Mapping[str, Array]
) -> list[Array]:
    """The answers of a session that packed other weights, and into which these are written; NoHostError, OSError."""
    pool = HostPool(nodes, Packed(packed.specs, packed.blocks, ()), 1)
    try:
        host = pool.make()
        for block in packed.blocks:
            flat = weights[block.weight].reshape(-1)
            target = host.storages[block.name].flat
            target[:] = 0
            fill(block.recipe, {block.weight: flat}.__getitem__, target)
        answers: list[Array] = host.session.run(None, dict(inputs))
        return answers
    finally:
        pool.close()
