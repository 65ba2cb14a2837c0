"""How the registry makes this engine: one device, or a group. Imports PyTorch only once it is known to be there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from onnx_refit.engine.cuda.options import CudaOptions
from onnx_refit.engine.cuda.torchlib import require_torch
from onnx_refit.engine.protocol import Backend
from onnx_refit.errors import EngineError
from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype

if TYPE_CHECKING:
    from onnx_refit.engine.cuda.choice import Choice

_TYPICAL = 32


def create(
    compiled: CompiledModel,
    weights: Mapping[str, Array] | None = None,
    options: CudaOptions = CudaOptions(),  # noqa: B008 (frozen)
    artefact: bytes | None = None,
) -> tuple[Backend, bytes]:
    """A backend for a compiled model on the devices chosen, and the record of how its network runs.

    Args:
        compiled: the portable engine.
        weights: source weights; where there are several ways to run the network, they are timed with them.
        options: what the user chose.
        artefact: the record of an earlier call; used if it was made on such a GPU with such a PyTorch.

    Raises:
        MissingExtraError: PyTorch is not installed.
        EngineError: there is no such device; the message says what is missing.
        UnsupportedModelError: the model holds operators that nothing here can run.
    """
    if not options.devices:
        raise EngineError("no device was chosen", hint="CudaOptions(devices=('cuda:0',))")
    for device in options.devices:
        require_torch(device)
    from onnx_refit.engine.cuda.backend import CudaBackend
    from onnx_refit.engine.cuda.choice import here, unpack
    from onnx_refit.engine.cuda.group import CudaGroup

    choice = unpack(artefact, here(options.devices[0], options)) or choose(compiled, weights, options)
    members = [CudaBackend(compiled, device, options, choice) for device in options.devices]
    return members[0] if len(members) == 1 else CudaGroup(members), choice.pack()


def choose(compiled: CompiledModel, weights: Mapping[str, Array] | None, options: CudaOptions) -> Choice:
    """The fastest way to run a network on the first device, timed where there are several and weights to time with."""
    from onnx_refit.engine.cuda.backend import CudaBackend
    from onnx_refit.engine.cuda.choice import candidates, fastest, time_inference

    device = options.devices[0]
    ways = candidates(compiled, device, options)
    if len(ways) == 1 or weights is None or not options.measure:
        return ways[0]
    inputs = {spec.name: typical_input(spec, options.typical) for spec in compiled.inputs}
    recording = replace(options, graph_after=1)

    def timed(way: Choice) -> float:
        backend = CudaBackend(compiled, device, recording, way)
        try:
            held = backend.derive(weights)
            return time_inference(lambda: backend.run(held, inputs))
        finally:
            backend.close()

    return fastest(ways, timed)


def typical_input(spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
    """Zeros of a plausible shape: valid as token ids, and as fast as any other values."""
    import numpy as np

    shape = [
        dim if isinstance(dim, int) else sizes.get(dim, _TYPICAL) if dim is not None else _TYPICAL
        for dim in spec.shape or ()
    ]
    array: Array = np.zeros(shape, numpy_dtype(spec.dtype))
    return array
