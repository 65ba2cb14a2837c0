"""How the cost of a refit grows with bytes and with the number of tensors.

Each size in a process of its own: ``python -m benchmarks.growth COUNT ROWS COLUMNS`` prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import onnx_refit
from benchmarks.measure import copy_seconds, once


def chain(count: int, rows: int, columns: int) -> onnx.ModelProto:
    """``count`` layers x @ W + b with W [rows, columns] (square where count > 1)."""
    rng = np.random.default_rng(0)
    nodes, tensors, value = [], [], "x"
    one = rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(np.sqrt(rows))
    for index in range(count):
        weight = one * np.float32(1 + index / 1024)
        bias = rng.standard_normal(columns, dtype=np.float32)
        tensors += [numpy_helper.from_array(weight, f"w{index}"), numpy_helper.from_array(bias, f"b{index}")]
        nodes.append(helper.make_node("Gemm", [value, f"w{index}", f"b{index}"], [f"v{index}"], name=f"layer{index}"))
        value = f"v{index}"
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", rows])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["N", columns])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def measure(count: int, rows: int, columns: int) -> dict[str, Any]:
    """Refit and copy seconds of one chain.

    A model of 2 GB takes about four times that: its weights twice on the caller's side, and twice in the engine.
    """
    plan = onnx_refit.build(chain(count, rows, columns))
    one = plan.require_weights()
    other = {name: array * np.float32(0.9) for name, array in one.items()}
    with onnx_refit.load(plan, keep=1) as engine:
        figures = [once(partial(engine.refit, one if turn % 2 else other)) for turn in range(11)]
    return {
        "bytes": plan.weight_bytes,
        "tensors": len(plan.refittable),
        "refit_seconds": statistics.median(figures[3:]),
        "copy_seconds": copy_seconds(other, 5),
    }


def _apart(count: int, rows: int, columns: int) -> dict[str, Any]:
    """``measure`` in a process of its own, whose memory is the system's again afterwards."""
    run = [sys.executable, "-m", "benchmarks.growth", str(count), str(rows), str(columns)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def by_bytes(sizes: Sequence[int] = (10, 30, 100, 300, 1000, 2000)) -> list[dict[str, Any]]:
    """Few large tensors: ``sizes`` in MB (10^6 bytes), in layers of up to 4096 x 4096."""
    rows = []
    for megabytes in sizes:
        width = min(4096, int((megabytes * 1e6 / 4 / 4) ** 0.5) // 16 * 16)
        rows.append(_apart(max(1, round(megabytes * 1e6 / 4 / width**2)), width, width))
    return rows


def by_tensors(counts: Sequence[int] = (1, 10, 100, 1000, 2500)) -> list[dict[str, Any]]:
    """Many small tensors: ``counts`` layers of 32 x 32, two tensors each."""
    return [_apart(count, 32, 32) for count in counts]


def line(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, float]:
    """The straight line of refit seconds over ``key`` that is nearest to all rows, each counted by its ratio to it.

    Returns:
        ``"seconds"`` at zero, ``"seconds_each"`` of a unit more, and ``"largest_deviation"`` of a row from the line,
        as a share of the row.
    """
    x = np.array([row[key] for row in rows], np.float64)
    y = np.array([row["refit_seconds"] for row in rows], np.float64)
    each, start = np.polyfit(x, y, 1, w=1 / y)
    return {
        "seconds": float(start),
        "seconds_each": float(each),
        "largest_deviation": float(np.abs((start + each * x) / y - 1).max()),
    }


def growth() -> dict[str, Any]:
    """All of it."""
    bytes_rows, tensor_rows = by_bytes(), by_tensors()
    return {
        "by_bytes": bytes_rows,
        "by_tensors": tensor_rows,
        "lines": {"by_bytes": line(bytes_rows, "bytes"), "by_tensors": line(tensor_rows, "tensors")},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for argument in ("count", "rows", "columns"):
        parser.add_argument(argument, type=int)
    sys.stdout.write(json.dumps(measure(**vars(parser.parse_args()))) + "\n")
