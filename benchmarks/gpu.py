"""Measure the engine "cuda" beside its peers, in one process, and write JSON.

    python -m benchmarks.gpu --out gpu.json                      one GPU, all cases
    python -m benchmarks.gpu --out gpu.json --gpus 4 --only group
    python -m benchmarks.gpu --out smoke.json --device cpu --quick --only mlp     that this file works, without a GPU

Every figure comes from paired, interleaved rounds (``benchmarks.measure.race``); what failed or was not there is in
the JSON with its reason. Needs torch; CuPy for the persistent kernel; onnxruntime-gpu and a C++ compiler for two peers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from benchmarks import gpu_peers
from benchmarks.cases import CASES, Case
from benchmarks.measure import machine, once, race, ratio
from onnx_refit.engine.cuda.backend import CudaBackend
from onnx_refit.engine.cuda.choice import candidates
from onnx_refit.engine.cuda.create import create
from onnx_refit.engine.cuda.options import CudaOptions, Precision, Recurrent
from onnx_refit.errors import OnnxRefitError
from onnx_refit.model.prepare import prepare
from onnx_refit.plan.compile import compile_model
from onnx_refit.plan.compiled import CompiledModel, RefitProgram, SourceWeight
from onnx_refit.plan.evaluate import evaluate
from onnx_refit.tensors import Array, spec_of, spec_of_value_info, value_info_of

BATCHES = {"resnet18": (32,), "resnet50": ()}


def hardware(device: str) -> dict[str, object]:
    """The machine and, if there is one, its GPU."""
    found = machine()
    if device.startswith("cuda"):
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found |= {"gpus": names, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        try:
            import cupy

            found["cupy"] = cupy.__version__
        except ImportError:
            found["cupy"] = None
    return found


class Measured:
    """One case on one device."""

    def __init__(self, case: Case, device: str, quick: bool) -> None:
        self.case, self.device, self.quick = case, device, quick
        self.model = prepare(case.model, for_engine="cuda").model
        compilation = compile_model(self.model)
        self.compiled, self.weights = compilation.compiled, dict(compilation.weights)
        self.nbytes = sum(array.nbytes for array in self.weights.values())

    def backend(self, **options: Any) -> CudaBackend:
        """A backend of ours that records at once, by the way asked for and not by measurement."""
        chosen = CudaOptions(devices=(self.device,), graph_after=1, **options)
        ways = candidates(self.compiled, self.device, chosen)
        runner = "inductor" if chosen.inductor else "torch"
        return CudaBackend(self.compiled, self.device, chosen, next(way for way in ways if way.runner == runner))

    def feeds(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs in the declared dtypes."""
        dtypes = {spec.name: spec.dtype for spec in self.compiled.inputs}
        return {name: np.asarray(array).astype(dtypes[name]) for name, array in inputs.items()}

    def inference(self, label: str, inputs: Mapping[str, Array], seconds: float) -> dict[str, object]:
        """Ours beside the peers, and how far the outputs are from ONNX Runtime's on the CPU."""
        feeds = self.feeds(inputs)
        tensors = {name: torch.from_numpy(array).to(self.device) for name, array in feeds.items()}
        calls: dict[str, Callable[[], object]] = {}
        notes: dict[str, object] = {}
        variants: dict[str, dict[str, Any]] = {"ours": {}, "ours, tf32": {"precision": Precision.TF32}}
        if self.case.recurrent:
            variants["ours, library recurrence"] = {"recurrent": Recurrent.LIBRARY}
        else:
            variants["ours, bf16"] = {"precision": Precision.BF16}
            if not self.quick:
                variants["ours, Inductor"] = {"inductor": True}
        wanted = reference(self.model, feeds)
        errors = {}
        for name, options in variants.items():
            backend = self.backend(**options)
            held = backend.derive(self.weights)
            outputs = backend.run(held, feeds)
            errors[name] = max(
                float(np.abs(np.asarray(outputs[key], np.float64) - np.asarray(value, np.float64)).max())
                for key, value in wanted.items()
            )
            calls[name] = lambda backend=backend, held=held: backend.run_tensors(held, tensors)  # type: ignore[misc]
        built = {}
        makers = []
        if self.case.module is not None:
            makers += gpu_peers.torch_peers(self.case.module, feeds, self.device, quick=self.quick)
        try:
            makers += gpu_peers.ort_peers(self.model, self.compiled, self.engine_weights(), feeds)
        except RuntimeError as error:
            notes["ORT CUDA"] = str(error)
        for make in makers:
            try:
                with torch.no_grad():
                    peer = make()
            except Exception as error:  # noqa: BLE001 - a peer that fails is a result
                notes[getattr(make, "__name__", "peer")] = f"{type(error).__name__}: {str(error)[:300]}"
                continue
            calls[peer.name], built[peer.name] = peer.call, peer.seconds
            if peer.update is not None:
                peer.update()
                notes[f"{peer.name}: seconds of a constant update"] = once(peer.update)
        with torch.no_grad():
            figures = race(calls, seconds=seconds)
        medians = {name: statistics.median(values) for name, values in figures.items()}
        peers = {name: value for name, value in medians.items() if not name.startswith("ours")}
        best = min(peers, key=peers.__getitem__) if peers else None
        return {
            "input": label,
            "microseconds": {name: round(value * 1e6, 2) for name, value in medians.items()},
            "best peer": best,
            "ours over best peer": None if best is None else round(ratio(figures, "ours", best), 3),
            "largest error": errors,
            "seconds to build": built,
            "notes": notes,
        }

    def engine_weights(self) -> Mapping[str, Array]:
        """Engine weights on the host, for the peer that takes them as inputs."""
        return evaluate(self.compiled.program, self.weights)

    def refit(self, seconds: float) -> dict[str, object]:
        """Refits from device, pinned and pageable memory, over plain copies of the same bytes."""
        backend = self.backend()
        label, inputs = next(iter(self.case.inputs.items()))
        tensors = {name: torch.from_numpy(array).to(self.device) for name, array in self.feeds(inputs).items()}
        host = {name: torch.from_numpy(np.array(array)) for name, array in self.weights.items()}
        on_gpu = self.device.startswith("cuda")
        pinned = {name: tensor.pin_memory() for name, tensor in host.items()} if on_gpu else host
        there = {name: tensor.to(self.device) for name, tensor in host.items()}
        flat = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=on_gpu)
        target, source = (torch.empty(self.nbytes, dtype=torch.uint8, device=self.device) for _ in range(2))
        held = [backend.derive(self.weights), backend.derive(self.weights)]
        turn = [0]

        def switch() -> object:
            turn[0] ^= 1
            return backend.run_tensors(held[turn[0]], tensors)

        calls = {
            "copy within the device": gpu_peers.synchronised(lambda: target.copy_(source), self.device),
            "copy from pinned memory": gpu_peers.synchronised(
                lambda: target.copy_(flat, non_blocking=True), self.device
            ),
            "refit from device weights": lambda: backend.derive(there),
            "refit from pinned weights": lambda: backend.derive(pinned),
            "refit from NumPy arrays": lambda: backend.derive(self.weights),
            "inference": lambda: backend.run_tensors(held[turn[0]], tensors),
            "inference that switches the version": switch,
        }
        figures = race(calls, seconds=seconds)
        return {
            "weights, MB": round(self.nbytes / 1e6, 2),
            "tensors": len(self.weights),
            "input": label,
            "microseconds": {name: round(statistics.median(values) * 1e6, 1) for name, values in figures.items()},
            "device refit over copy": round(ratio(figures, "refit from device weights", "copy within the device"), 2),
            "pinned refit over copy": round(ratio(figures, "refit from pinned weights", "copy from pinned memory"), 2),
        }

    def under_refit(self, seconds: float) -> dict[str, object]:
        """Latency of requests alone, and while another thread refits every 100 ms."""
        backend = self.backend()
        inputs = self.feeds(next(iter(self.case.inputs.values())))
        tensors = {name: torch.from_numpy(array).to(self.device) for name, array in inputs.items()}
        there = {name: torch.from_numpy(np.array(array)).to(self.device) for name, array in self.weights.items()}
        current = [backend.derive(there)]

        def latencies(duration: float) -> list[float]:
            end, found = time.perf_counter() + duration, []
            while time.perf_counter() < end:
                found.append(once(lambda: backend.run_tensors(current[0], tensors)))
            return found

        latencies(0.5)
        idle = latencies(seconds)
        stop, refits = threading.Event(), [0]

        def refit() -> None:
            while not stop.wait(0.1):
                current[0] = backend.derive(there)
                refits[0] += 1

        thread = threading.Thread(target=refit)
        thread.start()
        busy = latencies(seconds)
        stop.set()
        thread.join()
        p99 = {"idle": float(np.quantile(idle, 0.99)), "refits": float(np.quantile(busy, 0.99))}
        return {
            "refits": refits[0],
            "requests": len(busy),
            "p99, microseconds": {name: round(value * 1e6, 1) for name, value in p99.items()},
            "p99 over idle": round(p99["refits"] / p99["idle"], 3),
        }


