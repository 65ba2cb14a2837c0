"""tritonclient over HTTP, as its documentation uses it. Prints what it saw as JSON."""

import json
import sys

import numpy as np
import tritonclient.http as triton

client = triton.InferenceServerClient(sys.argv[1].removeprefix("http://"), concurrency=4)
seen = {
    "live": client.is_server_live(),
    "ready": client.is_server_ready(),
    "model_ready": client.is_model_ready("affine"),
    "version_ready": client.is_model_ready("affine", "1"),
    "server": client.get_server_metadata()["name"],
    "inputs": client.get_model_metadata("affine")["inputs"],
    "config": client.get_model_config("affine")["input"][0]["data_type"],
    "index": client.get_model_repository_index(),
}
x = np.arange(8, dtype=np.float32).reshape(2, 4)


def infer(binary_in, binary_out, version="", **options):
    tensor = triton.InferInput("x", x.shape, "FP32")
    tensor.set_data_from_numpy(x, binary_data=binary_in)
    wanted = None if binary_out is None else [triton.InferRequestedOutput("y", binary_data=binary_out)]
    result = client.infer("affine", [tensor], outputs=wanted, model_version=version, request_id="r1", **options)
    assert result.get_response()["id"] == "r1"
    return result.as_numpy("y").tolist()


expected = (x + 1).tolist()
seen["answers"] = [
    infer(i, o, v, **rest) == expected
    for i in (True, False)
    for o in (True, False, None)
    for v in ("", "1")
    for rest in ({}, {"request_compression_algorithm": "gzip"}, {"timeout": 10_000_000})
]
tensor = triton.InferInput("x", x.shape, "FP32")
tensor.set_data_from_numpy(x)
pending = [client.async_infer("affine", [tensor]) for _ in range(8)]
seen["async"] = [one.get_result().as_numpy("y").tolist() == expected for one in pending]
try:
    infer(True, True, "99")
except triton.InferenceServerException as error:
    seen["error"] = [error.status(), error.message()]
headers = {"authorization": f"Bearer {sys.argv[3]}"}
client.unload_model("affine", headers=headers)
seen["unloaded"] = not client.is_model_ready("affine")
client.load_model("affine", headers=headers)
seen["loaded"] = client.is_model_ready("affine")
client.close()
sys.stdout.write(json.dumps(seen))
