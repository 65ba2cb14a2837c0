"""How long a refit of replicas on several nodes takes, by phase, and what requests notice of it.

    python -m benchmarks.cluster --output benchmarks/results/cluster.json

Needs the extra ``ray``. The nodes are processes of this machine, each with an object store of its own, so weights go
through shared memory and not over a network: read the parts that are ours (check, stage, decide, publish), and how
they compare with what requests notice.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

import onnx_refit
from benchmarks.measure import machine
from onnx_refit.tensors import Array

NODES = 4
REPLICAS = 3
REFITS = 7


def network(width: int, layers: int) -> tuple[Any, dict[str, Array]]:
    """Layers of x @ w, and their weights."""
    rng = np.random.default_rng(0)
    weights = {f"w{n}": rng.standard_normal((width, width), np.float32) / width for n in range(layers)}
    names = ["x", *(f"h{n}" for n in range(layers - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[n], f"w{n}"], [names[n + 1]]) for n in range(layers)]
    row: list[str | int | None] = ["batch", width]
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, row)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, row)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), weights


def ask(handle: Any, inputs: dict[str, Array], stop: threading.Event, seen: list[tuple[float, float, int]]) -> None:
    """One client: when it asked, how long it took, and which version answered."""
    while not stop.is_set():
        started = time.perf_counter()
        answer = handle.infer(inputs)
        seen.append((started, time.perf_counter() - started, answer.version))


def percentile(values: list[float], share: float) -> float:
    """A percentile, in milliseconds."""
    return float(np.percentile(values, share)) * 1e3 if values else 0.0


def measure(megabytes: int) -> dict[str, Any]:
    """Refits of a network of about so many megabytes, under two clients."""
    from onnx_refit.serve.ray import deploy, remove

    layers = 8
    width = int((megabytes * 1e6 / 4 / layers) ** 0.5) // 16 * 16
    model, weights = network(width, layers)
    with tempfile.TemporaryDirectory() as store:
        handle = deploy(
            onnx_refit.build(model), store=store, name="bench", num_replicas=REPLICAS, max_replicas_per_node=1
        )
        inputs = {"x": np.ones((1, width), np.float32)}
        handle.infer(inputs)
        stop, seen = threading.Event(), list[tuple[float, float, int]]()
        clients = [threading.Thread(target=ask, args=(handle, inputs, stop, seen)) for _ in range(2)]
        for client in clients:
            client.start()
        time.sleep(3)
        quiet_until = time.perf_counter()
        reports, spans = [], []
        for step in range(REFITS):
            changed = {name: array * np.float32(1 + step / 100) for name, array in weights.items()}
            started = time.perf_counter()
            reports.append(handle.refit(changed, canary=inputs))
            spans.append((started, time.perf_counter()))
        stop.set()
        for client in clients:
            client.join()
        remove("bench")
    quiet = [took for started, took, _ in seen if started < quiet_until]
    busy = [took for started, took, _ in seen if any(a <= started <= b for a, b in spans)]
    phases = {phase: statistics.median(r.seconds[phase] for r in reports) for phase in reports[0].seconds}
    return {
        "megabytes": sum(array.nbytes for array in weights.values()) / 1e6,
        "refit_seconds": statistics.median(end - start for start, end in spans),
        "phases_seconds": phases,
        "stage_seconds_a_replica": statistics.median(
            sum(seconds for stage, seconds in spent.items() if stage != "publish")
            for report in reports
            for spent in report.replicas.values()
        ),
        "publish_seconds_a_replica": statistics.median(
            spent["publish"] for report in reports for spent in report.replicas.values()
        ),
        "requests": {"quiet": len(quiet), "during_refits": len(busy)},
        "quiet_ms": {"p50": percentile(quiet, 50), "p99": percentile(quiet, 99)},
        "during_refits_ms": {"p50": percentile(busy, 50), "p99": percentile(busy, 99)},
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 50, 200])
    chosen = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 8, "object_store_memory": 1 << 30}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    for _ in range(NODES - 1):
        cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    results = {
        "machine": machine(),
        "ray": ray.__version__,
        "nodes": NODES,
        "replicas": REPLICAS,
        "refits": REFITS,
        "cases": [measure(megabytes) for megabytes in chosen.megabytes],
    }
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()
    text = json.dumps(results, indent=2)
    if chosen.output is None:
        print(text)
    else:
        chosen.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
