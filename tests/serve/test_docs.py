"""The documentation does what it says: its curl examples run, its files name things that exist."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.numpy import save_file

pytest.importorskip("uvicorn")
from onnx_refit.serve.metrics import Metrics
from onnx_refit.serve.openapi import description
from onnx_refit.serve.proto import compile as proto
from tests.serve.conftest import TOKEN
from tests.serve.models import affine_weights

pytestmark = pytest.mark.serve
ROOT = Path(proto.__file__).resolve().parents[4]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_curl_examples(start, plan, tmp_path):
    text = (ROOT / "docs" / "serving.md").read_text("utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 8
    running = start(plan, "--weights-from", f"s={tmp_path}")
    save_file(affine_weights(2.0), tmp_path / "new.safetensors")
    script = "set -eux -o pipefail\n" + "\n".join(blocks)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "SERVER": running.url, "TOKEN": TOKEN},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr + done.stdout


def test_the_dashboard_asks_for_metrics_that_exist():
    dashboard = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text("utf-8"))
    asked = set(re.findall(r"onnx_refit_\w+", json.dumps(dashboard)))
    metrics = Metrics()
    known = set()
    for family in metrics.registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        known |= {family.name + suffix for suffix in suffixes}
    assert asked <= known, asked - known
    assert len(asked) > 12


def test_every_metric_is_documented():
    text = (ROOT / "docs" / "serving.md").read_text("utf-8")
    for family in Metrics().registry.collect():
        assert family.name.removeprefix("onnx_refit_") in text, family.name


def test_every_described_path_is_served(server):
    for path, methods in description()["paths"].items():
        concrete = path.format(model="affine", version=1, id="0")
        for method in methods:
            if concrete.endswith(("/events", "unload")):
                continue
            body = None if method == "get" else b"{}"
            status, _, answer = server.ask(method.upper(), concrete, body, raw=True)
            assert status != 405, (method, path)
            assert b"nothing at this path" not in answer, path


def test_the_compiled_protocol_is_current(tmp_path):
    pytest.importorskip("grpc_tools")
    proto.compile_proto(tmp_path / "now.binpb")
    assert (tmp_path / "now.binpb").read_bytes() == proto.COMPILED.read_bytes()


def test_the_deployment_files_are_yaml():
    yaml = pytest.importorskip("yaml")
    documents = list(yaml.safe_load_all((ROOT / "deploy" / "kserve.yaml").read_text("utf-8")))
    assert [document["kind"] for document in documents] == ["ServingRuntime", "InferenceService"]
    assert "model" in yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))["services"]
