"""Clients nobody here wrote, unchanged. Each runs in a process of its own: two of them refuse to share one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.conftest import TOKEN

pytestmark = pytest.mark.serve
CLIENTS = Path(__file__).parent / "clients"


def run(script, server):
    done = subprocess.run(
        [sys.executable, CLIENTS / script, server.url, server.grpc, TOKEN], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("script,answers,status", [("triton_http.py", 36, "404"), ("triton_grpc.py", 6, "NOT_FOUND")])
def test_tritonclient(server, script, answers, status):
    pytest.importorskip("tritonclient")
    seen = run(script, server)
    for what in ("live", "ready", "model_ready", "unloaded", "loaded"):
        assert seen[what] is True, what
    assert seen["server"] == "onnx-refit"
    (described,) = seen["inputs"]
    assert (described["name"], described["datatype"], [int(d) for d in described["shape"]]) == ("x", "FP32", [-1, 4])
    assert seen["index"][0]["state"] == "READY"
    assert seen["answers"] == [True] * answers
    assert seen["async"] == [True] * 8
    assert status in seen["error"][0]
    assert "version 99" in seen["error"][1]


def test_kserve(server):
    pytest.importorskip("kserve")
    seen = run("kserve_both.py", server)
    for what in ("live", "ready", "model_ready", "grpc_live", "grpc_ready", "grpc_model_ready"):
        assert seen[what] is True, what
    assert seen["answers"] == [True] * 4
