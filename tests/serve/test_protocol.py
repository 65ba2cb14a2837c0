"""The protocol over HTTP, by hand."""

import gzip
import json
import struct
import zlib

import pytest

pytest.importorskip("uvicorn")
pytestmark = pytest.mark.serve

INPUT = {"name": "x", "shape": [2, 4], "datatype": "FP32", "data": [1, 2, 3, 4, 5, 6, 7, 8]}
ANSWER = [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
PATH = "/v2/models/affine/infer"


def test_metadata(server):
    status, _, answer = server.ask("GET", "/v2", token=None)
    assert status == 200
    assert {"name", "version", "extensions"} <= set(answer)
    assert "binary_tensor_data" in answer["extensions"]
    status, _, answer = server.ask("GET", "/v2/models/affine", token=None)
    assert answer == {
        "name": "affine",
        "versions": ["1"],
        "platform": "onnx-refit_onnxruntime",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
    }
    assert server.ask("GET", "/v2/models/affine/versions/1", token=None)[2] == answer
    assert server.ask("GET", "/v2/models/affine/versions/9", token=None)[0] == 404
    assert server.ask("GET", "/v2/models/other", token=None)[0] == 404


def test_health_and_repository(server):
    for path in (
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/affine/ready",
        "/v2/models/affine/versions/1/ready",
    ):
        assert server.ask("GET", path, token=None)[0] == 200
    assert server.ask("POST", "/v2/repository/index", {}, token=None)[2] == [
        {"name": "affine", "version": "1", "state": "READY", "reason": ""}
    ]
    assert server.ask("POST", "/v2/repository/models/affine/unload", {})[0] == 200
    assert server.ask("GET", "/v2/models/affine/ready", token=None)[0] == 503
    assert server.ask("POST", PATH, {"inputs": [INPUT]}, token=None)[0] == 503
    assert server.ask("POST", "/v2/repository/index", {"ready": True}, token=None)[2] == []
    assert server.ask("POST", "/v2/repository/models/affine/load", {})[0] == 200
    assert server.infer()[0] == 1


@pytest.mark.parametrize("data", [[1, 2, 3, 4, 5, 6, 7, 8], [[1, 2, 3, 4], [5, 6, 7, 8]]])
def test_json(server, data):
    status, headers, answer = server.ask("POST", PATH, {"id": "a1", "inputs": [{**INPUT, "data": data}]}, token=None)
    assert status == 200
    assert answer == {
        "model_name": "affine",
        "model_version": "1",
        "id": "a1",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [2, 4], "data": ANSWER}],
    }
    assert headers["onnx-refit-version"] == "1"


def _binary(parameters=None, outputs=None):
    raw = struct.pack("<8f", *range(1, 9))
    request = {"inputs": [{**INPUT, "parameters": {"binary_data_size": len(raw)}}]}
    del request["inputs"][0]["data"]
    if parameters:
        request["parameters"] = parameters
    if outputs:
        request["outputs"] = outputs
    head = json.dumps(request).encode()
    return head + raw, {"Inference-Header-Content-Length": str(len(head))}


def test_binary_in_and_json_out(server):
    body, headers = _binary()
    answer = server.ask("POST", PATH, body, headers, token=None)[2]
    assert answer["outputs"][0]["data"] == ANSWER


@pytest.mark.parametrize(
    "how",
    [{"parameters": {"binary_data_output": True}}, {"outputs": [{"name": "y", "parameters": {"binary_data": True}}]}],
)
def test_binary_out(server, how):
    body, headers = _binary(**how)
    status, found, content = server.ask("POST", PATH, body, headers, token=None, raw=True)
    assert status == 200
    assert found["content-type"] == "application/octet-stream"
    length = int(found["inference-header-content-length"])
    head = json.loads(content[:length])
    assert head["outputs"][0]["parameters"] == {"binary_data_size": 32}
    assert list(struct.unpack("<8f", content[length:])) == ANSWER


