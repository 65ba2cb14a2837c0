"""ONNX Runtime behind MLServer: its protocol is the same, so the same requests go to both."""

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from peer_session import Session


class Peer(MLModel):
    async def load(self) -> bool:
        self._session = Session()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        results = self._session.run({tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs})
        outputs = [NumpyCodec.encode_output(name, array) for name, array in results.items()]
        return InferenceResponse(model_name=self.name, outputs=outputs)
