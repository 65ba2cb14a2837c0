"""One model's requests in every form, and rounds of the load generators: wrk for HTTP, h2load for gRPC."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.serving_servers import Running
from onnx_refit.serve.proto import messages
from onnx_refit.tensors import Array

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_TYPES = {"float32": "FP32", "int32": "INT32", "int64": "INT64"}
Round = dict[str, float]


@dataclass(frozen=True)
class Requests:
    """One inference request in all its forms, as files for the load generators.

    Attributes:
        json: the body in JSON.
        scripts: ``json`` and ``binary`` -> wrk's script.
        grpc: file with the message, framed.
    """

    json: bytes
    scripts: Mapping[str, Path]
    grpc: Path


def make_requests(inputs: Mapping[str, Array], folder: Path) -> Requests:
    """Write a request of these inputs in all forms."""
    described = [
        {"name": name, "shape": list(array.shape), "datatype": _TYPES[array.dtype.name]}
        for name, array in inputs.items()
    ]
    plain = [
        {**tensor, "data": array.ravel().tolist()} for tensor, array in zip(described, inputs.values(), strict=True)
    ]
    body = json.dumps({"inputs": plain}).encode()
    raw = [
        {**tensor, "parameters": {"binary_data_size": array.nbytes}}
        for tensor, array in zip(described, inputs.values(), strict=True)
    ]
    head = json.dumps({"inputs": raw, "parameters": {"binary_data_output": True}}).encode()
    blob = b"".join(np.ascontiguousarray(array).tobytes() for array in inputs.values())
    message = messages.ModelInferRequest(model_name="model")
    for tensor, array in zip(described, inputs.values(), strict=True):
        message.inputs.add(name=tensor["name"], datatype=tensor["datatype"], shape=tensor["shape"])
        message.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
    data = message.SerializeToString()
    (folder / "request.grpc").write_bytes(b"\0" + len(data).to_bytes(4, "big") + data)
    scripts = {
        "json": _script(folder, "json", body, {"content-type": "application/json"}),
        "binary": _script(
            folder,
            "binary",
            head + blob,
            {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))},
        ),
    }
    return Requests(body, scripts, folder / "request.grpc")


def _script(folder: Path, name: str, body: bytes, headers: Mapping[str, str]) -> Path:
    content = folder / f"request.{name}"
    content.write_bytes(body)
    lines = [
        f"local file = io.open('{content}', 'rb')",
        "wrk.method, wrk.body = 'POST', file:read('*a')",
        "file:close()",
        *(f"wrk.headers['{key}'] = '{value}'" for key, value in headers.items()),
    ]
    script = folder / f"{name}.lua"
    script.write_text("\n".join(lines) + "\n")
    return script


def one_round(form: str, server: Running, requests: Requests, clients: int, seconds: int) -> Round:
    """Requests a second, latencies in seconds, and how many requests failed."""
    if form == "grpc":
        return _h2load(server, requests.grpc, clients, seconds)
    return _wrk(server.url, requests.scripts[form], clients, seconds)


def _wrk(url: str, script: Path, clients: int, seconds: int) -> Round:
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "10s", "--latency", "-s", str(script), url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def find(pattern: str) -> re.Match[str]:
        found = re.search(pattern, text)
        if found is None:
            raise RuntimeError(text)
        return found

    def latency(percent: str) -> float:
        found = find(percent + r"%\s+([\d.]+)(us|ms|s)")
        return float(found[1]) * _UNITS[found[2]]

    failed = sum(int(number) for number in re.findall(r"Non-2xx or 3xx responses: (\d+)", text))
    for numbers in re.findall(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text):
        failed += sum(map(int, numbers))
    return {
        "rps": float(find(r"Requests/sec:\s+([\d.]+)")[1]),
        "p50": latency("50"),
        "p99": latency("99"),
        "failed": float(failed),
    }


def _h2load(server: Running, message: Path, clients: int, seconds: int) -> Round:
    """One stream a connection at a time, like the clients of the HTTP rounds."""
    log = message.with_suffix(".log")
    log.unlink(missing_ok=True)
    url = f"http://{server.address}/{messages.SERVICE}/ModelInfer"
    command = [
        "h2load", f"-c{clients}", "-m1", "-t1", f"-D{seconds}", f"-d{message}", f"--log-file={log}",
        "-H", "content-type: application/grpc", "-H", "te: trailers", url,
    ]  # fmt: skip
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = np.loadtxt(log, dtype=np.int64, ndmin=2)
    good = rows[rows[:, 1] == 200]
    latencies = good[:, 2] / 1e6
    failed = len(rows) - len(good)
    # An error of gRPC has status 200 and no message: the answers must weigh what a good one does.
    found = re.search(r"\((\d+)\) data", text)
    if found is None:
        raise RuntimeError(text)
    if float(found[1]) < 0.9 * len(good) * _answer_bytes(server, message):
        failed += len(good)
    return {
        "rps": len(good) / seconds,
        "p50": float(np.percentile(latencies, 50)),
        "p99": float(np.percentile(latencies, 99)),
        "failed": float(failed),
    }


def _answer_bytes(server: Running, message: Path) -> int:
    """Size of one good answer, asked for with a real client."""
    import grpc

    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(f"/{messages.SERVICE}/ModelInfer", None, None)
        return len(call(message.read_bytes()[5:], timeout=20))


def summary(rounds: Sequence[Round]) -> Round:
    """Medians over rounds; failures summed."""
    middle = {name: statistics.median(one[name] for one in rounds) for name in ("rps", "p50", "p99")}
    return {**middle, "failed": sum(one["failed"] for one in rounds)}
