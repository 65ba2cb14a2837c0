"""Requests a second and latency of the server beside its peers, and under a commit every second.

    python -m benchmarks.serving --peers PYTHON --output benchmarks/results/serving.json

``PYTHON`` is the interpreter of an environment with mlserver, litserve and onnxruntime; without it only our own server
is measured. The load generator is wrk, which has to be installed. Every server runs alone with one inference thread;
rounds of all servers alternate and medians are taken, because other work on the machine hits all of them alike.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

import onnx_refit
from onnx_refit.serve.client import RefitClient

CLIENTS = (1, 8, 64)
TOKEN = "benchmark-benchmark-benchmark"
PEERS = Path(__file__).parent / "serving_peers"
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def network(width: int, hidden: int, seed: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    shapes = {"w1": (width, hidden), "b1": (hidden,), "w2": (hidden, width), "b2": (width,)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("Add", ["a", "b1"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "w2"], ["d"]),
        helper.make_node("Add", ["d", "b2"], ["y"]),
    ]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])] for name in ("x", "y")]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "network", *ends, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), weights


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[object], url: str, body: bytes, cwd: Path, **environment: str) -> Iterator[str]:
    """A server process, ready to answer."""
    with (cwd / "server.log").open("ab") as log:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=cwd,
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            request = urllib.request.Request(url, body, {"content-type": "application/json"})
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200:
                    break
            if process.poll() is not None:
                raise RuntimeError((cwd / "server.log").read_text()[-2000:])
            time.sleep(0.1)
        else:
            raise RuntimeError(f"{url} does not answer")
        yield url
    finally:
        # The whole group: some leave their workers behind.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)


def load(url: str, script: Path, clients: int, seconds: int) -> dict[str, float]:
    """One round of wrk."""
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--latency", "-s", script, url]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def find(pattern: str) -> re.Match[str]:
        found = re.search(pattern, text)
        if found is None:
            raise RuntimeError(text)
        return found

    def latency(percent: str) -> float:
        found = find(percent + r"%\s+([\d.]+)(us|ms|s)")
        return float(found[1]) * UNITS[found[2]]

    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    return {
        "rps": float(find(r"Requests/sec:\s+([\d.]+)")[1]),
        "p50": latency("50"),
        "p99": latency("99"),
        "failed": float(failed[1]) if failed else 0.0,
    }


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    middle = {name: statistics.median(one[name] for one in rounds) for name in ("rps", "p50", "p99")}
    return {**middle, "failed": sum(one["failed"] for one in rounds)}


def make_inputs(directory: Path, width: int, hidden: int) -> tuple[bytes, Path]:
    """Model, plan and weights in a directory; the request's body and wrk's script for it."""
    model, _ = network(width, hidden, 0)
    onnx.save(model, directory / "model.onnx")
    onnx_refit.build(model).save(directory / "model.plan")
    for seed in (1, 2):
        save_file(network(width, hidden, seed)[1], directory / f"{seed}.safetensors")
    tensor = {"name": "x", "shape": [1, width], "datatype": "FP32", "data": [0.5] * width}
    body = json.dumps({"inputs": [tensor]})
    script = directory / "post.lua"
    script.write_text(f"wrk.method = 'POST'\nwrk.body = '{body}'\nwrk.headers['content-type'] = 'application/json'\n")
    return body.encode(), script


def ours(directory: Path, body: bytes) -> contextlib.AbstractContextManager[str]:
    port = free_port()
    command = [sys.executable, "-m", "onnx_refit.cli.main", "serve", directory / "model.plan", "--port", port]
    options = ["--threads", 1, "--batch", 16, "--no-access-log"]
    url = f"http://127.0.0.1:{port}/v2/models/model/infer"
    return running([*command, *options], url, body, directory, ONNX_REFIT_TOKEN=TOKEN)


def mlserver(python: Path, directory: Path, body: bytes) -> contextlib.AbstractContextManager[str]:
    ports = [free_port() for _ in range(3)]
    names = ("http_port", "grpc_port", "metrics_port")
    settings = {"host": "127.0.0.1", "parallel_workers": 0, "debug": False, **dict(zip(names, ports, strict=True))}
    (directory / "settings.json").write_text(json.dumps(settings))
    (directory / "model-settings.json").write_text(
        json.dumps({"name": "model", "implementation": "mlserver_peer.Peer"})
    )
    shutil.copy(PEERS / "mlserver_peer.py", directory)
    url = f"http://127.0.0.1:{ports[0]}/v2/models/model/infer"
    command = [python.parent / "mlserver", "start", "."]
    return running(command, url, body, directory, PEER_MODEL=str(directory / "model.onnx"))


def litserve(python: Path, directory: Path, body: bytes) -> contextlib.AbstractContextManager[str]:
    port = free_port()
    command = [python, PEERS / "litserve_peer.py", port]
    return running(
        command, f"http://127.0.0.1:{port}/predict", body, directory, PEER_MODEL=str(directory / "model.onnx")
    )


def beside_peers(python: Path | None, rounds: int) -> dict[str, object]:
    """All servers up at once, their rounds alternating."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        body, script = make_inputs(directory, 8, 16)
        urls = {"onnx-refit": stack.enter_context(ours(directory, body))}
        if python is not None:
            urls["mlserver"] = stack.enter_context(mlserver(python, directory, body))
            urls["litserve"] = stack.enter_context(litserve(python, directory, body))
        results: dict[str, object] = {}
        for clients in CLIENTS:
            measured: dict[str, list[dict[str, float]]] = {name: [] for name in urls}
            for _ in range(rounds):
                for name, url in urls.items():
                    measured[name].append(load(url, script, clients, 1))
            results[str(clients)] = {name: summary(found) for name, found in measured.items()}
        return results


def under_commits(rounds: int) -> dict[str, object]:
    """Quiet rounds, and rounds with new weights committed every second.

    What a commit itself does is apart from what the push before it does (upload, check and derivation share the
    processor with inference): in "commits" the weights were staged before, and every commit is a rollback to the
    version before; in "pushes" every commit is preceded by its upload.
    """
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        body, script = make_inputs(directory, 512, 2048)
        url = stack.enter_context(ours(directory, body))
        client = RefitClient(url.partition("/v2")[0], TOKEN)
        client.commit("model", client.stage("model", directory / "1.safetensors")["id"])
        mode, done, pushed = ["quiet"], threading.Event(), []

        def change() -> None:
            step = 0
            while not done.wait(1.0):
                step += 1
                if mode[0] == "commits":
                    client.rollback("model")
                elif mode[0] == "pushes":
                    started = time.perf_counter()
                    staged = client.stage("model", directory / f"{1 + step % 2}.safetensors")
                    if staged["state"] == "staged":
                        client.commit("model", staged["id"])
                        pushed.append(time.perf_counter() - started)

        thread = threading.Thread(target=change)
        thread.start()
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in ("quiet", "commits", "pushes")}
        load(url, script, 8, 1)
        for _ in range(rounds):
            for name, found in measured.items():
                mode[0] = name
                found.append(load(url, script, 8, 3))
        done.set()
        thread.join()
        results: dict[str, object] = {name: summary(found) for name, found in measured.items()}
        return {**results, "push_seconds": statistics.median(pushed) if pushed else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    before = os.getloadavg()[0]
    result = {
        "cores": os.cpu_count(),
        "load_before": before,
        "clients": beside_peers(options.peers, options.rounds),
        "changes": under_commits(options.rounds),
    }
    text = json.dumps(result, indent=2)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