def reference(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What ONNX Runtime gives on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, dict(feeds)), strict=True))


def wide_mlp(layers: int, width: int) -> tuple[CompiledModel, dict[str, Array]]:
    """A compiled model of layers * width * width parameters, made without a protobuf of that size."""
    rng = np.random.default_rng(0)
    one = rng.standard_normal((width, width), dtype=np.float32) / np.float32(np.sqrt(width))
    weights = {f"w{index}": one.copy() for index in range(layers)}
    names = ["x", *(f"h{index}" for index in range(layers - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(layers)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, width])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, width])
    specs = tuple(spec_of(name, array) for name, array in weights.items())
    graph = helper.make_graph(nodes, "wide", [x, *(value_info_of(spec) for spec in specs)], [y])
    compiled = CompiledModel(
        activation=helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9),
        program=RefitProgram(None, {s.name: s.name for s in specs}, {s.name: frozenset({s.name}) for s in specs}),
        sources=tuple(SourceWeight(spec, ()) for spec in specs),
        engine_weights=specs,
        inputs=(spec_of_value_info(x),),
        outputs=(spec_of_value_info(y),),
    )
    return compiled, weights


def large(device: str, quick: bool) -> dict[str, object]:
    """Refits of a model of about a billion parameters, from host and from device memory."""
    compiled, weights = wide_mlp(4, 512) if quick else wide_mlp(60, 4096)
    parameters = sum(array.size for array in weights.values())
    backend = CudaBackend(compiled, device, CudaOptions(devices=(device,)))
    backend.derive(weights)
    there = {name: torch.from_numpy(array).to(device) for name, array in weights.items()}
    from_host = statistics.median(once(lambda: backend.derive(weights)) for _ in range(5))
    from_device = statistics.median(once(lambda: backend.derive(there)) for _ in range(5))
    return {
        "parameters": parameters,
        "seconds from NumPy arrays": from_host,
        "seconds from device weights": from_device,
        "seconds a billion parameters, from NumPy arrays": from_host / parameters * 1e9,
    }


