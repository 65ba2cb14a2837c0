"""From source weights, wherever they lie, to an arena of engine weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from onnx_refit.engine.cuda import kernels
from onnx_refit.engine.cuda.arena import Arena, Layout, Slot
from onnx_refit.engine.cuda.gather import Batch, Part
from onnx_refit.engine.cuda.lowering.operators import Tensor, torch_dtype
from onnx_refit.engine.cuda.lowering.program import to_real
from onnx_refit.engine.cuda.recipes import Recipes
from onnx_refit.engine.cuda.upload import Uploader, from_dlpack
from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.plan.evaluate import required
from onnx_refit.tensors import TensorSpec

Source = Any
"""A source weight: a NumPy array, or anything with ``__dlpack__`` on any device (PyTorch, CuPy, JAX)."""

_LARGE = 512 << 10  # bytes from which a copy engine is faster than a kernel that reads host memory


class Filler:
    """Fills arenas. Not thread-safe: refits come one at a time.

    Args:
        compiled: the plan's portable part.
        layout: of a whole weight set.
        device: where the arenas are.
        real: the dtype that stands for float32.
        chunk: bytes of each pinned buffer, see ``Uploader``.
    """

    def __init__(self, compiled: CompiledModel, layout: Layout, device: Any, real: Any, chunk: int) -> None:
        self._program = compiled.program
        self._layout = layout
        self._device = device
        self._real = real
        self._recipes = Recipes(compiled, str(device))
        self._uploader = Uploader(device, chunk)
        self._specs = {source.spec.name: source.spec for source in compiled.sources}
        kept = [slot for slot in layout.plain if self._as_it_is(slot)]
        self._direct = {slot.spec.name for slot in kept}
        self._names = [str(slot.source) for slot in kept]
        self._parts = [self._part(slot, slot.offset) for slot in kept]
        self._rest = frozenset(layout.slots) - self._direct

    def _as_it_is(self, slot: Slot) -> bool:
        return self._specs[str(slot.source)].nbytes == slot.nbytes

    def _part(self, slot: Slot, to: int) -> Part:
        spec = self._specs[str(slot.source)]
        return Part(torch_dtype(spec.dtype, spec.name), spec.static_shape, spec.nbytes, to)

    @cached_property
    def _batch(self) -> Batch | None:
        """All weights that are copies, by one kernel; None without a GPU or CuPy."""
        return Batch(self._parts, self._device) if self._device.type == "cuda" and kernels.available() else None

    @cached_property
    def _small(self) -> Batch | None:
        """The small ones of them."""
        parts = [part for part in self._parts if part.nbytes < _LARGE]
        return Batch(parts, self._device) if self._device.type == "cuda" and kernels.available() else None

    def fill(self, arena: Arena, sources: Mapping[str, Source], wanted: frozenset[str]) -> None:
        """Enqueue everything that makes the wanted engine weights in an arena, on the current stream.

        Args:
            arena: holds at least the wanted weights.
            sources: source weight name -> its value.
            wanted: engine weights.

        Raises:
            EngineError: a source has another dtype or shape than the plan declares, or an operator failed.
        """
        if arena.layout is self._layout and self._direct and self._all_at_once(arena, sources):
            wanted = self._rest
        if wanted:
            self._one_by_one(arena, sources, wanted)

    def _all_at_once(self, arena: Arena, sources: Mapping[str, Source]) -> bool:
        """Copy every weight that is a copy, if they all lie on this device or all in pinned memory."""
        batch = self._batch
        if batch is None:
            return False
        values = [sources[name] for name in self._names]
        if batch.fits(values):
            if not batch.aligned([value.data_ptr() for value in values]):
                return False
            batch.copy(arena.storage)
            return True
        pinned = self._pinned(values)
        if pinned is None:
            return False
        small = [value for value, part in zip(pinned, self._parts, strict=True) if part.nbytes < _LARGE]
        if self._small is None or not self._small.aligned([value.data_ptr() for value in small]):
            return False
        self._small.copy(arena.storage)
        for value, part in zip(pinned, self._parts, strict=True):
            if part.nbytes >= _LARGE:
                arena.storage[part.to : part.to + part.nbytes].view(part.dtype).copy_(value.view(-1), non_blocking=True)
        return True

    def _pinned(self, values: Sequence[Source]) -> list[Tensor] | None:
        """The values as dense tensors in pinned memory; None if one of them is none."""
        found = []
        for value, part in zip(values, self._parts, strict=True):
            if is_host(value):
                if not (value.flags.writeable and value.flags.c_contiguous) or part.dtype is torch.bfloat16:
                    return None
                value = torch.from_numpy(value)
            elif not isinstance(value, torch.Tensor):
                return None
            if value.dtype is not part.dtype or tuple(value.shape) != part.shape or not value.is_contiguous():
                return None
            if value.is_cuda or not value.is_pinned():
                return None
            found.append(value)
        return found

    def _one_by_one(self, arena: Arena, sources: Mapping[str, Source], wanted: frozenset[str]) -> None:
        slots = [arena.layout.slots[name] for name in wanted]
        plain = [slot for slot in slots if slot.source is not None]
        hosted = {
            slot.spec.name: _host_bytes(sources[str(slot.source)], self._specs[str(slot.source)])
            for slot in plain
            if self._as_it_is(slot) and _on_host(sources[str(slot.source)])
        }
        # First, because it overwrites the gaps between its slots.
        self._uploader.fill(arena, hosted)
        targets, given = [], []
        tensors: dict[str, Tensor] = {}

        def tensor(source: str) -> Tensor:
            if source not in tensors:
                spec, value = self._specs[source], sources[source]
                tensors[source] = self._uploader.tensor(spec, value) if is_host(value) else from_dlpack(value, spec)
            return tensors[source]

        for slot in plain:
            if slot.spec.name in hosted:
                continue
            value = tensor(str(slot.source))
            if value.dtype is not slot.dtype:
                value = to_real(value.to(self._device, non_blocking=True), self._real)
            targets.append(arena.raw(slot.spec.name).view(value.shape))
            given.append(value)
        computed = frozenset(slot.spec.name for slot in slots if slot.source is None)
        needed = required(self._program, computed) if computed else frozenset()
        here = {source: tensor(source).to(self._device, non_blocking=True) for source in needed}
        for name, value in self._recipes.run(computed, here).items():
            targets.append(arena.view(name))
            given.append(to_real(value, self._real))
        if targets:
            # One call for all: tensors of this device in few launches, those of pinned host memory by direct copies.
            torch._foreach_copy_(targets, given, non_blocking=True)

    # ------------------------------------------------------------------ looking at weights where they are

    def look(
        self, values: Mapping[str, Tensor], positions: Callable[[int], npt.NDArray[np.int64]]
    ) -> tuple[list[bool], list[bytes]]:
        """Whether source weights on this device are finite, and some of their elements; see ``Batch.look``.

        Args:
            values: source weight name -> dense tensor on this device, of the declared dtype and shape.
            positions: number of elements -> positions to give.
        """
        names, tensors = list(values), list(values.values())
        batch = self._batch if names == self._names else None
        if batch is None and self._device.type == "cuda" and kernels.available():
            specs = [self._specs[name] for name in names]
            parts = [Part(torch_dtype(s.dtype, s.name), s.static_shape, s.nbytes, 0) for s in specs]
            batch = Batch(parts, self._device)
        if batch is not None and batch.aligned([tensor.data_ptr() for tensor in tensors]):
            return batch.look(positions)
        return _look_one_by_one(tensors, positions)


def _look_one_by_one(
    tensors: Sequence[Tensor], positions: Callable[[int], npt.NDArray[np.int64]]
) -> tuple[list[bool], list[bytes]]:
    finite = [bool(torch.isfinite(tensor).all()) for tensor in tensors]
    samples = []
    for tensor in tensors:
        at = torch.from_numpy(positions(tensor.numel())).to(tensor.device)
        taken = tensor.reshape(-1)[at].cpu()
        samples.append(taken.view(torch.uint8).numpy().tobytes())
    return finite, samples


def is_host(value: Source) -> bool:
    """Whether a value is a NumPy array."""
    return hasattr(value, "flags") and hasattr(value, "ctypes")


def _on_host(value: Source) -> bool:
    return is_host(value) or (isinstance(value, torch.Tensor) and value.device.type == "cpu" and not value.is_pinned())


def _host_bytes(value: Source, spec: TensorSpec) -> Any:
    """A host value whose bytes can be uploaded as they are, checked."""
    if is_host(value):
        return value
    tensor = from_dlpack(value, spec).contiguous()
    return tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
