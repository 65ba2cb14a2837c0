"""Back-pressure, deadlines, stopping, metrics, traces: a server under more load than it can take, and at its end."""

import signal
import socket
import sys
import threading
import time
from typing import Any

import pytest

import onnx_refit
from onnx_refit.serve.client import RefitClient
from tests.serve.conftest import TOKEN
from tests.serve.models import affine, slow

pytest.importorskip("uvicorn")
pytestmark = pytest.mark.serve
SECOND = (
    400_000  # turns of the slow model's loop, about, on a machine that does nothing else: half of one if it is quick
)
LONG, ENDLESS = 10 * SECOND, 200 * SECOND  # so that others see its state; until something else ends it
PATIENT = ("--request-seconds", "120", "--drain-seconds", "120")  # a busy machine may take its time over long ones


@pytest.fixture(scope="module")
def slow_plan(tmp_path_factory):
    return onnx_refit.build(slow(1.0)).save(tmp_path_factory.mktemp("slow") / "slow.plan")


def body(turns, **parameters):
    return {
        "inputs": [
            {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 1, 1, 1]},
            {"name": "n", "shape": [], "datatype": "INT64", "data": [turns]},
        ],
        "parameters": parameters,
    }


class Asking(threading.Thread):
    """One request, in the background."""

    def __init__(self, running, turns, **parameters):
        super().__init__()
        self.arguments = ("POST", "/v2/models/slow/infer", body(turns, **parameters))
        self.running, self.seconds = running, 0.0
        self.result: tuple[int, Any, Any] = (0, {}, None)
        self.start()

    def run(self):
        started = time.monotonic()
        try:
            self.result = self.running.ask(*self.arguments, token=None)
        except (OSError, ValueError) as error:
            self.result = (0, {}, str(error))
        self.seconds = time.monotonic() - started

    @property
    def status(self):
        self.join(150)
        return self.result[0]


def load(running):
    status = RefitClient(running.url, TOKEN).status("slow")
    return status["running"], status["waiting"]


def refused(running):
    """Whether a new connection is turned away."""
    try:
        with socket.create_connection(running.address, timeout=1) as connection:
            connection.sendall(b"GET /v2 HTTP/1.1\r\nhost: x\r\n\r\n")
            return not connection.recv(1)
    except OSError:
        return True


def until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def test_a_full_queue_answers_429_at_once(start, slow_plan):
    running = start(slow_plan, "--queue", "2", *PATIENT)
    first = Asking(running, LONG)
    until(lambda: load(running) == (1, 0))
    waiting = [Asking(running, 1), Asking(running, 1)]
    until(lambda: load(running) == (1, 2))
    refused = Asking(running, 1)
    assert refused.status == 429
    assert first.is_alive(), "it was answered while the others still were not"
    assert refused.result[1]["retry-after"] == "1"
    assert "2 are waiting" in refused.result[2]["error"]
    assert [first.status, *(one.status for one in waiting)] == [200, 200, 200]


def test_a_deadline_is_kept_while_waiting_and_while_running(start, slow_plan):
    running = start(slow_plan, *PATIENT)
    first = Asking(running, LONG)
    until(lambda: load(running) == (1, 0))
    waiting = Asking(running, 1, timeout=100_000)
    assert waiting.status == 504
    assert first.is_alive(), "it was told while it waited, not when its turn came"
    assert first.status == 200
    strict = start(slow_plan, "--request-seconds", "1")
    longest = Asking(strict, ENDLESS)
    assert longest.status == 504
    assert 0.9 < longest.seconds < 30
    strict.process.kill()


def test_sigterm_lets_running_requests_finish(start, slow_plan):
    running = start(slow_plan, "--grpc-port", "0", *PATIENT)
    asking = [Asking(running, LONG)]
    until(lambda: load(running) == (1, 0))
    asking.append(Asking(running, 1))
    until(lambda: load(running) == (1, 1))
    # A connection that is open but asks nothing must not keep it alive.
    idle = running.connect()
    running.process.send_signal(signal.SIGTERM)
    until(lambda: any(entry["message"] == "stopping" for entry in running.log))
    until(lambda: refused(running))
    assert [one.status for one in asking] == [200, 200]
    assert running.process.wait(60) == 0
    assert running.log[-1]["message"] == "stopped"
    idle.close()


def test_it_does_not_wait_longer_than_told(start, slow_plan):
    running = start(slow_plan, "--drain-seconds", "1")
    asking = Asking(running, ENDLESS)
    until(lambda: load(running) == (1, 0))
    running.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert running.process.wait(60) == 1
    assert time.monotonic() - started < 40
    assert running.log[-1]["message"] == "stopped while inferences were still running"
    assert asking.status in (0, 500, 503)


