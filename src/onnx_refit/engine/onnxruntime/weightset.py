"""A weight set of the ONNX Runtime engine: buffers, and bindings of them to a session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort

from onnx_refit.engine.onnxruntime.buffers import Buffer
from onnx_refit.engine.onnxruntime.native import Binding
from onnx_refit.engine.protocol import FullSpeed
from onnx_refit.errors import EngineError
from onnx_refit.tensors import Array


class AtFullSpeed:
    """The ``FullSpeed`` of a weight set that has only one tier."""

    def wait(self, timeout: float | None = None) -> bool:
        """True, at once."""
        return True

    def done(self) -> bool:
        """True."""
        return True


class OnnxRuntimeWeightSet:
    """One immutable set of engine weights, with what runs it. Thread-safe.

    A binding serves one request at a time, so the set keeps a stack of idle ones: as many as requests were ever in
    flight together.
    """

    def __init__(
        self,
        buffers: Mapping[str, Buffer],
        shared_nbytes: int,
        session: ort.InferenceSession,
        outputs: Sequence[str],
        full_speed: FullSpeed,
    ) -> None:
        self.buffers = buffers
        self._shared = shared_nbytes
        self._session = session
        self._outputs = tuple(outputs)
        self._full_speed = full_speed
        self._idle: list[Binding] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all its engine weights, shared ones included."""
        return sum(buffer.spec.nbytes for buffer in self.buffers.values())

    @property
    def shared_nbytes(self) -> int:
        """Bytes shared with the set it was derived from."""
        return self._shared

    @property
    def full_speed(self) -> FullSpeed:
        """When this set reaches its last tier of speed."""
        return self._full_speed

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Run one inference; outputs in the model's order; EngineError where ONNX Runtime fails."""
        try:
            binding = self._idle.pop()
        except IndexError:
            values = {name: buffer.storage.value for name, buffer in self.buffers.items()}
            binding = Binding(self._session, values, self._outputs)
        try:
            # Not given back after a failure: what it then holds is unknown.
            results = binding.run((name, np.ascontiguousarray(array)) for name, array in inputs.items())
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise EngineError(f"ONNX Runtime failed: {error}") from error
        self._idle.append(binding)
        return results
