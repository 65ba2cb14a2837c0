"""What a hostile or broken client can do: nothing."""

import contextlib
import json
import random
import socket
import ssl
import subprocess
import time
import urllib.request

import pytest
from safetensors.numpy import save

pytest.importorskip("uvicorn")
from onnx_refit.errors import StoreLockedError
from onnx_refit.serve.auth import Need, need_of
from onnx_refit.serve.errors import SettingsError
from onnx_refit.serve.openapi import description
from onnx_refit.serve.settings import Settings
from onnx_refit.serve.spool import Spool
from tests.serve.conftest import TOKEN
from tests.serve.models import affine_weights

pytestmark = pytest.mark.serve
BODY = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
INFER = "/v2/models/affine/infer"
REFIT = "/v2/models/affine/refit"
INFER_TOKEN = "another-good-secret-here"


def raw(server, data, *, seconds=60.0):
    """Send bytes as they are; everything that comes back until the server closes or falls silent."""
    with server.connect() as connection:
        connection.settimeout(seconds)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        answer = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
                if b"\r\n\r\n" in answer and b"HTTP/1.1 100" not in answer:
                    break
    return answer


def admin_paths():
    for path, methods in description()["paths"].items():
        for method, operation in methods.items():
            if "security" in operation:
                yield method.upper(), path.format(model="affine", id="0" * 16, version=1)


@pytest.mark.parametrize("method,path", list(admin_paths()))
def test_refit_verbs_need_the_token(server, method, path):
    assert server.ask(method, path, b"x" if method != "GET" else None, token=None)[0] == 401
    for wrong in (TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "Basic", "\xff"):
        assert server.ask(method, path, b"x" if method != "GET" else None, token=wrong)[0] == 403


def test_no_description_forgets_its_lock():
    """Whatever is under /refit or changes the repository is locked, by the rule and in the description."""
    for path, methods in description()["paths"].items():
        locked = "/refit" in path or path.endswith(("load", "unload"))
        assert (need_of(path.format(model="m", id="1", version="2")) is Need.ADMIN) == locked, path
        assert all(("security" in operation) == locked for operation in methods.values()), path
    assert need_of("/v2/models/m/refit/anything") is Need.ADMIN
    assert need_of("/something/new") is Need.ADMIN


def test_without_a_token_there_are_no_refits(start, plan):
    running = start(plan, env={"ONNX_REFIT_TOKEN": ""})
    assert running.ask("POST", REFIT + "/rollback", {}, token="x")[0] == 403
    assert running.infer() == (1.0, 1)