@pytest.mark.parametrize("encoding,squeeze", [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_bodies(server, encoding, squeeze):
    body = squeeze(json.dumps({"inputs": [INPUT]}).encode())
    assert server.ask("POST", PATH, body, {"content-encoding": encoding}, token=None)[2]["outputs"][0]["data"] == ANSWER
    assert server.ask("POST", PATH, body[:-9], {"content-encoding": encoding}, token=None)[0] == 400
    bomb = squeeze(b" " * 100_000_000)
    assert server.ask("POST", PATH, bomb, {"content-encoding": encoding}, token=None)[0] == 413
    assert server.ask("POST", PATH, body, {"content-encoding": "br"}, token=None)[0] == 415


BAD = [
    b"",
    b"[]",
    b"{",
    b'"x"',
    b"\xff\xfe",
    {},
    {"inputs": {}},
    {"inputs": []},
    {"inputs": [None]},
    {"inputs": [{"name": "x"}]},
    {"inputs": [{**INPUT, "name": ""}]},
    {"inputs": [{**INPUT, "name": "z"}]},
    {"inputs": [INPUT, INPUT]},
    {"inputs": [{**INPUT, "shape": [2, 5]}]},
    {"inputs": [{**INPUT, "shape": [8]}]},
    {"inputs": [{**INPUT, "shape": [-1, 4]}]},
    {"inputs": [{**INPUT, "shape": [True, 4]}]},
    {"inputs": [{**INPUT, "shape": [1 << 62, 1 << 62]}]},
    {"inputs": [{**INPUT, "shape": [1] * 60}]},
    {"inputs": [{**INPUT, "datatype": "FP99"}]},
    {"inputs": [{**INPUT, "datatype": ["FP32"]}]},
    {"inputs": [{**INPUT, "datatype": "INT32"}]},
    {"inputs": [{**INPUT, "data": ["1"] * 8}]},
    {"inputs": [{**INPUT, "data": [None] * 8}]},
    {"inputs": [{**INPUT, "data": [True] * 8}]},
    {"inputs": [{**INPUT, "data": [1e39] * 8}]},
    {"inputs": [{**INPUT, "data": [[1, 2, 3], [4, 5, 6, 7, 8]]}]},
    {"inputs": [{**INPUT, "data": [[1, 2, 3, 4], 5, 6, 7, 8]}]},
    {"inputs": [{**INPUT, "data": {"a": 1}}]},
    {"inputs": [{**INPUT, "parameters": []}]},
    {"inputs": [{**INPUT, "parameters": {"binary_data_size": 32}}]},
    {"inputs": [{**INPUT, "parameters": {"binary_data_size": -1}}]},
    {"inputs": [INPUT], "outputs": "y"},
    {"inputs": [INPUT], "outputs": [{"name": "z"}]},
    {"inputs": [INPUT], "outputs": [{"name": "y"}, {"name": "y"}]},
    {"inputs": [INPUT], "outputs": [{"name": "y", "parameters": {"classification": 3}}]},
    {"inputs": [INPUT], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]},
    {"inputs": [INPUT], "id": 7},
    {"inputs": [INPUT], "parameters": {"timeout": "soon"}},
]


@pytest.mark.parametrize("body", BAD, ids=range(len(BAD)))
def test_bad_requests_are_refused_with_words(server, body):
    status, _, answer = server.ask("POST", PATH, body, token=None)
    assert status == 400, answer
    assert len(answer["error"]) > 10
    assert answer["request_id"]


@pytest.mark.parametrize("length", ["x", "-1", "999999", "", "1e3", "٣"])
def test_bad_header_lengths_are_refused(server, length):
    body, _ = _binary()
    headers = {"Inference-Header-Content-Length": length.encode().decode("latin-1")}
    assert server.ask("POST", PATH, body, headers, token=None)[0] == 400


def test_bytes_left_over_are_refused(server):
    body, headers = _binary()
    assert server.ask("POST", PATH, body + b"x", headers, token=None)[0] == 400
    assert server.ask("POST", PATH, body[:-1], headers, token=None)[0] == 400


def test_what_is_not_there(server):
    assert server.ask("GET", "/v3")[0] == 404
    status, headers, _ = server.ask("GET", PATH)
    assert (status, headers["allow"]) == (405, "POST")
    for version in ("9", "0", "-1", "x", "1" * 30):
        assert server.ask("POST", f"/v2/models/affine/versions/{version}/infer", {"inputs": [INPUT]})[0] == 404
    assert server.ask("POST", PATH, {"inputs": [INPUT], "parameters": {"version": "7"}})[0] == 404


def test_a_request_id_comes_back(server):
    headers = server.ask("GET", "/v2", headers={"x-request-id": "abc-1.2"})[1]
    assert headers["x-request-id"] == "abc-1.2"
    headers = server.ask("GET", "/v2", headers={"x-request-id": 'a"b'})[1]
    assert headers["x-request-id"] != 'a"b'


def test_a_deadline(server):
    status, _, answer = server.ask("POST", PATH, {"inputs": [INPUT], "parameters": {"timeout": 1}}, token=None)
    assert status == 504
    assert "deadline" in answer["error"]
