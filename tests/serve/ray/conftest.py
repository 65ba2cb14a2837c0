"""A real Ray cluster of four nodes, each with processes and an object store of its own, on this machine."""

import os
import socket
import time
from pathlib import Path

import pytest

import onnx_refit
from tests.serve.models import affine
from tests.serve.ray import failpoints

ROOT = Path(__file__).resolve().parents[3]
NODES = 4
# CPUs are what Ray counts with, not what the machine has.
NODE = {"num_cpus": 8, "object_store_memory": 80 << 20}
# What the nodes have that a test may take away: not the first one, where Ray keeps its own state.
WORKER = {"worker": 1.0}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    pytest.importorskip("ray")
    points = tmp_path_factory.mktemp("failpoints")
    changes = {
        failpoints.VARIABLE: str(points),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_memory_monitor_refresh_ms": "0",
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)
    for _ in range(NODES - 1):
        add_worker(cluster)
    cluster.http_port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": cluster.http_port})
    yield cluster
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def affine_plan():
    return onnx_refit.build(affine(1.0))


def add_worker(cluster):
    """Add a node; Ray's own wait for it gives up after half a minute."""
    import ray

    node = cluster.add_node(**NODE, resources=WORKER, wait=False)
    wait_until(lambda: node.node_id in {known["NodeID"] for known in ray.nodes() if known["Alive"]})


def wait_until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.05)
