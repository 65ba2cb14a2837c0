"""How the cost of a refit grows with bytes and with the number of tensors."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import onnx_refit
from benchmarks.measure import copy_seconds, once
from onnx_refit.tensors import Array


def chain(count: int, rows: int, columns: int) -> onnx.ModelProto:
    """``count`` layers x @ W + b with W [rows, columns] (square where count > 1)."""
    rng = np.random.default_rng(0)
    nodes, tensors, value = [], [], "x"
    for index in range(count):
        weight = (rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(np.sqrt(rows))).astype(np.float32)
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


def measure(model: onnx.ModelProto) -> dict[str, Any]:
    """Refit and copy seconds of one model."""
    plan = onnx_refit.build(model)
    with onnx_refit.load(plan) as engine:
        rng = np.random.default_rng(1)
        specs = engine.refittable
        sets: list[dict[str, Array]] = [
            {name: rng.standard_normal(spec.static_shape, dtype=np.float32) for name, spec in specs.items()}
            for _ in range(2)
        ]
        figures = [once(partial(engine.refit, sets[turn % 2])) for turn in range(9)]
    return {
        "bytes": plan.weight_bytes,
        "tensors": len(plan.refittable),
        "refit_seconds": statistics.median(figures[3:]),
        "copy_seconds": copy_seconds(sets[0], 5),
    }


def by_bytes(sizes: Sequence[int] = (10, 30, 100, 300, 1000, 2000)) -> list[dict[str, Any]]:
    """Few large tensors: ``sizes`` in MB (10^6 bytes), in layers of up to 4096 x 4096."""
    rows = []
    for megabytes in sizes:
        width = min(4096, int((megabytes * 1e6 / 4 / 4) ** 0.5) // 16 * 16)
        rows.append(measure(chain(max(1, round(megabytes * 1e6 / 4 / width**2)), width, width)))
    return rows


def by_tensors(counts: Sequence[int] = (1, 10, 100, 1000, 2500)) -> list[dict[str, Any]]:
    """Many small tensors: ``counts`` layers of 32 x 32, two tensors each."""
    return [measure(chain(count, 32, 32)) for count in counts]
