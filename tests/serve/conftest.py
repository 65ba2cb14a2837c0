"""A real server in a process of its own, and what the tests ask of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import pytest

import onnx_refit
from tests.serve.models import affine, affine_weights

TOKEN = "correct-horse-battery-staple"
_RUN = "import sys; from onnx_refit.cli.serving import serve_command; serve_command(sys.argv[1:])"


class Running:
    """A server process; ``ask`` speaks to it."""

    def __init__(self, *arguments, env=None):
        # A file, not a pipe: a pipe that nobody reads would fill up and stop the server.
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", _RUN, "--port", "0", *map(str, arguments)],
            stderr=self._output,
            env={**os.environ, "ONNX_REFIT_TOKEN": TOKEN, **(env or {})},
        )
        self.url = self.grpc = ""
        deadline = time.monotonic() + 60
        while not self.url:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(self.output)
            time.sleep(0.02)
            for entry in self.log:
                if entry["message"] == "serving":
                    self.url, self.grpc = entry["http"], entry["grpc"]

    @property
    def output(self):
        """What it wrote so far."""
        return os.pread(self._output.fileno(), 1 << 26, 0).decode()

    @property
    def log(self):
        """The complete lines of its log."""
        lines = self.output.splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]

    @property
    def address(self):
        host, _, port = self.url.partition("://")[2].rpartition(":")
        return host, int(port)

    def ask(self, method, path, body=None, headers=None, token=TOKEN, raw=False):
        """Status, headers, and the JSON (or bytes) of the answer."""
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        request = urllib.request.Request(self.url + path, data, headers or {}, method=method)
        if token:
            request.add_header("authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                status, found, content = answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            status, found, content = error.code, error.headers, error.read()
        return status, found, content if raw else json.loads(content)

    def infer(self, value=1.0, *, model="affine", rows=1, headers=None, version=None):
        """The scale of the weights that answered, and the version the server says it was."""
        path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"
        tensor = {"name": "x", "shape": [rows, 4], "datatype": "FP32", "data": [value] * 4 * rows}
        status, found, answer = self.ask("POST", path, {"inputs": [tensor]}, headers, token=None)
        assert status == 200, answer
        assert found["onnx-refit-version"] == answer["model_version"]
        return answer["outputs"][0]["data"][0] / (value + 1), int(answer["model_version"])

    def connect(self):
        return socket.create_connection(self.address, timeout=30)

    def stop(self, number=signal.SIGTERM):
        """Signal it and wait; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@pytest.fixture(scope="session")
def plan(tmp_path_factory):
    """The plan of an affine model with scale 1."""
    return onnx_refit.build(affine(1.0)).save(tmp_path_factory.mktemp("plans") / "affine.plan")


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Files of weights by scale."""
    from safetensors.numpy import save_file

    directory = tmp_path_factory.mktemp("weights")

    def weights(scale):
        path = directory / f"scale{scale}.safetensors"
        if not path.exists():
            save_file(affine_weights(scale), path)
        return path

    return weights


@pytest.fixture
def start():
    """Start servers that end with the test."""
    pytest.importorskip("uvicorn")
    started = []

    def start(*arguments, env=None):
        started.append(Running(*arguments, env=env))
        return started[-1]

    yield start
    for running in started:
        running.stop()


@pytest.fixture(scope="module")
def server(plan):
    """One server for all tests of a module that leave its versions alone or do not mind them."""
    pytest.importorskip("uvicorn")
    running = Running(plan, "--grpc-port", "0", "--keep", "3")
    yield running
    assert running.stop() == 0, running.output
    assert not [entry for entry in running.log if entry["level"] == "error"], "it met what it did not foresee"
