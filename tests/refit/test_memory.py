"""Memory: a refit from a large mapped file needs the new weights and little else."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_refit
from onnx_refit.weights.sources.arrays import ArraysSource
from onnx_refit.weights.write import write_safetensors


def resident() -> int:
    """Bytes of this process that are its own: not pages of mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


@pytest.mark.slow
def test_a_refit_from_2_gb_of_mapped_safetensors_takes_the_weights_and_one_tensor(tmp_path: Path) -> None:
    width, layers = 4096, 30  # 30 x 64 MiB
    rng = np.random.default_rng(0)
    first = rng.standard_normal((width, width), dtype=np.float32) / 64
    nodes = [helper.make_node("MatMul", [f"v{i}", f"w{i}"], [f"v{i + 1}"]) for i in range(layers)]
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("v0", TensorProto.FLOAT, ["N", width])],
        [helper.make_tensor_value_info(f"v{layers}", TensorProto.FLOAT, ["N", width])],
        [numpy_helper.from_array(first[:1], f"w{i}") for i in range(layers)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    for tensor in model.graph.initializer:
        onnx.external_data_helper.set_external_data(tensor, "weights.bin", offset=0, length=first.nbytes)
        tensor.ClearField("raw_data")
        tensor.dims[0] = width
    (tmp_path / "weights.bin").write_bytes(first.tobytes())
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    plan = onnx_refit.build(tmp_path / "model.onnx", options=onnx_refit.BuildOptions(specialise=False))
    second = {f"w{i}": first * np.float32(1 + i / 100 + 0.005) for i in range(layers)}
    write_safetensors(tmp_path / "new.safetensors", ArraysSource(second))
    last = second[f"w{layers - 1}"].copy()
    del second
    with onnx_refit.load(plan) as engine:
        gc.collect()
        before = resident()
        peak, done = before, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        engine.refit(tmp_path / "new.safetensors")
        done.set()
        watcher.join()
        assert peak - before <= plan.weight_bytes + 2 * first.nbytes
        np.testing.assert_array_equal(engine.weights().read(f"w{layers - 1}"), last)
