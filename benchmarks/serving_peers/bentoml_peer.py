"""ONNX Runtime behind BentoML, with its own JSON."""

from typing import Any

import bentoml
import numpy as np
from peer_session import Session


@bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}}, metrics={"enabled": False})
class Peer:
    def __init__(self) -> None:
        self._session = Session()

    @bentoml.api
    def infer(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        arrays = {
            tensor["name"]: np.array(tensor["data"], self._session.types[tensor["name"]]).reshape(tensor["shape"])
            for tensor in inputs
        }
        results = self._session.run(arrays)
        return {
            "outputs": [
                {"name": name, "shape": list(array.shape), "data": array.ravel().tolist()}
                for name, array in results.items()
            ]
        }
