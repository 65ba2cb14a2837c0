"""One case of the GPU benchmark: inference beside peers, refits, latency under refits."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

import onnx_refit
from benchmarks import gpu_peers
from benchmarks.cases import Case
from benchmarks.measure import once, race, ratio
from onnx_refit.engine.cuda.backend import CudaBackend
from onnx_refit.engine.cuda.choice import candidates
from onnx_refit.engine.cuda.options import CudaOptions, Precision, Recurrent
from onnx_refit.engine.registry import EngineOptions
from onnx_refit.model.prepare import prepare
from onnx_refit.plan.compile import compile_model
from onnx_refit.plan.evaluate import evaluate
from onnx_refit.plan.plan import Plan
from onnx_refit.refit.live import Engine
from onnx_refit.tensors import Array


class Measured:
    """One case on one device."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
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

    def inference(
        self, label: str, inputs: Mapping[str, Array], seconds: float, isolated: Mapping[str, Any]
    ) -> dict[str, object]:
        """Ours beside the peers, and how far the outputs are from ONNX Runtime's on the CPU.

        The best peer is the fastest of those that do the same: float32, inputs and outputs the caller's own.
        """
        feeds = self.feeds(inputs)
        tensors = {name: torch.from_numpy(array).to(self.device) for name, array in feeds.items()}
        calls: dict[str, Callable[[], object]] = {}
        notes: dict[str, object] = {}
        variants: dict[str, dict[str, Any]] = {
            "ours": {},
            "ours, tf32": {"precision": Precision.TF32},
            "ours, bf16": {"precision": Precision.BF16},
        }
        if self.case.recurrent:
            variants["ours, library recurrence"] = {"recurrent": Recurrent.LIBRARY}
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
            if name == "ours":
                calls["ours, NumPy to NumPy"] = lambda backend=backend, held=held: backend.run(held, feeds)  # type: ignore[misc]
        peers: list[gpu_peers.Peer] = []
        makers = {} if self.case.module is None else gpu_peers.torch_peers(self.case.module, feeds, self.device)
        try:
            makers |= gpu_peers.ort_peers(self.model, self.compiled, self.engine_weights(), feeds)
        except RuntimeError as error:
            notes["ORT CUDA"] = str(error)
        for name, make in makers.items():
            try:
                with torch.no_grad():
                    peers.append(make())
            except Exception as error:  # noqa: BLE001 - a peer that fails is a result
                notes[name] = f"{type(error).__name__}: {str(error)[:300]}"
        calls |= {peer.name: peer.call for peer in peers}
        with torch.no_grad(), gpu_peers.tf32(False):
            figures = race(calls, seconds=seconds)
        medians = {name: round(statistics.median(values) * 1e6, 2) for name, values in figures.items()}
        alike = {peer.name: medians[peer.name] for peer in peers if peer.alike}
        if self.case.recurrent:
            alike["ours, library recurrence"] = medians["ours, library recurrence"]
        for name, result in isolated.items():
            if "microseconds" not in result:
                notes[name] = result["failed"]
                continue
            medians[f"{name} (own process)"] = result["microseconds"]
            if not name.startswith("ours"):
                alike[f"{name} (own process)"] = result["microseconds"]
        best = min(alike, key=alike.__getitem__) if alike else None
        over = None if best is None else medians["ours"] / alike[best]
        if best in figures:
            over = ratio(figures, "ours", str(best))
        built = {peer.name: peer.seconds for peer in peers}
        built |= {name: result["seconds to build"] for name, result in isolated.items() if "seconds to build" in result}
        return {
            "input": label,
            "microseconds": medians,
            "best peer": best,
            "ours over best peer": None if over is None else round(over, 3),
            "largest error": errors,
            "seconds to build": {name: round(value, 4) for name, value in built.items()},
            "in processes of their own": isolated,
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
        bound = backend.bind(there) if on_gpu else there
        plan = onnx_refit.build(self.model, engine="cuda", options=onnx_refit.BuildOptions(specialise=False))
        engine = onnx_refit.load(plan, options=EngineOptions(cuda=CudaOptions(devices=(self.device,))))
        other = {name: tensor.clone() for name, tensor in there.items()}
        for tensor in other.values():
            if tensor.is_floating_point():
                tensor.add_(1e-3)

        def whole() -> object:
            turn[0] ^= 1
            return engine.refit(other if turn[0] else there)

        def switch() -> object:
            turn[0] ^= 1
            return backend.run_tensors(held[turn[0]], tensors)

        calls = {
            "copy within the device": gpu_peers.synchronised(lambda: target.copy_(source), self.device),
            "copy from pinned memory": gpu_peers.synchronised(
                lambda: target.copy_(flat, non_blocking=True), self.device
            ),
            "refit from bound device weights": lambda: backend.derive(bound),
            "refit from device weights": lambda: backend.derive(there),
            "whole transaction from device weights": whole,
            "refit from pinned weights": lambda: backend.derive(pinned),
            "refit from NumPy arrays": lambda: backend.derive(self.weights),
            "inference": lambda: backend.run_tensors(held[turn[0]], tensors),
            "inference that switches the version": switch,
        }
        figures = race(calls, seconds=seconds)
        engine.close()
        medians = {name: statistics.median(values) for name, values in figures.items()}
        return {
            "weights, MB": round(self.nbytes / 1e6, 2),
            "tensors": len(self.weights),
            "input": label,
            "microseconds": {name: round(value * 1e6, 1) for name, value in medians.items()},
            "bound device refit over copy": round(
                ratio(figures, "refit from bound device weights", "copy within the device"), 2
            ),
            "device refit over copy": round(ratio(figures, "refit from device weights", "copy within the device"), 2),
            "pinned refit over copy": round(ratio(figures, "refit from pinned weights", "copy from pinned memory"), 2),
        }

    def under_refit(self, seconds: float) -> dict[str, object]:
        """Latency of requests alone, and while another thread refits every 100 ms.

        Refits are whole transactions from bound tensors, of two trainers in turn, so that all values change.
        """
        backend = self.backend()
        inputs = self.feeds(next(iter(self.case.inputs.values())))
        tensors = {name: torch.from_numpy(array).to(self.device) for name, array in inputs.items()}
        engine = Engine(Plan("cuda", self.compiled, self.weights, ""), backend, self.weights)
        trainers = [
            {name: torch.from_numpy(np.array(array)).to(self.device) for name, array in self.weights.items()}
            for _ in range(2)
        ]
        for tensor in trainers[1].values():
            if tensor.is_floating_point():
                tensor.mul_(1.0625)
        bound = [engine.bind(one) for one in trainers]
        for one in (*bound, *bound):
            engine.refit(one)

        def latencies(duration: float) -> list[float]:
            end, found = time.perf_counter() + duration, []
            while time.perf_counter() < end:
                found.append(once(lambda: backend.run_tensors(engine._versions.current.weights, tensors)))
            return found

        latencies(0.5)
        idle = latencies(seconds)
        stop, refits, copied = threading.Event(), [0], [0]

        def refit() -> None:
            while not stop.wait(0.1):
                report = engine.refit(bound[refits[0] % 2])
                copied[0] += len(report.changed) == len(self.weights)
                refits[0] += 1

        thread = threading.Thread(target=refit)
        thread.start()
        busy = latencies(seconds)
        stop.set()
        thread.join()
        engine.close()
        p99 = {"idle": float(np.quantile(idle, 0.99)), "refits": float(np.quantile(busy, 0.99))}
        return {
            "refits": refits[0],
            "refits that changed every weight": copied[0],
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
