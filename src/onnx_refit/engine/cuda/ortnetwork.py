"""The network through ONNX Runtime's CUDA provider, weights as inputs: for operators that the lowering lacks.

It has the interface of ``lowering.program.Lowered``, so requests, weights and refits are the same. Outputs go through
the host (ONNX Runtime's Python package shares device outputs with no other library), and ONNX Runtime is waited for.
On the CPU device it runs ONNX Runtime's CPU provider, which is how it is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from onnx_refit.engine.cuda.lowering.operators import TORCH_DTYPES, Tensor
from onnx_refit.errors import EngineError, UnsupportedModelError
from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.tensors import numpy_dtype

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def provider_of(device: str) -> str:
    """ONNX Runtime's provider for a device of PyTorch."""
    return "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"


def available(device: str) -> bool:
    """Whether the installed ONNX Runtime can run there."""
    import onnxruntime as ort

    return provider_of(device) in ort.get_available_providers()


class OrtNetwork:
    """An activation graph in an ONNX Runtime session.

    Args:
        compiled: the plan's portable part.
        device: where it runs.
        tf32: let products round their operands to TF32.

    Raises:
        UnsupportedModelError: ONNX Runtime has no CUDA provider here, or refuses the model.
    """

    real = torch.float32
    graphable = False
    together: tuple[tuple[str, ...], ...] = ()
    waits_at = ("ONNX Runtime, which is not recorded",)

    def __init__(self, compiled: CompiledModel, device: str, *, tf32: bool = False) -> None:
        import onnxruntime as ort

        self.device = torch.device(device)
        self.inputs = tuple(value.name for value in compiled.activation.graph.input)
        self.outputs = tuple(value.name for value in compiled.activation.graph.output)
        if not available(device):
            raise UnsupportedModelError("the installed onnxruntime has no CUDA", hint="Install onnxruntime-gpu")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        settings: dict[str, str] = {}
        if self.device.type == "cuda":
            settings = {"device_id": str(self.device.index or 0), "use_tf32": str(int(tf32))}
        try:
            self._session: Any = ort.InferenceSession(
                compiled.activation.SerializeToString(), options, providers=[(provider_of(device), settings)]
            )
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise UnsupportedModelError(f"ONNX Runtime refused the model: {error}") from error

    def run(self, values: Mapping[str, Tensor], moved: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Run the graph; see ``Lowered.run``. EngineError with ONNX Runtime's words where it fails."""
        binding = self._session.io_binding()
        held = []
        for name in self.inputs:
            tensor = values[name].contiguous()
            held.append(tensor)
            dtype = numpy_dtype(_NAMES[tensor.dtype])
            place = self.device.type, self.device.index or 0
            binding.bind_input(name, *place, dtype, tuple(tensor.shape), tensor.data_ptr())
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime has a stream of its own
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise EngineError(f"ONNX Runtime failed: {error}") from error
        arrays = binding.copy_outputs_to_cpu()
        del held
        return {
            name: torch.from_numpy(np.array(array)).to(self.device)
            for name, array in zip(self.outputs, arrays, strict=True)
        }
