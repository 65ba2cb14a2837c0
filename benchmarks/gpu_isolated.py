"""What compiles, in processes of their own: TorchInductor and AOTInductor as peers, and our own way through Inductor.

    python -m benchmarks.gpu_isolated --case encoder --input S=16 --kind compile

Prints lines of JSON, of which the last counts. In its own process because a compiler that fails on a GPU (an illegal
access) takes the whole process with it. Processes compile side by side; they are timed one after the other, once all
have compiled.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import CASES, Case
from benchmarks.gpu_case import Measured
from benchmarks.gpu_peers import synchronised, tf32
from benchmarks.measure import once
from onnx_refit.tensors import Array

BATCHES: Mapping[str, Sequence[int]] = {"resnet18": (32,)}
NAMES = {
    "compile": "torch.compile, reduce-overhead",
    "autotune": "torch.compile, max-autotune",
    "aoti": "AOTInductor",
    "ours": "ours, Inductor",
}
_SECONDS = 150


def inputs_of(name: str, case: Case) -> dict[str, Mapping[str, Array]]:
    """Label -> inputs, larger batches among them."""
    inputs = dict(case.inputs)
    for rows in BATCHES.get(name, ()):
        first = next(iter(case.inputs.values()))
        inputs[f"b={rows}"] = {key: np.repeat(array, rows, axis=0) for key, array in first.items()}
    return inputs


def run_all(jobs: Sequence[tuple[str, str, str]], device: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Run (case, input, kind) in processes; (case, input) -> name -> what came back."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    if not jobs:
        return found
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(jobs)) as pool:
        place = Path(folder)
        (place / "lock").touch()
        results = [pool.submit(_child, *job, device, place, index) for index, job in enumerate(jobs)]
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline:
            ready = len(list(place.glob("ready*")))
            if ready + sum(result.done() for result in results) >= len(jobs):
                break
            time.sleep(0.2)
        (place / "go").touch()
        for (case, label, kind), result in zip(jobs, results, strict=True):
            found.setdefault((case, label), {})[NAMES[kind]] = result.result()
    return found


def _child(case: str, label: str, kind: str, device: str, place: Path, index: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu_isolated", "--case", case, "--input", label, "--kind", kind]
    command += ["--device", device, "--place", str(place), "--index", str(index)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * _SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {2 * _SECONDS} s"}
    lines = done.stdout.strip().splitlines()
    failed = f"exit code {done.returncode}: {done.stderr.strip()[-600:]}"
    if lines:
        result: dict[str, Any] = json.loads(lines[-1])
        return result if done.returncode == 0 else {**result, "constant update failed": failed}
    return {"failed": failed}


def main() -> None:
    """One process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", required=True)
    parser.add_argument("--input", required=True)
    parser.add_argument("--kind", choices=sorted(NAMES), required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--place", type=Path, help="a folder through which processes agree on when to be timed")
    parser.add_argument("--index", type=int, default=0)
    chosen = parser.parse_args()
    case = CASES[chosen.case]()
    inputs = inputs_of(chosen.case, case)[chosen.input]
    started = time.perf_counter()
    with torch.no_grad(), tf32(False):
        make = {"compile": compiled, "autotune": compiled, "aoti": ahead, "ours": ours}[chosen.kind]
        call, update = make(case, inputs, chosen.device, chosen.kind)
        for _ in range(3):
            call()
        seconds = time.perf_counter() - started
        with alone(chosen.place, chosen.index):
            for _ in range(20):
                call()
            taken = statistics.median(once(call) for _ in range(200))
            result: dict[str, Any] = {"microseconds": round(taken * 1e6, 2), "seconds to build": round(seconds, 2)}
            if update is not None:
                print(json.dumps(result), flush=True)  # should the update take the process with it
                update()
                result["microseconds of a constant update"] = round(
                    statistics.median(once(update) for _ in range(10)) * 1e6, 1
                )
    print(json.dumps(result))


@contextmanager
def alone(place: Path | None, index: int) -> Iterator[None]:
    """Wait until all processes are ready, then for this one's turn."""
    if place is None:
        yield
        return
    (place / f"ready{index}").touch()
    while not (place / "go").exists():
        time.sleep(0.05)
    with (place / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


Made = tuple[Callable[[], object], Callable[[], object] | None]


def _module(case: Case, inputs: Mapping[str, Array], device: str) -> tuple[Any, list[Any]]:
    if case.module is None:
        raise SystemExit("the case has no PyTorch module")
    return case.module.eval().to(device), [torch.from_numpy(np.array(array)).to(device) for array in inputs.values()]


def compiled(case: Case, inputs: Mapping[str, Array], device: str, kind: str) -> Made:
    """``torch.compile`` with CUDA graphs; outputs cloned, because the next call overwrites them."""
    module, x = _module(case, inputs, device)
    made = torch.compile(module, mode="max-autotune" if kind == "autotune" else "reduce-overhead", dynamic=False)
    return synchronised(lambda: made(*x).clone(), device), None


def ahead(case: Case, inputs: Mapping[str, Array], device: str, kind: str) -> Made:
    """AOTInductor, and its update of constants from weights on the device."""
    module, x = _module(case, inputs, device)
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(module, tuple(x)), package_path=str(Path(tempfile.mkdtemp()) / "model.pt2")
    )
    made = torch._inductor.aoti_load_package(package)
    known = set(made.get_constant_fqns())
    constants = {
        name: tensor for name, tensor in (*module.named_parameters(), *module.named_buffers()) if name in known
    }
    update = synchronised(lambda: made.load_constants(constants, check_full_update=False), device)
    return synchronised(lambda: made(*x), device), update


def ours(case: Case, inputs: Mapping[str, Array], device: str, kind: str) -> Made:
    """Our engine by way of TorchInductor."""
    measured = Measured(case, device)
    backend = measured.backend(inductor=True)
    held = backend.derive(measured.weights)
    tensors = {name: torch.from_numpy(array).to(device) for name, array in measured.feeds(inputs).items()}
    return lambda: backend.run_tensors(held, tensors), None


if __name__ == "__main__":
    main()
