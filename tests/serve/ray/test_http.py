"""The Open Inference Protocol over the HTTP proxy of Ray Serve."""

import json
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray")

from tests.serve.models import affine_weights
from tests.serve.ray.conftest import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TENSOR = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1.0] * 4}


class Web:
    def __init__(self, handle, url):
        self.handle, self.url = handle, url

    def ask(self, method, path, body=None, headers=None):
        """Status, headers and the body."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        request = urllib.request.Request(self.url + path, data, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def open(self):
        """Whether the proxy has heard of the deployment."""
        try:
            return self.ask("GET", "/v2")[0] == 200
        except OSError:
            return False

    def infer(self, headers=None, **more):
        status, found, body = self.ask("POST", "/v2/models/web/infer", {"inputs": [TENSOR], **more}, headers)
        assert status == 200, body
        answer = json.loads(body)
        assert found["onnx-refit-version"] == answer["model_version"]
        return answer["outputs"][0]["data"][0] / 2, int(answer["model_version"]), int(found["onnx-refit-epoch"])


@pytest.fixture(scope="module")
def web(ray_cluster, affine_plan, tmp_path_factory):
    from onnx_refit.serve.ray import deploy, remove

    handle = deploy(affine_plan, store=tmp_path_factory.mktemp("web"), name="web", route_prefix="/web")
    web = Web(handle, f"http://127.0.0.1:{ray_cluster.http_port}/web")
    wait_until(web.open)
    yield web
    remove("web")


def test_the_protocol(web):
    for path, key in (
        ("/v2", "name"),
        ("/v2/health/live", "live"),
        ("/v2/health/ready", "ready"),
        ("/v2/models", "models"),
    ):
        status, _, body = web.ask("GET", path)
        assert (status, key in json.loads(body)) == (200, True)
    described = json.loads(web.ask("GET", "/v2/models/web")[2])
    assert described["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert json.loads(web.ask("GET", "/v2/models/web/ready")[2]) == {"name": "web", "ready": True}
    assert json.loads(web.ask("GET", "/v2/models/web/config")[2])["name"] == "web"
    head: dict[str, Any] = {
        "inputs": [{**TENSOR, "parameters": {"binary_data_size": 16}}],
        "parameters": {"binary_data_output": True},
    }
    del head["inputs"][0]["data"]
    text = json.dumps(head).encode()
    headers = {"inference-header-content-length": str(len(text))}
    status, found, body = web.ask("POST", "/v2/models/web/infer", text + np.ones(4, "<f4").tobytes(), headers)
    assert status == 200
    size = int(found["inference-header-content-length"])
    np.testing.assert_array_equal(np.frombuffer(body[size:], "<f4"), np.full(4, 2 * web.infer()[0], np.float32))


def test_what_is_wrong_is_said(web):
    for method, path, body, wanted in (
        ("POST", "/v2/models/web/infer", b"{", 400),
        ("POST", "/v2/models/web/infer", {"inputs": [{**TENSOR, "shape": [1, 5]}]}, 400),
        ("POST", "/v2/models/web/infer", {"inputs": []}, 400),
        ("POST", "/v2/models/web/versions/99/infer", {"inputs": [TENSOR]}, 404),
        ("POST", "/v2/models/other/infer", {"inputs": [TENSOR]}, 404),
        ("GET", "/v2/models/web/infer", None, 405),
        ("POST", "/v2/models/web/refit/stage", b"x", 404),
        ("GET", "/", None, 404),
    ):
        status, _, answer = web.ask(method, path, body)
        assert status == wanted, (path, answer)
        assert "error" in json.loads(answer)
    status, _, answer = web.ask("POST", "/v2/models/web/infer", {"inputs": [TENSOR]}, {"onnx-refit-fence": "soon"})
    assert status == 400, answer


def test_answers_follow_refits_and_fences(web):
    before = web.infer()
    report = web.handle.refit(affine_weights(5.0))
    assert {web.infer() for _ in range(10)} == {(5.0, report.version, report.target.epoch)}
    fence = {"onnx-refit-fence": str(report.target.epoch)}
    assert web.infer(fence)[2] == report.target.epoch
    assert web.infer({"onnx-refit-version": str(before[1])})[:2] == before[:2]
    assert web.infer(parameters={"version": before[1]})[:2] == before[:2]
