"""KServe's own clients over HTTP and gRPC, as its documentation uses them. Prints what they saw as JSON."""

import asyncio
import json
import sys

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

x = np.arange(8, dtype=np.float32).reshape(2, 4)
expected = (x + 1).tolist()


def request(binary):
    tensor = InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x, binary_data=binary)
    return InferRequest("affine", [tensor], request_id="r1")


async def main():
    url, address = sys.argv[1:3]
    rest = InferenceRESTClient(RESTConfig(protocol="v2", retries=1))
    seen = {
        "live": await rest.is_server_live(url),
        "ready": await rest.is_server_ready(url),
        "model_ready": await rest.is_model_ready(url, "affine"),
        "answers": [],
    }
    for binary in (True, False):
        answer = await rest.infer(url, request(binary), model_name="affine")
        seen["answers"].append(answer.outputs[0].as_numpy().reshape(2, 4).tolist() == expected)
    await rest.close()
    client = InferenceGRPCClient(address)
    seen["grpc_live"] = await client.is_server_live()
    seen["grpc_ready"] = await client.is_server_ready()
    seen["grpc_model_ready"] = await client.is_model_ready("affine")
    for binary in (True, False):
        answer = await client.infer(request(binary))
        seen["answers"].append(answer.outputs[0].as_numpy().reshape(2, 4).tolist() == expected)
    await client.close()
    sys.stdout.write(json.dumps(seen))


asyncio.run(main())
