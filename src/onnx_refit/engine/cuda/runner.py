"""Requests on one device: weights switched, inputs in, network run, outputs out, all in the order of one stream."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from onnx_refit.engine.cuda.arena import Layout, LiveArena
from onnx_refit.engine.cuda.buckets import Buckets, Fitted
from onnx_refit.engine.cuda.choice import Network
from onnx_refit.engine.cuda.graphs import Recording, Recordings, record
from onnx_refit.engine.cuda.lowering.operators import Tensor, torch_dtype
from onnx_refit.engine.cuda.options import CudaOptions
from onnx_refit.engine.cuda.torchlib import exact_products
from onnx_refit.engine.cuda.weightset import CudaWeightSet
from onnx_refit.errors import EngineError
from onnx_refit.plan.compiled import CompiledModel, Decision, Verdict
from onnx_refit.tensors import TensorSpec

_RTOL, _ATOL = 1e-2, 1e-3


class Runner:
    """Runs a lowered model with any weight set of its layout. Thread-safe.

    Everything is enqueued on one stream under a lock and waited for outside of it, so requests queue on the device
    and not in Python, and a switch of weights lies between two requests.
    """

    def __init__(self, compiled: CompiledModel, lowered: Network, layout: Layout, options: CudaOptions) -> None:
        self._compiled = compiled
        self._lowered = lowered
        self._options = options
        self.device = lowered.device
        self.live = LiveArena(layout, self.device)
        self._buckets = Buckets(compiled.inputs, compiled.outputs, options.buckets)
        self.recordings = Recordings(options.graph_memory, options.graph_after)
        self._unsafe: set[Any] = set()
        self._lock = threading.Lock()
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.decisions: list[Decision] = []
        self._records = options.graphs and lowered.graphable
        if options.graphs and not lowered.graphable:
            reason = f"it waits for the device at {', '.join(lowered.waits_at[:3])}"
            self.decisions.append(Decision("network", "record CUDA graphs", Verdict.REJECTED, reason))

    def run(self, weights: CudaWeightSet, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        """Run one request.

        Args:
            weights: the weight set.
            inputs: input name -> tensor of the declared dtype, on the host or the device.
            outputs: names of the outputs wanted.

        Returns:
            Output name -> new tensor on the device, of the declared dtype, finished.
        """
        with self._lock, torch.no_grad():
            self._wait_for_inputs(inputs)
            with self._on_stream():
                self.live.switch(weights.places)
                results = self._enqueue(inputs, outputs)
                done = self._event()
        if done is not None:
            done.synchronize()
        return results

    def _wait_for_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        if self.stream is not None and any(tensor.is_cuda for tensor in inputs.values()):
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def _enqueue(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        fitted = self._buckets.fit(shapes)
        if fitted.padded and fitted.key in self._unsafe:
            fitted = self._buckets.fit(shapes, exact=True)
        recording = self.recordings.get(fitted.key)
        if recording is None and self._records and self.recordings.worthwhile(fitted.key):
            recording = self._record(fitted)
            if fitted.padded and not self._padding_is_harmless(recording, fitted, inputs):
                self._unsafe.add(fitted.key)
                self._note_unsafe(fitted)
                return self._compute_alone(inputs, outputs)
            self.recordings.put(fitted.key, recording)
        if recording is None:
            return self._compute_alone(inputs, outputs)
        self._replay(recording, inputs)
        return {
            name: self._declared(name, recording.outputs[name][self._buckets.crop(name, fitted)], copy=True)
            for name in outputs
        }

    def _record(self, fitted: Fitted) -> Recording:
        static = {
            spec.name: torch.zeros(fitted.shapes[spec.name], dtype=self._input_dtype(spec), device=self.device)
            for spec in self._compiled.inputs
        }
        moved: dict[str, Tensor] = {}

        def compute(given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            outputs: Mapping[str, Tensor] = self._lowered.run({**given, **self.live.views}, moved)
            return outputs

        with exact_products(torch, self._options.precision, tune=True):
            return record(compute, static, self.device)

    def _replay(self, recording: Recording, inputs: Mapping[str, Tensor]) -> None:
        for name, tensor in inputs.items():
            target = recording.inputs[name]
            if target.shape != tensor.shape:
                target.zero_()
                target = target[tuple(slice(size) for size in tensor.shape)]
            target.copy_(tensor, non_blocking=True)
        recording.replay()

    def _padding_is_harmless(self, recording: Recording, fitted: Fitted, inputs: Mapping[str, Tensor]) -> bool:
        """Whether a padded run gives what a run of the very shapes gives, on this request's inputs."""
        self._replay(recording, inputs)
        names = [spec.name for spec in self._compiled.outputs]
        wanted = self._compute_alone(inputs, names)
        for name in names:
            got = self._declared(name, recording.outputs[name][self._buckets.crop(name, fitted)], copy=True)
            if got.shape != wanted[name].shape:
                return False
            if not torch.allclose(got.double(), wanted[name].double(), rtol=_RTOL, atol=_ATOL, equal_nan=True):
                return False
        return True

    def _note_unsafe(self, fitted: Fitted) -> None:
        names = ", ".join(fitted.sizes)
        reason = "a padded run gave other outputs than one of the very shape: its rows influence each other"
        self.decisions.append(Decision(names, f"round up to {dict(fitted.shapes)}", Verdict.REJECTED, reason))

    def _compute_alone(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        given = {
            spec.name: inputs[spec.name].to(self.device, self._input_dtype(spec)) for spec in self._compiled.inputs
        }
        with exact_products(torch, self._options.precision):
            results = self._lowered.run({**given, **self.live.views})
        return {name: self._declared(name, results[name], copy=True) for name in outputs}

    def _input_dtype(self, spec: TensorSpec) -> Any:
        dtype = torch_dtype(spec.dtype, spec.name)
        return self._lowered.real if dtype is torch.float32 else dtype

    def _declared(self, name: str, tensor: Tensor, *, copy: bool) -> Tensor:
        spec = next(spec for spec in self._compiled.outputs if spec.name == name)
        return tensor.to(torch_dtype(spec.dtype, name), copy=copy)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield

    def _event(self) -> Any:
        if self.stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def close(self) -> None:
        """Drop all recordings once the requests in flight have been enqueued."""
        with self._lock:
            self.recordings.clear()


def to_input(spec: TensorSpec, value: Any) -> Tensor:
    """An input as a tensor where it lies; EngineError for a dtype that PyTorch lacks."""
    dtype = torch_dtype(spec.dtype, spec.name)
    if isinstance(value, torch.Tensor):
        return value
    if hasattr(value, "__dlpack__") and not hasattr(value, "flags"):
        return torch.from_dlpack(value)
    if dtype is torch.bfloat16:
        raise EngineError("inputs of bfloat16 must be tensors, not NumPy arrays", where=spec.name)
    return torch.from_numpy(value if value.flags.writeable else value.copy())
