"""ONNX Runtime behind LitServe; with more than one row a batch, requests are stacked as its documentation shows."""

import sys
from typing import Any

import litserve
import numpy as np
from peer_session import Session


class Peer(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self._session = Session()

    def decode_request(self, request) -> Any:  # noqa: ANN001 - FastAPI takes an annotated one from the query
        return {
            tensor["name"]: np.array(tensor["data"], self._session.types[tensor["name"]]).reshape(tensor["shape"])
            for tensor in request["inputs"]
        }

    def batch(self, inputs: list[Any]) -> Any:
        return {name: np.concatenate([one[name] for one in inputs]) for name in inputs[0]}

    def predict(self, inputs: Any) -> Any:
        return self._session.run(inputs)

    def unbatch(self, output: Any) -> Any:
        rows = len(next(iter(output.values())))
        return [{name: array[row : row + 1] for name, array in output.items()} for row in range(rows)]

    def encode_response(self, output: Any) -> Any:
        return {
            "outputs": [
                {"name": name, "shape": list(array.shape), "data": array.ravel().tolist()}
                for name, array in output.items()
            ]
        }


if __name__ == "__main__":
    port, rows = map(int, sys.argv[1:])
    options = {"max_batch_size": rows, "batch_timeout": 0.001} if rows > 1 else {}
    server = litserve.LitServer(Peer(**options), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=port, log_level="error", generate_client_file=False)
