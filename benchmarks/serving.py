"""Requests a second and latency of the server beside its peers, and while new weights are committed every second.

    python -m benchmarks.serving --peers FOLDER --output benchmarks/results/serving.json

``FOLDER`` gets an environment for each peer (pip installs them where they are not there yet); without it only our own
server is measured. The load generators are wrk (HTTP) and h2load (gRPC, from nghttp2), which have to be installed.
All servers of a model are up at once with one inference thread each; only one is asked at a time, their rounds
alternate, and medians are taken, because other work on the machine hits all of them alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

import onnx_refit
from benchmarks.measure import machine
from benchmarks.serving_commits import under_commits
from benchmarks.serving_load import Requests, Round, make_requests, one_round, summary
from benchmarks.serving_network import network
from benchmarks.serving_servers import SERVERS, Running, Server, make_environments, running, versions
from onnx_refit.tensors import Array

CLIENTS = (1, 8, 64)
FORMS = ("json", "binary", "grpc")
ROUND_SECONDS = 1


@dataclass(frozen=True)
class Case:
    """A model that is served.

    Attributes:
        title: what the tables call it.
        model: it, weights included.
        inputs: one request.
        batches: whether rows of requests may run together.
    """

    title: str
    model: onnx.ModelProto
    inputs: Mapping[str, Array]
    batches: bool


def _dense(width: int, hidden: int, title: str) -> Case:
    x = np.random.default_rng(9).standard_normal((1, width)).astype(np.float32)
    return Case(title, network(width, hidden, 0)[0], {"x": x}, batches=True)


def _bidaf() -> Case:
    """The bundled BiDAF, prepared: 30 words of context, 8 of question."""
    from onnx_refit.model.prepare import prepare
    from onnx_refit.samples.bidaf.bundle import bundled_model

    model = prepare(bundled_model()).model
    rng = np.random.default_rng(0)
    inputs = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        words = 30 if kind.shape.dim[0].dim_param in ("c", "context") else 8
        shape = [dimension.dim_value or words for dimension in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        inputs[value.name] = rng.integers(1, 50 if len(shape) == 4 else 2000, shape).astype(dtype)
    return Case("BiDAF, 30 words", model, inputs, batches=False)


CASES: Mapping[str, Callable[[], Case]] = {
    "tiny": lambda: _dense(8, 16, "8-16-8, 1 kB"),
    "dense": lambda: _dense(512, 2048, "512-2048-512, 8 MB"),
    "bidaf": _bidaf,
}


def _write(case: Case, folder: Path) -> Requests:
    onnx.save(case.model, folder / "model.onnx")
    onnx_refit.build(case.model).save(folder / "model.plan")
    return make_requests(case.inputs, folder)


def beside_peers(case: Case, pythons: Mapping[str, Path], rounds: int) -> dict[str, object]:
    """One model behind every server: form -> clients -> server -> figures."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        requests = _write(case, folder)
        up: dict[str, tuple[Server, Running]] = {}
        for server in SERVERS:
            python = Path(sys.executable) if server.package is None else pythons.get(server.package)
            if python is not None and (case.batches or not server.batched):
                up[server.name] = (server, stack.enter_context(running(server, python, folder, requests.json)))
        results: dict[str, object] = {}
        for form in FORMS:
            able = {name: place for name, (server, place) in up.items() if form in server.forms}
            for place in able.values():
                one_round(form, place, requests, 4, 1)
            table = {}
            for clients in CLIENTS:
                measured: dict[str, list[Round]] = {name: [] for name in able}
                for _ in range(rounds):
                    for name, place in able.items():
                        measured[name].append(one_round(form, place, requests, clients, ROUND_SECONDS))
                table[str(clients)] = {name: summary(found) for name, found in measured.items()}
                print(case.title, form, clients, json.dumps(table[str(clients)]), flush=True)
            results[form] = table
        return results


def main() -> None:
    """Take the figures, part by part; the file is written after each."""
    parts = [*CASES, "commits"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"which to take, the file keeps the others: {', '.join(parts)} (all)")
    parser.add_argument("--peers", type=Path, help="folder of the peers' environments")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--commit-rounds", type=int, default=3, help="rounds of the part commits")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    unknown = sorted(set(options.parts) - set(parts))
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}")
    # The servers end with the script, however it ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    packages = sorted({server.package for server in SERVERS if server.package is not None})
    pythons = {} if options.peers is None else make_environments(options.peers.absolute(), packages)
    there = options.output is not None and options.output.exists()
    kept = json.loads(options.output.read_text()) if options.parts and there else {}
    result = {"machine": machine(), "peers": versions(pythons) or kept.get("peers", {}), "cases": kept.get("cases", {})}
    result |= {"commits": kept["commits"]} if "commits" in kept else {}
    for name in options.parts or parts:
        about = {"rounds": options.rounds, "load_before": os.getloadavg()[0]}
        if name == "commits":
            result["commits"] = {**about, **under_commits(options.commit_rounds)}
        else:
            case = CASES[name]()
            result["cases"][name] = {
                "title": case.title,
                **about,
                "forms": beside_peers(case, pythons, options.rounds),
            }
        if options.output:
            options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
