"""Measure and write: ``python -m benchmarks.run [CASE...]`` fills benchmarks/results and the README's tables."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx

from benchmarks.cases import CASES
from benchmarks.cpu import measure_case
from benchmarks.growth import growth
from benchmarks.measure import machine
from benchmarks.render import render
from onnx_refit.files import write_text

RESULTS = Path(__file__).parent / "results"


def memory_of(model: onnx.ModelProto) -> dict[str, float]:
    """Memory figures, taken in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        run = [sys.executable, "-m", "benchmarks.memory", str(path)]
        done = subprocess.run(run, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main() -> None:
    """Take all figures, one case after another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help="which cases (all)")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each race of one case")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-growth", action="store_true")
    parser.add_argument("--only-growth", action="store_true")
    arguments = parser.parse_args()
    path = RESULTS / "cpu.json"
    results = json.loads(path.read_text()) if path.exists() and arguments.cases else {"cases": {}}
    results["machine"] = machine()
    for name in () if arguments.only_growth else arguments.cases or CASES:
        case = CASES[name]()
        rows = []
        for threads in arguments.threads:
            rows.append(
                measure_case(
                    case,
                    threads,
                    peers_too=not arguments.no_peers and threads == min(arguments.threads),
                    seconds=arguments.seconds,
                )
            )
            print(json.dumps(rows[-1]), flush=True)
        results["cases"][name] = {"rows": rows, "memory": memory_of(case.model)}
        print(name, results["cases"][name]["memory"], flush=True)
        write_text(path, json.dumps(results, indent=1) + "\n")
    if arguments.only_growth or not (arguments.no_growth or arguments.cases):
        figures = {"machine": machine(), **growth()}
        write_text(RESULTS / "growth.json", json.dumps(figures, indent=1) + "\n")
    render()


if __name__ == "__main__":
    main()
