"""How the registry makes this engine: one device, or a group. Imports PyTorch only once it is known to be there."""

from __future__ import annotations

from onnx_refit.engine.cuda.options import CudaOptions
from onnx_refit.engine.cuda.torchlib import require_torch
from onnx_refit.engine.protocol import Backend
from onnx_refit.errors import EngineError
from onnx_refit.plan.compiled import CompiledModel


def create(compiled: CompiledModel, options: CudaOptions = CudaOptions()) -> Backend:  # noqa: B008 (frozen)
    """A backend for a compiled model on the devices chosen.

    Raises:
        MissingExtraError: PyTorch is not installed.
        EngineError: there is no such device; the message says what is missing.
        UnsupportedModelError: the model holds operators without a lowering.
    """
    if not options.devices:
        raise EngineError("no device was chosen", hint="CudaOptions(devices=('cuda:0',))")
    for device in options.devices:
        require_torch(device)
    from onnx_refit.engine.cuda.backend import CudaBackend
    from onnx_refit.engine.cuda.group import CudaGroup

    members = [CudaBackend(compiled, device, options) for device in options.devices]
    return members[0] if len(members) == 1 else CudaGroup(members)