def group(devices: tuple[str, ...], quick: bool) -> dict[str, object]:
    """A full refit of a group from weights on the first device, beside NCCL's broadcast of the same bytes."""
    compiled, weights = wide_mlp(4, 512) if quick else wide_mlp(16, 4096)
    nbytes = sum(array.nbytes for array in weights.values())
    backend: Any = create(compiled, options=CudaOptions(devices=devices))[0]
    there: Any = {name: torch.from_numpy(array).to(devices[0]) for name, array in weights.items()}
    backend.derive(there)
    refit = statistics.median(once(lambda: backend.derive(there)) for _ in range(7))
    found: dict[str, object] = {"devices": list(devices), "bytes": nbytes, "seconds of a group refit": refit}
    if devices[0].startswith("cuda"):
        buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for device in devices]

        def broadcast() -> None:
            torch.cuda.nccl.broadcast(buffers)
            for device in devices:
                torch.cuda.synchronize(device)

        broadcast()
        seconds = statistics.median(once(broadcast) for _ in range(7))
        found |= {"seconds of an NCCL broadcast": seconds, "share of the broadcast bandwidth": seconds / refit}
    backend.close()
    return found


def main() -> None:
    """Measure what was asked for and write the JSON after each case, so that a cut run leaves what it had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--only", help="cases, comma-separated; also: large, group")
    parser.add_argument("--seconds", type=float, default=3.0, help="per race")
    parser.add_argument("--quick", action="store_true", help="no slow builds of peers")
    chosen = parser.parse_args()
    wanted = chosen.only.split(",") if chosen.only else ["bidaf", "encoder", "resnet18", "resnet50", "mlp", "large"]
    results: dict[str, Any] = {"machine": hardware(chosen.device), "cases": {}}
    for name in wanted:
        started = time.perf_counter()
        try:
            results["cases"][name] = measure(name, chosen)
        except (OnnxRefitError, RuntimeError) as error:
            results["cases"][name] = {"failed": f"{type(error).__name__}: {error}"}
        print(f"== {name}, {time.perf_counter() - started:.0f} s")
        print(json.dumps(results["cases"][name], indent=1, default=str), flush=True)
        chosen.out.write_text(json.dumps(results, indent=2, default=str))


def measure(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """One case."""
    if name == "large":
        return large(chosen.device, chosen.quick)
    if name == "group":
        kind = chosen.device.split(":")[0]
        devices = tuple(f"cuda:{index}" if kind == "cuda" else "cpu" for index in range(max(2, chosen.gpus)))
        return group(devices, chosen.quick)
    case = Measured(CASES[name](), chosen.device, chosen.quick)
    inputs = dict(case.case.inputs)
    for rows in BATCHES.get(name, ()) if not chosen.quick else ():
        first = next(iter(inputs.values()))
        inputs[f"b={rows}"] = {key: np.repeat(array, rows, axis=0) for key, array in first.items()}
    return {
        "inference": [case.inference(label, feeds, chosen.seconds) for label, feeds in inputs.items()],
        "refit": case.refit(chosen.seconds),
        "under refits": case.under_refit(chosen.seconds),
    }


if __name__ == "__main__":
    main()
