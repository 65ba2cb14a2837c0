"""Requests on one device: weights switched, inputs in, network run, outputs out, all in the order of one stream."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from onnx_refit.engine.cuda.arena import Layout, LiveArena
from onnx_refit.engine.cuda.buckets import Buckets, Fitted
from onnx_refit.engine.cuda.choice import Network
from onnx_refit.engine.cuda.graphs import Recording, Recordings, pack, record
from onnx_refit.engine.cuda.lowering import tuning
from onnx_refit.engine.cuda.lowering.operators import Tensor, torch_dtype
from onnx_refit.engine.cuda.options import CudaOptions
from onnx_refit.engine.cuda.streams import OwnStream
from onnx_refit.engine.cuda.torchlib import exact_products
from onnx_refit.engine.cuda.weightset import CudaWeightSet
from onnx_refit.errors import EngineError
from onnx_refit.plan.compiled import CompiledModel, Decision, Verdict
from onnx_refit.tensors import Array, TensorSpec

_RTOL, _ATOL = 1e-2, 1e-3
_FITS = 4096  # shapes whose rounding is remembered
_SMALL = 1 << 20  # bytes of an output that is copied out of pinned memory


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
        self._own = OwnStream(self.device)
        self.stream = self._own.stream
        self._dtypes = {spec.name: torch_dtype(spec.dtype, spec.name) for spec in compiled.outputs}
        self._current = 0  # the serial of the weight set that lies in the live arena
        self._fits: dict[tuple[Any, ...], Fitted] = {}
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
        try:
            with self._lock:
                if True in [tensor.is_cuda for tensor in inputs.values()]:
                    self._own.follow_current()
                with self._own:
                    self._switch(weights)
                    recording, fitted = self._recording(inputs)
                    if recording is None:
                        results = self._compute_alone(inputs, outputs)
                    else:
                        self._replay(recording, inputs)
                        results = {name: self._result(recording, name, fitted) for name in outputs}
                    done = self._own.mark()
            self._own.wait(done)
        except BaseException:
            weights.keep()  # its copy may still be queued, and nobody waits for it
            raise
        return results

    def run_arrays(
        self, weights: CudaWeightSet, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> dict[str, Array]:
        """The same from host to host: inputs travel in one copy, outputs as soon as they are computed."""
        tensors = {spec.name: to_input(spec, inputs[spec.name]) for spec in self._compiled.inputs}
        try:
            with self._lock, self._own:
                self._switch(weights)
                recording, fitted = self._recording(tensors)
                if recording is None:
                    results = self._compute_alone(tensors, outputs)
                else:
                    if not self._send(recording, inputs, fitted):
                        self._fill(recording, tensors)
                    recording.replay()
                    results = {name: self._result(recording, name, fitted, copy=False) for name in outputs}
                hosted = {name: self._to_host(tensor) for name, tensor in results.items()}
                done = self._own.mark()
            self._own.wait(done)
        except BaseException:
            weights.keep()  # its copy may still be queued, and nobody waits for it
            raise
        # Small ones are copied out: pinned memory is scarce, and callers may keep what they got.
        return {name: _own_array(tensor) for name, tensor in hosted.items()}

    def _switch(self, weights: CudaWeightSet) -> None:
        if weights.serial != self._current:
            self.live.switch(weights.places)
            self._current = weights.serial

    def _recording(self, inputs: Mapping[str, Tensor]) -> tuple[Recording | None, Fitted]:
        """The recording to replay for these inputs, made if it is worthwhile; None where they are computed alone."""
        shapes = tuple([tensor.shape for tensor in inputs.values()])
        fitted = self._fits.get(shapes)
        if fitted is None:
            fitted = self._fits[shapes] = self._fit(inputs)
            if len(self._fits) > _FITS:
                self._fits.pop(next(iter(self._fits)))
        recording = self.recordings.get(fitted.key)
        if recording is None and self._records and self.recordings.worthwhile(fitted.key):
            recording = self._record(fitted)
            if fitted.padded and not self._padding_is_harmless(recording, fitted, inputs):
                self._unsafe.add(fitted.key)
                self._fits.clear()
                self._note_unsafe(fitted)
                return None, fitted
            self.recordings.put(fitted.key, recording)
        return recording, fitted

    def _fit(self, inputs: Mapping[str, Tensor]) -> Fitted:
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        fitted = self._buckets.fit(shapes)
        if fitted.padded and fitted.key in self._unsafe:
            return self._buckets.fit(shapes, exact=True)
        return fitted

    def _send(self, recording: Recording, inputs: Mapping[str, Array], fitted: Fitted) -> bool:
        """Copy host inputs in one piece; False where they must be converted or padded."""
        packed = recording.packed
        if packed is None or fitted.padded or self.stream is None or self._lowered.real is not torch.float32:
            return False
        host = torch.empty(packed.storage.shape, dtype=torch.uint8, pin_memory=True)
        memory = host.numpy()
        for name, offset in packed.offsets.items():
            array = inputs[name]
            memory[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
        packed.storage.copy_(host, non_blocking=True)
        return True

    def _to_host(self, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def _result(self, recording: Recording, name: str, fitted: Fitted, *, copy: bool = True) -> Tensor:
        tensor = recording.outputs[name]
        if fitted.padded:
            tensor = tensor[self._buckets.crop(name, fitted)]
        return self._declared(name, tensor, copy=copy)

    def _record(self, fitted: Fitted) -> Recording:
        dtypes = {spec.name: self._input_dtype(spec) for spec in self._compiled.inputs}
        shapes = {spec.name: fitted.shapes[spec.name] for spec in self._compiled.inputs}
        packed, static = pack(shapes, dtypes, self.device)
        moved: dict[str, Tensor] = {}

        def compute(given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            outputs: Mapping[str, Tensor] = self._lowered.run({**given, **self.live.views}, moved)
            return outputs

        with torch.no_grad(), exact_products(torch, self._options.precision, tune=True), tuning.allowed():
            return record(compute, static, self.device, packed)

    def _replay(self, recording: Recording, inputs: Mapping[str, Tensor]) -> None:
        self._fill(recording, inputs)
        recording.replay()

    def _fill(self, recording: Recording, inputs: Mapping[str, Tensor]) -> None:
        targets, given = [], []
        for name, tensor in inputs.items():
            target = recording.inputs[name]
            if target.shape != tensor.shape:
                target.zero_()
                target = target[tuple(slice(size) for size in tensor.shape)]
            targets.append(target)
            given.append(tensor)
        if len(targets) == 1:
            targets[0].copy_(given[0], non_blocking=True)
        elif targets:
            torch._foreach_copy_(targets, given, non_blocking=True)

    def _padding_is_harmless(self, recording: Recording, fitted: Fitted, inputs: Mapping[str, Tensor]) -> bool:
        """Whether a padded run gives what a run of the very shapes gives, on this request's inputs."""
        self._replay(recording, inputs)
        names = [spec.name for spec in self._compiled.outputs]
        wanted = self._compute_alone(inputs, names)
        for name in names:
            got = self._result(recording, name, fitted)
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
        with torch.no_grad(), exact_products(torch, self._options.precision):
            results = self._lowered.run({**given, **self.live.views})
        return {name: self._declared(name, results[name], copy=True) for name in outputs}

    def _input_dtype(self, spec: TensorSpec) -> Any:
        dtype = torch_dtype(spec.dtype, spec.name)
        return self._lowered.real if dtype is torch.float32 else dtype

    def _declared(self, name: str, tensor: Tensor, *, copy: bool) -> Tensor:
        return tensor.to(self._dtypes[name], copy=copy)

    def close(self) -> None:
        """Drop all recordings once the requests in flight have been enqueued."""
        with self._lock:
            self.recordings.clear()


def _own_array(tensor: Tensor) -> Array:
    array: Array = tensor.numpy()
    return array.copy() if array.nbytes <= _SMALL else array


def to_input(spec: TensorSpec, value: Any) -> Tensor:
    """An input as a tensor where it lies; EngineError for a dtype that PyTorch lacks."""
    if isinstance(value, torch.Tensor):
        return value.detach() if value.requires_grad else value
    dtype = torch_dtype(spec.dtype, spec.name)
    if hasattr(value, "__dlpack__") and not hasattr(value, "flags"):
        return torch.from_dlpack(value)
    if dtype is torch.bfloat16:
        raise EngineError("inputs of bfloat16 must be tensors, not NumPy arrays", where=spec.name)
    return torch.from_numpy(value if value.flags.writeable else value.copy())
