"""What requests notice of new weights that are published every second.

Every request of a run is looked at by itself: those that began or ended while a
push was under way or shortly after it, and the rest, which are the idle server's. So both are taken from the same
seconds of the same machine, whatever else it does. What the client that pushes takes of the cores is in the figures;
to tell it from what the server does, one way gives it the lowest priority, as if it were on another machine.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from safetensors.numpy import save_file

import onnx_refit
from benchmarks.serving_load import make_requests
from benchmarks.serving_network import network
from benchmarks.serving_servers import SERVERS, TOKEN, Running, running
from onnx_refit.serve.client import RefitClient
from onnx_refit.tensors import Array

CLIENTS = (1, 8, 64)
SECONDS = 9
WIDTH, HIDDEN = 512, 2048
_MODEL = "model"
_STAGED = 3
# A push still shows for so long after its answer: caches are cold, and the client closes its connections.
_AFTER_SECONDS = 0.1

Actions = Iterator[Callable[[], object]]


@dataclass(frozen=True)
class Publisher:
    """A client that publishes weights every second.

    Attributes:
        title: what the tables call it.
        nice: its priority.
        prepare: what is done before; gives what is done second by second.
    """

    title: str
    nice: int
    prepare: Callable[[RefitClient, Path], Actions]


def _pushes(client: RefitClient, folder: Path) -> Actions:
    """Upload, check and commit weights that are not those that answer."""

    def push(seed: int) -> None:
        staged = client.stage(_MODEL, folder / f"{seed}.safetensors")
        if staged["state"] == "staged":
            client.commit(_MODEL, staged["id"])

    return itertools.cycle([partial(push, 1), partial(push, 2)])


def _commits(client: RefitClient, folder: Path) -> Actions:
    """Commit what was staged before, and roll it back, by turns; once all is committed, only roll back and forth."""
    newest = client.status(_MODEL)["versions"][-1]["number"]
    weights = network(WIDTH, HIDDEN, 3)[1]
    actions: list[Callable[[], object]] = []
    for number in range(_STAGED):
        weights["b2"][0] = newest * _STAGED + number  # or it would be known already
        save_file(weights, folder / "staged.safetensors")
        staged = client.stage(_MODEL, folder / "staged.safetensors")["id"]
        actions += [partial(client.commit, _MODEL, staged), partial(client.rollback, _MODEL)]
    return itertools.chain(actions, itertools.repeat(partial(client.rollback, _MODEL)))


PUBLISHERS: Mapping[str, Publisher] = {
    "pushes": Publisher("8 MB uploaded, checked and committed, the pushing client on the same cores", 0, _pushes),
    "pushes, nice": Publisher("the same, the pushing client at the lowest priority (nice 19)", 19, _pushes),
    "commits": Publisher("commits of weights that were pushed before, and rollbacks, by turns", 0, _commits),
}


def under_commits(rounds: int) -> dict[str, object]:
    """Way of publishing -> clients -> latencies of the idle server and of all requests, in seconds."""
    server = next(server for server in SERVERS if server.name == "onnx-refit, batches")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = network(WIDTH, HIDDEN, 0)[0]
        onnx.save(model, folder / "model.onnx")
        onnx_refit.build(model).save(folder / "model.plan")
        x = np.random.default_rng(9).standard_normal((1, WIDTH)).astype(np.float32)
        requests = make_requests({"x": x}, folder)
        for seed in (1, 2):
            save_file(network(WIDTH, HIDDEN, seed)[1], folder / f"{seed}.safetensors")
        place = stack.enter_context(running(server, Path(sys.executable), folder, requests.json))
        client = RefitClient(place.url.partition("/v2")[0], TOKEN)
        took: dict[str, list[float]] = {name: [] for name in PUBLISHERS}
        results: dict[str, dict[str, object]] = {name: {} for name in PUBLISHERS}
        for clients in CLIENTS:
            found: dict[str, list[dict[str, float]]] = {name: [] for name in PUBLISHERS}
            for _ in range(rounds):
                for name, publisher in PUBLISHERS.items():
                    found[name].append(_run(place, client, folder, clients, publisher, took[name]))
            for name, measured in found.items():
                results[name][str(clients)] = _over_rounds(measured)
                print(name, clients, json.dumps(results[name][str(clients)]), flush=True)
        ways = {
            name: {
                "title": publisher.title,
                "times": len(took[name]),
                "seconds": statistics.median(took[name]),
                "clients": results[name],
            }
            for name, publisher in PUBLISHERS.items()
        }
        return {"rounds": rounds, "seconds_a_round": SECONDS, "ways": ways}


def _over_rounds(measured: Sequence[dict[str, float]]) -> dict[str, object]:
    return {
        **{key: statistics.median(one[key] for one in measured) for key in measured[0]},
        "failed": sum(one["failed"] for one in measured),
        "p99_over_idle_rounds": sorted(one["p99_over_idle"] for one in measured),
    }


def _run(
    place: Running, client: RefitClient, folder: Path, clients: int, publisher: Publisher, took: list[float]
) -> dict[str, float]:
    log = folder / "requests.log"
    log.unlink(missing_ok=True)
    command = [
        "h2load", "--h1", f"-c{clients}", "-t1", f"-D{SECONDS}", "--warm-up-time=1", f"-d{folder / 'request.json'}",
        f"--log-file={log}", "-H", "content-type: application/json", place.url,
    ]  # fmt: skip
    actions = publisher.prepare(client, folder)
    load = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    moments: list[tuple[float, float]] = []
    # A thread of its own: a priority that was lowered cannot be raised again.
    publishing = threading.Thread(target=_publish, args=(actions, publisher.nice, moments))
    publishing.start()
    publishing.join()
    load.wait()
    if len(moments) < SECONDS // 2:
        raise RuntimeError(f"only {len(moments)} times were weights published")
    took += [after - before for before, after in moments]
    rows = np.loadtxt(log, dtype=np.int64, ndmin=2)
    good = rows[rows[:, 1] == 200]
    for start, status, took_us in rows[rows[:, 1] != 200]:
        print(f"failed: status {status} after {took_us} us, {(rows[:, 0].max() - start) / 1e6:.3f} s before the end")
    return {**_figures(good[:, 0] / 1e6, good[:, 2] / 1e6, moments), "failed": float(len(rows) - len(good))}


def _publish(actions: Actions, nice: int, moments: list[tuple[float, float]]) -> None:
    if nice:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
    time.sleep(2)
    end = time.monotonic() + SECONDS - 2
    while time.monotonic() < end:
        began = time.time()
        next(actions)()
        moments.append((began, time.time()))
        time.sleep(1)


def _figures(starts: Array, seconds: Array, pushes: Sequence[tuple[float, float]]) -> dict[str, float]:
    near = np.zeros(len(starts), bool)
    for before, after in pushes:
        near |= (starts + seconds > before) & (starts < after + _AFTER_SECONDS)
    idle, every = seconds[~near], seconds
    figures = {
        "idle_p50": np.percentile(idle, 50),
        "idle_p99": np.percentile(idle, 99),
        "p50": np.percentile(every, 50),
        "p99": np.percentile(every, 99),
        "near_p99": np.percentile(seconds[near], 99),
        "near_share": near.mean(),
        "rps": len(every) / (starts.max() - starts.min()),
    }
    return {key: float(value) for key, value in figures.items()} | {
        "p99_over_idle": float(figures["p99"] / figures["idle_p99"])
    }
