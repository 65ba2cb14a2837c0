"""The CUDA engine on one device: weight sets in device memory, requests by recorded CUDA graphs.

**Not run** on a GPU yet; the same code runs on ``device="cpu"`` in the tests.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from onnx_refit.engine.cuda import persistent
from onnx_refit.engine.cuda.arena import Arena, Layout
from onnx_refit.engine.cuda.choice import Choice, candidates, make_network
from onnx_refit.engine.cuda.lowering.operators import Tensor
from onnx_refit.engine.cuda.lowering.program import to_real
from onnx_refit.engine.cuda.options import CudaOptions, Precision
from onnx_refit.engine.cuda.recipes import Recipes
from onnx_refit.engine.cuda.runner import Runner, to_input
from onnx_refit.engine.cuda.torchlib import real_dtype
from onnx_refit.engine.cuda.upload import Uploader, from_dlpack
from onnx_refit.engine.cuda.weightset import CudaWeightSet
from onnx_refit.engine.protocol import Inspector, WeightSet
from onnx_refit.errors import EngineError
from onnx_refit.plan.compiled import CompiledModel, Decision, Verdict
from onnx_refit.plan.evaluate import affected, required
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype

Source = Any
"""A source weight: a NumPy array, or anything with ``__dlpack__`` on any device (PyTorch, CuPy, JAX)."""


class CudaBackend:
    """A compiled model on one device. Thread-safe; make one with ``create``.

    Args:
        compiled: the portable engine.
        device: the device, ``"cuda:0"``.
        options: what the user chose.
        choice: how the network runs; None takes the most promising way.

    Raises:
        UnsupportedModelError: the model holds operators that no way can run; they are named.
    """

    def __init__(
        self, compiled: CompiledModel, device: str, options: CudaOptions, choice: Choice | None = None
    ) -> None:
        self._compiled = compiled
        self._options = options
        self._real = real_dtype(torch, options.precision)
        self.choice = candidates(compiled, device, options)[0] if choice is None else choice
        lowered = make_network(compiled, device, options, self.choice)
        self.device = lowered.device
        self._layout = Layout(compiled.engine_weights, self._real)
        self.runner = Runner(compiled, lowered, self._layout, options)
        self._recipes = Recipes(compiled, device)
        self._uploader = Uploader(self.device, options.chunk)
        self._sources = {source.spec.name: source.spec for source in compiled.sources}
        self._refits = threading.Lock()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._closed = False

    @property
    def name(self) -> str:
        """The engine's name."""
        return "cuda"

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """The model's inputs."""
        return self._compiled.inputs

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """The model's outputs."""
        return self._compiled.outputs

    @property
    def decisions(self) -> Sequence[Decision]:
        """What was decided for this device, with reasons; padding that turned out harmful is added as it is met."""
        fixed = [
            self.choice.decision(),
            Decision(
                "versions",
                "copy a version's weights to where recorded graphs read them",
                Verdict.ACCEPTED,
                "recorded graphs hold addresses: the first request after a commit (or for another version) pays one "
                "copy within the device, and the weights take that memory once more",
            ),
        ]
        if self._options.precision is not Precision.FP32:
            reason = "it was asked for; outputs differ from float32's"
            fixed.append(Decision("precision", self._options.precision.value, Verdict.ACCEPTED, reason))
        if any(node.op_type in ("LSTM", "GRU") for node in self._compiled.activation.graph.node):
            usable = self.device.type == "cuda" and persistent.available()
            reason = "CuPy compiles them" if usable else "they need a GPU and CuPy; the library's kernels run"
            verdict = Verdict.ACCEPTED if usable else Verdict.REJECTED
            fixed.append(Decision("LSTM, GRU", "persistent kernels where the hidden size fits", verdict, reason))
        return (*fixed, *self.runner.decisions)

    def required(self, changed: frozenset[str]) -> frozenset[str]:
        """The source weights that deriving every engine weight which reads one of ``changed`` needs."""
        return required(self._compiled.program, affected(self._compiled.program, changed))

    @property
    def recoverable(self) -> frozenset[str]:
        """Source weights that are engine weights as they are; none of float32 where the engine stores halves."""
        return frozenset(source for source in self._recoverable())

    def _recoverable(self) -> dict[str, str]:
        return {
            source: name
            for name, source in self._compiled.program.passthrough.items()
            if self._layout.slots[name].nbytes == self._sources[source].nbytes
        }

    def recover(self, weights: WeightSet, name: str) -> Array:
        """A source weight read back from a weight set (a copy); EngineError for one that is not recoverable."""
        held = self._recoverable().get(name)
        if held is None:
            raise EngineError("the engine's weights do not hold this source weight bit for bit", where=name)
        spec = self._sources[name]
        raw = own(weights).view(held).contiguous().view(-1).view(torch.uint8).cpu().numpy()
        array: Array = raw.view(numpy_dtype(spec.dtype)).reshape(spec.static_shape).copy()
        return array

    def derive(
        self,
        sources: Mapping[str, Source],
        base: WeightSet | None = None,
        changed: frozenset[str] | None = None,
        inspector: Inspector | None = None,
    ) -> CudaWeightSet:
        """A new weight set; see ``Backend.derive``. Requests run meanwhile.

        Beside NumPy arrays, sources may be tensors of other libraries: those on this device never touch the host.
        The set owns copies, so whoever gave them may go on changing them once this returns.
        """
        self._check_open()
        held: dict[str, Arena] = {} if base is None or changed is None else dict(own(base).places)
        wanted = affected(self._compiled.program, changed or frozenset()) if held else frozenset(self._layout.slots)
        with self._refits, torch.no_grad(), self._on_stream():
            layout = self._layout if len(wanted) == len(self._layout.slots) else self._part(wanted)
            arena = Arena(layout, self.device)
            self._fill(arena, sources, wanted)
            if self._stream is not None:
                self._stream.synchronize()
        places = {**held, **dict.fromkeys(wanted, arena)}
        shared = sum(self._layout.slots[name].nbytes for name in places if name not in wanted)
        return CudaWeightSet({name: places[name] for name in self._layout.slots}, shared)

    def adopt(self, other: CudaWeightSet) -> CudaWeightSet:
        """A copy of another device's whole weight set (the same model and options), straight from device to device."""
        self._check_open()
        with self._refits, torch.no_grad(), self._on_stream():
            arena = Arena(self._layout, self.device)
            sources = {place.serial: place for place in other.places.values()}
            first = next(iter(sources.values()), None)
            if first is not None and len(sources) == 1 and first.storage.numel() == arena.storage.numel():
                arena.storage.copy_(first.storage, non_blocking=True)
            else:
                for name, view in arena.views.items():
                    view.copy_(other.view(name), non_blocking=True)
            if self._stream is not None:
                self._stream.synchronize()
        return CudaWeightSet(dict.fromkeys(self._layout.slots, arena), 0)

    def _part(self, wanted: frozenset[str]) -> Layout:
        return Layout([spec for spec in self._compiled.engine_weights if spec.name in wanted], self._real)

    def _fill(self, arena: Arena, sources: Mapping[str, Source], wanted: frozenset[str]) -> None:
        passthrough = self._compiled.program.passthrough
        plain = {name: passthrough[name] for name in wanted if name in passthrough}
        direct = {
            name: sources[source]
            for name, source in plain.items()
            if _is_host(sources[source]) and self._sources[source].nbytes == arena.layout.slots[name].nbytes
        }
        # First, because it overwrites the gaps between its slots.
        self._uploader.fill(arena, direct)
        targets, given = [], []
        tensors: dict[str, Tensor] = {}

        def tensor(source: str) -> Tensor:
            if source not in tensors:
                spec, value = self._sources[source], sources[source]
                host = _is_host(value)
                tensors[source] = self._uploader.tensor(spec, value) if host else from_dlpack(value, spec)
            return tensors[source]

        for name, source in plain.items():
            if name in direct:
                continue
            value = tensor(source)
            if value.dtype is not arena.views[name].dtype:
                value = to_real(value.to(self.device, non_blocking=True), self._real)
            targets.append(arena.views[name])
            given.append(value)
        computed = frozenset(name for name in wanted if name not in plain)
        needed = required(self._compiled.program, computed) if computed else frozenset()
        here = {source: tensor(source).to(self.device, non_blocking=True) for source in needed}
        for name, value in self._recipes.run(computed, here).items():
            targets.append(arena.views[name])
            given.append(to_real(value, self._real))
        if targets:
            # One call for all: tensors of this device in few launches, those of pinned host memory by direct copies.
            torch._foreach_copy_(targets, given, non_blocking=True)

    def run(
        self, weights: WeightSet, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run one inference with a weight set; see ``Backend.run``."""
        return {name: tensor.cpu().numpy() for name, tensor in self.run_tensors(weights, inputs, outputs).items()}

    def run_tensors(
        self, weights: WeightSet, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """The same with tensors: inputs on the device are not copied to the host, outputs stay on the device."""
        self._check_open()
        given = {spec.name: to_input(spec, inputs[spec.name]) for spec in self._compiled.inputs}
        names = [spec.name for spec in self._compiled.outputs] if outputs is None else list(outputs)
        try:
            return self.runner.run(own(weights), given, names)
        except RuntimeError as error:  # PyTorch's own: out of memory, a kernel that failed
            raise EngineError(f"PyTorch failed: {error}") from error

    def close(self) -> None:
        """Free the recordings; running afterwards raises EngineError."""
        if not self._closed:
            self._closed = True
            self.runner.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed")

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        # What the caller enqueued (the trainer's step that made these weights) comes before the refit.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield


def _is_host(value: Source) -> bool:
    return hasattr(value, "flags") and hasattr(value, "ctypes")


def own(weights: WeightSet) -> CudaWeightSet:
    """The weight set as this engine's; EngineError for another's."""
    if not isinstance(weights, CudaWeightSet):
        raise EngineError("the weight set belongs to another engine")
    return weights
