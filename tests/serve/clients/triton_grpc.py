"""tritonclient over gRPC, as its documentation uses it. Prints what it saw as JSON."""

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton

client = triton.InferenceServerClient(sys.argv[2])
seen = {
    "live": client.is_server_live(),
    "ready": client.is_server_ready(),
    "model_ready": client.is_model_ready("affine"),
    "server": client.get_server_metadata(as_json=True)["name"],
    "inputs": client.get_model_metadata("affine", as_json=True)["inputs"],
    "index": client.get_model_repository_index(as_json=True)["models"],
}
x = np.arange(8, dtype=np.float32).reshape(2, 4)
tensor = triton.InferInput("x", x.shape, "FP32")
tensor.set_data_from_numpy(x)
expected = (x + 1).tolist()


def infer(**options):
    result = client.infer("affine", [tensor], request_id="r1", **options)
    assert result.get_response().id == "r1"
    assert result.get_response().model_version == "1"
    return result.as_numpy("y").tolist() == expected


seen["answers"] = [
    infer(),
    infer(model_version="1"),
    infer(outputs=[triton.InferRequestedOutput("y")]),
    infer(client_timeout=60),
    infer(timeout=10_000_000),
    infer(compression_algorithm="gzip"),
]
done: queue.Queue[Any] = queue.Queue()
for _ in range(8):
    client.async_infer("affine", [tensor], lambda result, error: done.put((result, error)))
seen["async"] = [one[1] is None and one[0].as_numpy("y").tolist() == expected for one in (done.get() for _ in range(8))]
try:
    infer(model_version="99")
except triton.InferenceServerException as error:
    seen["error"] = [error.status(), error.message()]
headers = {"authorization": f"Bearer {sys.argv[3]}"}
client.unload_model("affine", headers=headers)
seen["unloaded"] = not client.is_model_ready("affine")
client.load_model("affine", headers=headers)
seen["loaded"] = client.is_model_ready("affine")
client.close()
sys.stdout.write(json.dumps(seen))
