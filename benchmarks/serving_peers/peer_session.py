"""ONNX Runtime as every peer uses it; beside the peers' files, so that each environment can import it."""

import os

import numpy as np
import onnxruntime

_TYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}


class Session:
    """The model of ``$PEER_MODEL`` with one thread."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(os.environ["PEER_MODEL"], options)
        self.types = {value.name: _TYPES[value.type] for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Output name -> array."""
        fed = {name: np.asarray(inputs[name], dtype) for name, dtype in self.types.items()}
        return dict(zip(self.outputs, self._session.run(None, fed), strict=True))
