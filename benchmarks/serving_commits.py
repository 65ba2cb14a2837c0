"""What requests notice of new weights that are uploaded, checked and committed every second.

Every request of a run is looked at by itself: those that began or ended while a
push was under way or shortly after it, and the rest, which are the idle server's. So both are taken from the same
seconds of the same machine, whatever else it does. The client that pushes is on the same cores; what it takes of them
is in the figures.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from safetensors.numpy import save_file

import onnx_refit
from benchmarks.serving_load import make_requests
from benchmarks.serving_network import network
from benchmarks.serving_servers import SERVERS, TOKEN, Running, running
from onnx_refit.serve.client import RefitClient
from onnx_refit.tensors import Array

CLIENTS = (1, 8, 64)
SECONDS = 15
WIDTH, HIDDEN = 512, 2048
# A push still shows for so long after its answer: caches are cold, and the client closes its connections.
_AFTER_SECONDS = 0.1


def under_commits(rounds: int) -> dict[str, object]:
    """Clients -> latencies of the idle server and of all requests, in seconds."""
    server = next(server for server in SERVERS if server.name == "onnx-refit, batches")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = network(WIDTH, HIDDEN, 0)[0]
        onnx.save(model, folder / "model.onnx")
        onnx_refit.build(model).save(folder / "model.plan")
        x = np.random.default_rng(9).standard_normal((1, WIDTH)).astype(np.float32)
        requests = make_requests({"x": x}, folder)
        for seed in (1, 2):
            save_file(network(WIDTH, HIDDEN, seed)[1], folder / f"{seed}.safetensors")
        place = stack.enter_context(running(server, Path(sys.executable), folder, requests.json))
        client = RefitClient(place.url.partition("/v2")[0], TOKEN)
        results: dict[str, object] = {}
        took: list[float] = []
        for clients in CLIENTS:
            found = [_run(place, client, folder, clients, took) for _ in range(rounds)]
            results[str(clients)] = {
                **{key: statistics.median(one[key] for one in found) for key in found[0]},
                "failed": sum(one["failed"] for one in found),
                "p99_over_idle_rounds": sorted(one["p99_over_idle"] for one in found),
            }
            print("commits", clients, json.dumps(results[str(clients)]), flush=True)
        return {"clients": results, "pushes": len(took), "push_seconds": statistics.median(took)}


def _run(place: Running, client: RefitClient, folder: Path, clients: int, took: list[float]) -> dict[str, float]:
    log = folder / "requests.log"
    log.unlink(missing_ok=True)
    command = [
        "h2load", "--h1", f"-c{clients}", "-t1", f"-D{SECONDS}", "--warm-up-time=1", f"-d{folder / 'request.json'}",
        f"--log-file={log}", "-H", "content-type: application/json", place.url,
    ]  # fmt: skip
    load = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    time.sleep(2)
    pushes: list[tuple[float, float]] = []
    end = time.monotonic() + SECONDS - 2
    while time.monotonic() < end:
        began = time.time()
        staged = client.stage("model", folder / f"{1 + len(pushes) % 2}.safetensors")
        if staged["state"] == "staged":
            client.commit("model", staged["id"])
        pushes.append((began, time.time()))
        time.sleep(1)
    load.wait()
    took += [after - before for before, after in pushes]
    rows = np.loadtxt(log, dtype=np.int64, ndmin=2)
    good = rows[rows[:, 1] == 200]
    return {**_figures(good[:, 0] / 1e6, good[:, 2] / 1e6, pushes), "failed": float(len(rows) - len(good))}


def _figures(starts: Array, seconds: Array, pushes: Sequence[tuple[float, float]]) -> dict[str, float]:
    near = np.zeros(len(starts), bool)
    for before, after in pushes:
        near |= (starts + seconds > before) & (starts < after + _AFTER_SECONDS)
    idle, every = seconds[~near], seconds
    figures = {
        "idle_p50": np.percentile(idle, 50),
        "idle_p99": np.percentile(idle, 99),
        "p50": np.percentile(every, 50),
        "p99": np.percentile(every, 99),
        "near_p99": np.percentile(seconds[near], 99),
        "near_share": near.mean(),
        "rps": len(every) / (starts.max() - starts.min()),
    }
    return {key: float(value) for key, value in figures.items()} | {
        "p99_over_idle": float(figures["p99"] / figures["idle_p99"])
    }
