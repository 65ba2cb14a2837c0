"""The servers that are measured: how each is started, and which forms of a request it takes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PEERS = Path(__file__).parent / "serving_peers"
TOKEN = "benchmark-benchmark-benchmark"
ROWS = 16
_INFER = "/v2/models/model/infer"


@dataclass(frozen=True)
class Server:
    """A way to serve a model.

    Attributes:
        name: what the tables call it.
        package: which environment it runs in; None is this one.
        forms: what it takes: ``json``, ``binary`` (the protocol's extension), ``grpc``.
        path: of the inference over HTTP.
        batched: whether it forms batches; then only models with independent rows are for it.
        command: (python, folder, http port, grpc port) -> command.
    """

    name: str
    package: str | None
    forms: frozenset[str]
    path: str
    batched: bool
    command: Callable[[Path, Path, int, int], list[object]]


def _ours(*options: object) -> Callable[[Path, Path, int, int], list[object]]:
    def command(python: Path, folder: Path, http: int, grpc: int) -> list[object]:
        ports = ["--port", http, "--grpc-port", grpc]
        start = [python, "-m", "onnx_refit.cli.main", "serve", folder / "model.plan"]
        return [*start, *ports, "--threads", 1, "--no-access-log", *options]

    return command


def _mlserver(rows: int) -> Callable[[Path, Path, int, int], list[object]]:
    def command(python: Path, folder: Path, http: int, grpc: int) -> list[object]:
        place = folder / f"mlserver{rows}"
        place.mkdir()
        settings = {"host": "127.0.0.1", "parallel_workers": 0, "debug": False, "http_port": http, "grpc_port": grpc}
        (place / "settings.json").write_text(json.dumps({**settings, "metrics_port": free_port()}))
        model: dict[str, object] = {"name": "model", "implementation": "mlserver_peer.Peer"}
        if rows > 1:
            model |= {"max_batch_size": rows, "max_batch_time": 0.001}
        (place / "model-settings.json").write_text(json.dumps(model))
        for name in ("mlserver_peer.py", "peer_session.py"):
            shutil.copy(PEERS / name, place)
        return [python.parent / "mlserver", "start", place]

    return command


_JSON = frozenset({"json"})
SERVERS = (
    Server("onnx-refit", None, frozenset({"json", "binary", "grpc"}), _INFER, False, _ours()),
    Server("onnx-refit, batches", None, frozenset({"json", "binary", "grpc"}), _INFER, True, _ours("--batch", ROWS)),
    Server("MLServer", "mlserver", frozenset({"json", "grpc"}), _INFER, False, _mlserver(1)),
    Server("MLServer, batches", "mlserver", frozenset({"json", "grpc"}), _INFER, True, _mlserver(ROWS)),
    Server(
        "KServe",
        "kserve",
        frozenset({"json", "binary", "grpc"}),
        _INFER,
        False,
        lambda python, folder, http, grpc: [python, PEERS / "kserve_peer.py", http, grpc],
    ),
    Server(
        "BentoML",
        "bentoml",
        _JSON,
        "/infer",
        False,
        lambda python, folder, http, grpc: [
            *(python.parent / "bentoml", "serve", "bentoml_peer:Peer", "--working-dir", PEERS),
            *("--host", "127.0.0.1", "--port", http, "--api-workers", 1),
        ],
    ),
    Server(
        "LitServe",
        "litserve",
        _JSON,
        "/predict",
        False,
        lambda python, folder, http, grpc: [python, PEERS / "litserve_peer.py", http, 1],
    ),
    Server(
        "LitServe, batches",
        "litserve",
        _JSON,
        "/predict",
        True,
        lambda python, folder, http, grpc: [python, PEERS / "litserve_peer.py", http, ROWS],
    ),
)


@dataclass(frozen=True)
class Running:
    """Where a server listens."""

    url: str
    address: str
    process: int


def make_environments(folder: Path, packages: list[str]) -> dict[str, Path]:
    """An environment for every peer, made with pip where it is not there yet; package -> its interpreter.

    A peer that does not install is left out, with pip's last line on stderr.
    """
    pythons = {}
    for package in packages:
        home = folder / package
        python = home / "bin" / "python"
        if not (home / "installed").exists():
            venv.create(home, with_pip=True, clear=True)
            run = [str(python), "-m", "pip", "install", "--quiet", "-r", str(PEERS / f"{package}.txt")]
            done = subprocess.run(run, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{package} is left out: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                continue
            (home / "installed").touch()
        pythons[package] = python
    return pythons


def versions(pythons: Mapping[str, Path]) -> dict[str, str]:
    """Package -> version, of every peer and its ONNX Runtime."""
    found = {}
    for package, python in pythons.items():
        code = f"from importlib.metadata import version as v; print(v('{package}'), v('onnxruntime'))"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        own, runtime = done.stdout.split()
        found[package] = f"{own} (onnxruntime {runtime})"
    return found


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(server: Server, python: Path, folder: Path, body: bytes) -> Iterator[Running]:
    """A server process, ready to answer.

    Args:
        server: which.
        python: the interpreter of its environment.
        folder: where ``model.onnx`` and ``model.plan`` lie.
        body: a request in JSON that it must answer.

    Raises:
        RuntimeError: it does not, with the end of its log.
    """
    http, grpc = free_port(), free_port()
    log_path = folder / f"{server.name}.log"
    environment = {
        **os.environ,
        "PEER_MODEL": str(folder / "model.onnx"),
        "ONNX_REFIT_TOKEN": TOKEN,
        "PYTHONPATH": os.pathsep.join([str(PEERS), os.environ.get("PYTHONPATH", "")]),
        "BENTOML_DO_NOT_TRACK": "True",
    }
    command = [str(part) for part in server.command(python, folder, http, grpc)]
    with log_path.open("ab") as log:
        # A group that can be ended as a whole, but no session: Linux may share the cores out among sessions first, and
        # then no thread's priority would mean anything beside the load generator's.
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, process_group=0)
    try:
        url = f"http://127.0.0.1:{http}{server.path}"
        for _ in range(600):
            request = urllib.request.Request(url, body, {"content-type": "application/json"})
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200:
                    break
            if process.poll() is not None:
                raise RuntimeError(f"{server.name} ended: {log_path.read_text()[-2000:]}")
            time.sleep(0.1)
        else:
            raise RuntimeError(f"{server.name} does not answer: {log_path.read_text()[-2000:]}")
        yield Running(url, f"127.0.0.1:{grpc}", process.pid)
    finally:
        # The whole group: some leave their workers behind.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