def test_inference_may_need_a_token_too(start, plan):
    running = start(plan, "--grpc-port", "0", env={"ONNX_REFIT_INFER_TOKEN": INFER_TOKEN})
    for token, status in ((None, 401), ("wrong", 403), (INFER_TOKEN, 200), (TOKEN, 200)):
        assert running.ask("POST", INFER, BODY, token=token)[0] == status
    assert running.ask("GET", REFIT, token=INFER_TOKEN)[0] == 403
    assert running.ask("GET", "/metrics", token=None, raw=True)[0] == 401
    assert running.ask("GET", "/v2/health/ready", token=None)[0] == 200
    grpc = pytest.importorskip("grpc")
    from onnx_refit.serve.proto import messages

    with grpc.insecure_channel(running.grpc) as channel:
        call = channel.unary_unary(
            f"/{messages.SERVICE}/ServerMetadata",
            messages.ServerMetadataRequest.SerializeToString,
            messages.ServerMetadataResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as refused:
            call(messages.ServerMetadataRequest(), timeout=60)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", f"Bearer {INFER_TOKEN}"),)
        assert call(messages.ServerMetadataRequest(), metadata=metadata, timeout=60).name == "onnx-refit"


def test_short_tokens_are_refused():
    with pytest.raises(SettingsError):
        Settings(admin_token="short")


def test_it_listens_on_loopback_only(server):
    assert server.url.startswith("http://127.0.0.1:")
    assert server.grpc.startswith("127.0.0.1:")
    own = {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in own:
        with pytest.raises(OSError):
            socket.create_connection((address, server.address[1]), timeout=2).close()


def test_bodies_are_bounded(start, plan):
    running = start(plan, "--max-body-mb", "1", "--max-upload-mb", "2")
    assert running.ask("POST", INFER, b" " * 1_000_001)[0] == 413
    assert running.ask("POST", REFIT + "/stage", b"x" * 2_000_001)[0] == 413
    # Without a length announced, the bound must hold for what comes.
    piece = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    for path, count in ((INFER, 40), (REFIT + "/stage", 80)):
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\ntransfer-encoding: chunked\r\n\r\n"
        assert b" 413 " in raw(running, head.encode() + piece * count + b"0\r\n\r\n").split(b"\r\n")[0]
    assert running.infer() == (1.0, 1)


def test_headers_are_bounded(server):
    assert b" 431 " in raw(server, b"GET /v2 HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 200_000)
    many = b"".join(b"x%d: y\r\n" % number for number in range(20_000))
    assert b" 431 " in raw(server, b"GET /v2 HTTP/1.1\r\nhost: x\r\n" + many)
    assert b" 431 " in raw(server, b"GET /" + b"a" * 200_000)
    assert b" 404 " in raw(server, b"GET /" + b"a" * 2_000 + b" HTTP/1.1\r\nauthorization: Bearer "
                           + TOKEN.encode() + b"\r\nhost: x\r\n\r\n")  # fmt: skip


@pytest.mark.slow
def test_slow_headers_are_cut_off(server):
    with server.connect() as connection:
        connection.settimeout(60)
        connection.sendall(b"GET /v2 HTTP/1.1\r\nhost: x\r\n")
        started = time.monotonic()
        assert connection.recv(1) == b""
        assert 5 < time.monotonic() - started < 60


def test_no_path_of_a_client_is_opened(server, tmp_path):
    """Names with dots and slashes find no file, and an ONNX model cannot bring one in."""
    import onnx

    secret = tmp_path / "secret"
    secret.write_bytes(b"\0" * 64)
    for name in ("..", "%2e%2e%2fetc", "%2Fetc%2Fpasswd", "affine%00", str(secret).replace("/", "%2f")):
        assert server.ask("GET", f"/v2/models/{name}")[0] in (403, 404)
        assert server.ask("GET", f"{REFIT}/staged/{name}")[0] in (403, 404)
    for location in (str(secret), "../secret", "weights"):
        model = onnx.load_from_string(_with_external("w", location))
        del model.graph.input[:]
        status, _, answer = server.ask("POST", REFIT + "/stage", model.SerializeToString())
        assert status == 422, answer
        assert "rejected" not in answer or answer["report"]["rejected"], answer


def _with_external(name, location):
    from onnx import TensorProto, helper

    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "64")):
        tensor.external_data.add(key=key, value=value)
    bias = helper.make_tensor("b", TensorProto.FLOAT, [4], [1, 1, 1, 1])
    return helper.make_model(helper.make_graph([], "g", [], [], [tensor, bias])).SerializeToString()


def test_a_client_that_goes_away_leaves_nothing(start, plan, tmp_path):
    running = start(plan, "--spool", tmp_path / "spool")
    head = (
        f"POST {REFIT}/stage HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\ncontent-length: 90000000\r\n\r\n"
    )
    with running.connect() as connection:
        connection.sendall(head.encode() + b"x" * 9_000_000)
        _wait(lambda: list((tmp_path / "spool").glob("upload-*")))
    _wait(lambda: not list((tmp_path / "spool").glob("upload-*")))
    assert running.infer() == (1.0, 1)


def test_a_spool_serves_one_server_and_is_swept(tmp_path):
    spool = Spool(tmp_path)
    with pytest.raises(StoreLockedError):
        Spool(tmp_path)
    spool.close()
    (tmp_path / "upload-left").mkdir()
    (tmp_path / "kept").mkdir()
    Spool(tmp_path).close()
    assert {entry.name for entry in tmp_path.iterdir()} == {"lock", "kept"}


def _wait(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def test_logs_are_json_and_hold_no_secrets(server):
    marker = 12345.678
    request = {"id": "visible-to-none", "inputs": [{**BODY["inputs"][0], "data": [marker] * 4}]}
    assert server.ask("POST", INFER, request, {"x-request-id": "find-me-1"})[0] == 200
    assert server.ask("POST", INFER, {"inputs": []}, {"x-request-id": "find-me-2"})[0] == 400
    _wait(lambda: any(entry.get("request_id") == "find-me-2" for entry in server.log))
    (good,) = [entry for entry in server.log if entry.get("request_id") == "find-me-1"]
    assert good["status"] == 200
    assert good["path"] == INFER
    assert good["seconds"] > 0
    (bad,) = [entry for entry in server.log if entry.get("request_id") == "find-me-2"]
    assert "missing" in bad["error"]
    for line in server.output.splitlines():
        json.loads(line)
        assert TOKEN not in line
        assert str(marker) not in line


def test_tls(start, plan, tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("openssl cannot make a certificate here")
    running = start(plan, "--tls-cert", certificate, "--tls-key", key)
    assert running.url.startswith("https://")
    trusting = ssl.create_default_context(cafile=certificate)
    with urllib.request.urlopen(running.url + "/v2", context=trusting, timeout=60) as answer:
        assert json.load(answer)["name"] == "onnx-refit"
    with pytest.raises(OSError):
        urllib.request.urlopen(running.url + "/v2", timeout=60)


def test_fuzzed_requests_never_break_it(server):
    """A few thousand mutations of good requests, raw on the wire: refused or answered, never a 5xx, never a crash."""
    rng = random.Random(7)
    body = json.dumps(BODY).encode()
    binary = json.dumps(
        {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}]}
    ).encode()
    weights = save(affine_weights(1.0))
    seeds = [
        (INFER, body, {}),
        (INFER, binary + b"\0" * 16, {"inference-header-content-length": str(len(binary))}),
        (REFIT + "/stage", weights, {}),
        (REFIT + "/rollback", b'{"to": 1}', {}),
        (REFIT + "/traffic", b'{"1": 1}', {}),
        (REFIT + "/staged/0123456789abcdef/canary", body, {}),
        ("/v2/repository/index", b"{}", {}),
    ]
    seen = set()
    for _ in range(1500):
        path, content, headers = rng.choice(seeds)
        mutated = bytearray(content)
        for _ in range(rng.choice((0, 1, 1, 2, 8))):
            at = rng.randrange(len(mutated) or 1)
            action = rng.randrange(4)
            if action == 0 and mutated:
                mutated[at % len(mutated)] = rng.randrange(256)
            elif action == 1:
                mutated[at:at] = rng.randbytes(rng.randrange(1, 9))
            elif action == 2:
                del mutated[at : at + rng.randrange(1, 9)]
            else:
                mutated[at:at] = rng.choice((b"[", b"{", b"1e999", b"null", b"-1", b"\\u0000", b"9" * 30, b'"'))
        sent = {name: str(int(value) + rng.choice((0, 0, 1, -1, 1 << 40))) for name, value in headers.items()}
        method = "PUT" if path.endswith("traffic") else "POST"
        status = server.ask(method, path, bytes(mutated), sent, raw=True)[0]
        seen.add(status)
        assert status < 500, (path, bytes(mutated), sent)
    assert {200, 400, 422} <= seen
    assert server.infer()[0] == 1.0
    # The wire itself: request lines, header ends, lengths and chunks that are none.
    for junk in (
        b"\0" * 100,
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ):
        first = raw(server, junk, seconds=2).split(b"\r\n")[0]
        assert not first or b" 4" in first, (junk, first)
    assert server.infer()[0] == 1.0


def test_schemathesis(server):
    """Requests generated from the OpenAPI description: none may give a 5xx or an answer that is not described."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    operations = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path.endswith("/events"):
            continue
        operations += 1

        @settings(
            max_examples=15,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case):
            case.path_parameters = {**(case.path_parameters or {}), "model": "affine"}
            case.headers = {**(case.headers or {}), "authorization": f"Bearer {TOKEN}"}
            answer = case.call(timeout=60)
            described = {int(code) for code in case.operation.definition.raw["responses"]}
            taken_offline = answer.status_code == 503
            assert answer.status_code < 500 or taken_offline, (case.method, case.path, answer.text)
            assert answer.status_code in described, (case.method, case.path, answer.status_code)

        try:
            check()
        finally:
            server.ask("POST", "/v2/repository/models/affine/load", {})
    assert operations > 25
