"""ONNX Runtime behind LitServe."""

import os
import sys
from typing import Any

import litserve
import numpy as np
import onnxruntime


class Peer(litserve.LitAPI):
    def setup(self, device: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(os.environ["PEER_MODEL"], options)

    def decode_request(self, request) -> Any:  # noqa: ANN001 - FastAPI takes an annotated one from the query
        (tensor,) = request["inputs"]
        return np.array(tensor["data"], np.float32).reshape(tensor["shape"])

    def predict(self, x: Any) -> Any:
        return self._session.run(None, {"x": x})[0]

    def encode_response(self, output: Any) -> Any:
        return {"outputs": [{"name": "y", "shape": list(output.shape), "data": output.ravel().tolist()}]}


if __name__ == "__main__":
    server = litserve.LitServer(Peer(), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), log_level="error", generate_client_file=False)