def test_a_second_signal_ends_it_at_once(start, slow_plan):
    running = start(slow_plan)
    Asking(running, ENDLESS)
    until(lambda: load(running) == (1, 0))
    running.process.send_signal(signal.SIGTERM)
    until(lambda: any(entry["message"] == "stopping" for entry in running.log))
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(60) == -signal.SIGTERM


def test_without_the_extra_it_is_said_which(monkeypatch):
    from onnx_refit.errors import MissingExtraError
    from onnx_refit.serve.extras import require_serve

    require_serve()
    for module, package in (("starlette", "starlette"), ("grpc", "grpcio")):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, module, None)
            with pytest.raises(MissingExtraError, match=f"{package}.*onnx-refit\\[serve\\]"):
                require_serve()


def test_a_taken_port_is_said_in_words(server, plan, start):
    with pytest.raises(AssertionError, match="cannot listen on 127"):
        start(plan, "--port", server.address[1], "--no-access-log")


def test_metrics(start, plan, weights):
    running = start(plan, "--batch", "8")
    client = RefitClient(running.url, TOKEN)
    for _ in range(3):
        running.infer(rows=2)
    running.ask("POST", "/v2/models/affine/infer", {"inputs": []})
    staged = client.stage("affine", weights(2))
    client.canary("affine", staged["id"], [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1] * 4}])
    client.commit("affine", staged["id"])
    running.infer()
    text = running.ask("GET", "/metrics", raw=True)[2].decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    for sample, value in {
        'requests_total{code="200",model="affine",protocol="http"}': 4,
        'requests_total{code="400",model="affine",protocol="http"}': 1,
        'answers_total{model="affine",version="1"}': 3,
        'answers_total{model="affine",version="2"}': 1,
        'version{model="affine"}': 2,
        'refits_total{model="affine",result="committed"}': 1,
        'canaries_total{model="affine",result="passed"}': 1,
        'upload_bytes_total{model="affine"}': weights(2).stat().st_size,
        'weight_bytes{model="affine"}': 80,
        'request_duration_seconds_count{model="affine",protocol="http"}': 5,
        'batch_rows_sum{model="affine"}': 7,
        'queue_depth{model="affine"}': 0,
        'refit_stage_duration_seconds_count{model="affine",stage="derive"}': 1,
        'refit_stage_duration_seconds_count{model="affine",stage="commit"}': 1,
        "ready": 1,
    }.items():
        assert float(values[f"onnx_refit_{sample}"]) == value, sample
    assert all(name.startswith("onnx_refit_") for name in values)


def test_series_of_versions_that_are_gone_go_too(start, plan, weights):
    running = start(plan, "--keep", "2")
    client = RefitClient(running.url, TOKEN)
    for step in range(6):
        client.commit("affine", client.stage("affine", weights(2 + step % 2))["id"])
        running.infer()
    text = running.ask("GET", "/metrics", raw=True)[2].decode()
    series = {
        line.partition("version=")[2][1] for line in text.splitlines() if line.startswith("onnx_refit_answers_total")
    }
    assert series == {"6", "7"}


@pytest.mark.parametrize("mixed", [False, True])
def test_batching_only_where_rows_are_independent(mixed):
    from onnx_refit.serve.batching import why_not_batchable

    with onnx_refit.load(onnx_refit.build(affine(1.0, mix_rows=mixed))) as engine:
        reason = why_not_batchable(engine)
    assert (reason is not None) == mixed
    assert not mixed or "differs when rows run together" in str(reason)


def test_only_what_is_known_to_be_quick_runs_on_the_event_loop():
    import numpy as np

    from onnx_refit.serve.fastpath import FastPath

    path = FastPath(affine(1.0))
    small, large = (path.key({"x": np.zeros((rows, 4), np.float32)}) for rows in (1, 100))
    assert small != large
    for _ in range(7):
        path.note(small, 1e-5)
    assert not path.quick(small), "too few to rely on"
    path.note(small, 1e-5)
    assert path.quick(small)
    assert not path.quick(large), "another shape takes another time"
    path.note(small, 1.0)
    assert not path.quick(small)
    for _ in range(100):
        path.note(small, 1e-5)
    assert path.quick(small), "one slow one may have been a busy moment"
    # A loop that counts to a value of the input: no shape bounds it.
    assert FastPath(slow(1.0)).key({"x": np.zeros((1, 4), np.float32)}) is None
    assert path.key({"x": np.array(["text"], object)}) is None


def test_several_models(start, plan, slow_plan):
    running = start(plan, f"other={slow_plan}")
    assert running.ask("GET", "/v2/models", token=None)[2] == {"models": ["affine", "other"]}
    assert running.infer() == (1.0, 1)
    assert running.ask("POST", "/v2/models/other/infer", body(1), token=None)[2]["outputs"][0]["data"] == [2.0] * 4
