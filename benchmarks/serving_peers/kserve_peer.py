"""ONNX Runtime behind KServe's ModelServer, REST and gRPC."""

import sys
from typing import Any

import kserve
from kserve.protocol.infer_type import InferOutput, InferRequest, InferResponse
from kserve.utils.numpy_codec import from_np_dtype
from peer_session import Session


class Peer(kserve.Model):
    def __init__(self) -> None:
        super().__init__("model")
        self._session = Session()
        self.ready = True

    async def predict(self, payload: InferRequest, headers: Any = None, response_headers: Any = None) -> InferResponse:
        results = self._session.run({tensor.name: tensor.as_numpy() for tensor in payload.inputs})
        # As its clients ask for them: raw where the request came raw.
        binary = payload.from_grpc or "inference-header-content-length" in (headers or {})
        outputs = []
        for name, array in results.items():
            output = InferOutput(name, list(array.shape), from_np_dtype(array.dtype))
            output.set_data_from_numpy(array, binary_data=binary)
            outputs.append(output)
        return InferResponse(response_id=payload.id or "", model_name=self.name, infer_outputs=outputs)


if __name__ == "__main__":
    http_port, grpc_port = map(int, sys.argv[1:])
    kserve.ModelServer(http_port=http_port, grpc_port=grpc_port, enable_latency_logging=False).start([Peer()])
