"""The CUDA engine on one device: weight sets in device memory, requests by recorded CUDA graphs.

The same code runs on ``device="cpu"`` in the tests that need no GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from onnx_refit.engine.base import CompiledBackend
from onnx_refit.engine.cuda import kernels
from onnx_refit.engine.cuda.arena import Arena, Layout
from onnx_refit.engine.cuda.attached import Attached, attach
from onnx_refit.engine.cuda.choice import Choice, candidates, make_network
from onnx_refit.engine.cuda.families import Formula, formulas
from onnx_refit.engine.cuda.filling import Filler, Source
from onnx_refit.engine.cuda.folding import Unfolded, foldable
from onnx_refit.engine.cuda.lowering.operators import Tensor
from onnx_refit.engine.cuda.options import CudaOptions, Precision
from onnx_refit.engine.cuda.plain import plain_weights
from onnx_refit.engine.cuda.runner import Runner, to_input
from onnx_refit.engine.cuda.streams import on_device
from onnx_refit.engine.cuda.taking import Taker
from onnx_refit.engine.cuda.torchlib import real_dtype
from onnx_refit.engine.cuda.weightset import CudaWeightSet
from onnx_refit.engine.protocol import Holder, Inspector, Taken, WeightSet
from onnx_refit.errors import EngineError
from onnx_refit.plan.compiled import CompiledModel, Decision, Verdict
from onnx_refit.plan.evaluate import affected
from onnx_refit.tensors import Array, numpy_dtype
from onnx_refit.weights.provenance.expression import Expression


class CudaBackend(CompiledBackend):
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
        super().__init__("cuda", compiled)
        self._options = options
        self._real = real_dtype(torch, options.precision)
        self.choice = candidates(compiled, device, options)[0] if choice is None else choice
        lowered = make_network(compiled, device, options, self.choice)
        self.device = lowered.device
        self._plain = plain_weights(compiled)
        self._sources = {source.spec.name: source.spec for source in compiled.sources}
        computed = formulas(compiled)
        self._layout, self._recoverable = self._lay_out(compiled, lowered.together, computed)
        self._all = frozenset(self._layout.slots)
        self.runner = Runner(compiled, lowered, self._layout, options)
        self._filler = Filler(compiled, self._layout, self.device, self._real, options.chunk, computed)
        self._names = [spec.name for spec in compiled.outputs]
        self._taker = Taker(compiled, self._layout, self._filler, self.device, self._real, self._recoverable)
        self._refits = threading.Lock()
        self._index: int | None = self.device.index if self.device.type == "cuda" else None

    def _lay_out(
        self, compiled: CompiledModel, together: Sequence[Sequence[str]], computed: Mapping[str, Formula]
    ) -> tuple[Layout, dict[str, str]]:
        """What lies where, and which engine weight holds which source weight bit for bit."""
        layout = Layout(compiled.engine_weights, self._real, self._plain, together)
        held = {
            slot.source: name
            for name, slot in layout.slots.items()
            if slot.source is not None and slot.nbytes == self._sources[slot.source].nbytes
        }
        own = {name: one for name, one in computed.items() if layout.slots[name].source is None}
        last = foldable(compiled, own, frozenset(held))
        return Layout(compiled.engine_weights, self._real, self._plain, together, last), held

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
                "copy within the device (folded weights that whole refits leave to be computed are computed then), and "
                "the weights take that memory once more",
            ),
        ]
        if self._options.precision is not Precision.FP32:
            reason = "it was asked for; outputs differ from float32's"
            fixed.append(Decision("precision", self._options.precision.value, Verdict.ACCEPTED, reason))
        if any(node.op_type in ("LSTM", "GRU") for node in self._compiled.activation.graph.node):
            usable = self.device.type == "cuda" and kernels.available()
            reason = "CuPy compiles them" if usable else "they need a GPU and CuPy; the library's kernels run"
            verdict = Verdict.ACCEPTED if usable else Verdict.REJECTED
            fixed.append(Decision("LSTM, GRU", "persistent kernels where the hidden size fits", verdict, reason))
        return (*fixed, *self.runner.decisions)

    @property
    def recoverable(self) -> frozenset[str]:
        """Source weights that are engine weights as they are; none of float32 where the engine stores halves."""
        return frozenset(self._recoverable)

    def recover(self, weights: WeightSet, name: str) -> Array:
        """A source weight read back from a weight set (a copy); EngineError for one that is not recoverable."""
        held = self._recoverable.get(name)
        if held is None:
            raise EngineError("the engine's weights do not hold this source weight bit for bit", where=name)
        spec = self._sources[name]
        raw = own(weights).places[held].raw(held).view(torch.uint8).cpu().numpy()
        array: Array = raw.view(numpy_dtype(spec.dtype)).reshape(spec.static_shape).copy()
        return array

    def attach(
        self, parts: Mapping[str, Expression], tensors: Mapping[str, object], *, rounding: bool
    ) -> Attached | None:
        """See ``InPlace.attach``."""
        with on_device(self.device):
            return attach(parts, tensors, self._sources, self.device, rounding=rounding)

    def take(
        self,
        attached: Attached,
        tensors: Sequence[object],
        base: WeightSet,
        holder: Holder,
        positions: Mapping[str, Array],
        before: Mapping[str, bytes],
        look: bool,
    ) -> Taken | None:
        """See ``InPlace.take``."""
        if self._closed:
            self._check_open()
        base = base if type(base) is CudaWeightSet else own(base)
        with self._refits:
            if self._index is None or torch._C._cuda_getDevice() == self._index:
                return self._taker.take(attached, tensors, base, holder, positions, before, look)
            with on_device(self.device):
                return self._taker.take(attached, tensors, base, holder, positions, before, look)

    def equal(
        self, names: Sequence[str], left: tuple[WeightSet, Holder], right: tuple[WeightSet, Holder]
    ) -> frozenset[str]:
        """See ``InPlace.equal``."""
        with self._refits, on_device(self.device):
            return self._taker.equal(names, (own(left[0]), left[1]), (own(right[0]), right[1]))

    def derive(
        self,
        sources: Mapping[str, Source],
        base: WeightSet | None = None,
        changed: frozenset[str] | None = None,
        inspector: Inspector | None = None,
    ) -> CudaWeightSet:
        """A new weight set; see ``Backend.derive``. Requests run meanwhile; the inspector is left to look by itself.

        Beside NumPy arrays, sources may be tensors of other libraries: those on this device never touch the host.
        The set owns copies, so whoever gave them may go on changing them once this returns.
        """
        self._check_open()
        with self._refits:
            if not self._is_current():
                with on_device(self.device):
                    return self._derive(sources, base, changed)
            return self._derive(sources, base, changed)

    def bind(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors of this device, looked at once: what ``derive`` takes for refit after refit from the same tensors.

        Their values may change between refits; their dtypes, shapes and order of elements must not.

        Raises:
            EngineError: one is missing, not dense, not on this device, or not of the declared dtype and shape.
        """
        return self._filler.bind(tensors)

    def _derive(
        self, sources: Mapping[str, Source], base: WeightSet | None, changed: frozenset[str] | None
    ) -> CudaWeightSet:
        if base is None or changed is None:
            # In half precision the sources are twice what is made of them: not worth keeping where the host does.
            if self._layout.behind and self._real is torch.float32:
                unfolded = self._taker.unfolded()
                self._filler.fill_unfolded(unfolded, unfolded.kept(), sources)
                self._finish()
                return CudaWeightSet(unfolded)
            arena = Arena(self._layout, self.device)
            self._filler.fill(arena, sources, self._all)
            self._finish()
            return CudaWeightSet(arena)
        wanted = affected(self._compiled.program, changed)
        arena = Arena(self._layout.part(wanted), self.device)
        self._filler.fill(arena, sources, wanted)
        self._finish()
        places = {**own(base).places, **dict.fromkeys(wanted, arena)}
        shared = sum(self._layout.slots[name].nbytes for name in places if name not in wanted)
        return CudaWeightSet(arena, places, shared)

    def _is_current(self) -> bool:
        return self._index is None or bool(torch._C._cuda_getDevice() == self._index)

    def adopt(self, other: CudaWeightSet, base: CudaWeightSet | None = None) -> CudaWeightSet:
        """A copy of another device's weight set (the same model and options), straight from device to device.

        Args:
            other: the set to copy.
            base: this device's copy of what the other set shares the rest with; then only its own part is copied.
        """
        self._check_open()
        other.keep()
        with self._refits, torch.no_grad(), on_device(self.device):
            if base is not None and other.shared_nbytes:
                part = Arena(other.arena.layout, self.device)
                part.storage.copy_(other.arena.storage, non_blocking=True)
                self._finish()
                places = {**base.places, **dict.fromkeys(other.arena.layout.slots, part)}
                return CudaWeightSet(part, places, other.shared_nbytes)
            unfolded = next((place for place in other.places.values() if isinstance(place, Unfolded)), None)
            if unfolded is not None and not other.shared_nbytes:
                made: Arena = self.empty(unfolded)
                made.storage.copy_(unfolded.storage, non_blocking=True)
                self._finish()
                return CudaWeightSet(made)
            arena = Arena(self._layout, self.device)
            sources = {place.serial: place for place in other.places.values()}
            first = next(iter(sources.values()), None)
            if first is not None and len(sources) == 1 and first.storage.numel() == arena.storage.numel():
                arena.storage.copy_(first.storage, non_blocking=True)
            else:
                for name in self._layout.slots:
                    arena.raw(name).copy_(other.places[name].raw(name), non_blocking=True)
            self._finish()
        return CudaWeightSet(arena)

    def empty(self, like: Arena) -> Arena:
        """Memory for a whole weight set, for a group to write what another device has.

        Args:
            like: the other device's.
        """
        with on_device(self.device):
            return self._taker.unfolded() if isinstance(like, Unfolded) else Arena(self._layout, self.device)

    def run(
        self, weights: WeightSet, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run one inference with a weight set; see ``Backend.run``."""
        self._check_open()
        try:
            return self.runner.run_arrays(own(weights), inputs, self._names if outputs is None else outputs)
        except RuntimeError as error:  # PyTorch's own: out of memory, a kernel that failed
            raise EngineError(f"PyTorch failed: {error}") from error

    def run_tensors(
        self, weights: WeightSet, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """The same with tensors: inputs on the device are not copied to the host, outputs stay on the device."""
        self._check_open()
        given = {spec.name: to_input(spec, inputs[spec.name]) for spec in self._compiled.inputs}
        try:
            return self.runner.run(own(weights), given, self._names if outputs is None else outputs)
        except RuntimeError as error:  # PyTorch's own: out of memory, a kernel that failed
            raise EngineError(f"PyTorch failed: {error}") from error

    def close(self) -> None:
        """Free the recordings; running afterwards raises EngineError."""
        if not self._closed:
            self._closed = True
            self.runner.close()
            self._taker.close()

    def _finish(self) -> None:
        if self.device.type == "cuda":
            kernels.synchronize(self.device)


def own(weights: WeightSet) -> CudaWeightSet:
    """The weight set as this engine's; EngineError for another's."""
    if not isinstance(weights, CudaWeightSet):
        raise EngineError("the weight set belongs to another engine")
    return weights
