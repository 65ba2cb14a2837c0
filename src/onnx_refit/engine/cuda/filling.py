"""From source weights, wherever they lie, to an arena of engine weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from onnx_refit.engine.cuda import kernels
from onnx_refit.engine.cuda.arena import Arena, Layout, Slot
from onnx_refit.engine.cuda.families import HALVES, Family, Formula, families, sources_of
from onnx_refit.engine.cuda.gather import Copies, Part, Table
from onnx_refit.engine.cuda.lowering.operators import Tensor, torch_dtype
from onnx_refit.engine.cuda.lowering.program import to_real
from onnx_refit.engine.cuda.pinned import PinnedCopies, is_host
from onnx_refit.engine.cuda.recipes import Recipes
from onnx_refit.engine.cuda.upload import Uploader, from_dlpack
from onnx_refit.errors import EngineError
from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.plan.evaluate import required
from onnx_refit.tensors import TensorSpec

Source = Any
"""A source weight: a NumPy array, or anything with ``__dlpack__`` on any device (PyTorch, CuPy, JAX)."""


class Bound(Mapping[str, Tensor]):
    """Source weights on a device that were looked at once, for refit after refit from the same tensors.

    Their values may change, and are read at each refit; their dtypes, shapes and order of elements must not.
    """

    def __init__(self, tensors: Mapping[str, Tensor], filler: Filler) -> None:
        self._tensors = dict(tensors)
        # Memory that a tensor leaves stays readable, so that kernels may start before its address is asked for.
        self._storages = [tensor.untyped_storage() for tensor in self._tensors.values()]
        self.filler = filler
        self.copied = [self._tensors[name] for name in filler.copied]
        self.computed = [self._tensors[name] for name in filler.computed_from]
        self.unfolded = [self._tensors[name] for name in (*filler.copied, *filler.kept.slots)]

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Filler:
    """Fills arenas. Not thread-safe: refits come one at a time.

    Args:
        compiled: the plan's portable part.
        layout: of a whole weight set.
        device: where the arenas are.
        real: the dtype that stands for float32.
        chunk: bytes of each pinned buffer, see ``Uploader``.
        found: engine weights that are formulas, see ``formulas``.

    Attributes:
        copied: source weights that are copied, in the order of their kernel's table.
        kept: those that are no engine weights, as they lie behind what a folding leaves out.
        computed_from: source weights that formulas read, in the order of theirs.
        formulas: engine weights that kernels compute, and how.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        layout: Layout,
        device: Any,
        real: Any,
        chunk: int,
        found: Mapping[str, Formula],
    ) -> None:
        self._program = compiled.program
        self._layout = layout
        self._device = device
        self._real = real
        self._recipes = Recipes(compiled, str(device))
        self._uploader = Uploader(device, chunk)
        self._specs = {source.spec.name: source.spec for source in compiled.sources}
        self._kernels = device.type == "cuda" and kernels.available()
        kept = [slot for slot in layout.plain if self._as_it_is(slot)]
        self._direct = frozenset(slot.spec.name for slot in kept)
        self.copied = [str(slot.source) for slot in kept]
        self._parts = [self._part(name) for name in self.copied]
        self._places = [slot.offset for slot in kept]
        self.formulas = {name: found[name] for name in found if layout.slots[name].source is None}
        self.computed_from = sources_of(self.formulas)
        self._rest = frozenset(layout.slots) - self._direct - self.formulas.keys()
        engine = set(self.copied)
        self.kept = Layout([spec for name, spec in self._specs.items() if name not in engine], torch.float32)
        self._noted: Bound | None = None  # whose addresses the tables hold

    def _as_it_is(self, slot: Slot) -> bool:
        return self._specs[str(slot.source)].nbytes == slot.nbytes

    def _part(self, name: str) -> Part:
        spec = self._specs[name]
        return Part(torch_dtype(spec.dtype, name), spec.static_shape, spec.nbytes)

    @cached_property
    def _table(self) -> Table:
        return Table(self._parts, self._device)

    @cached_property
    def _copies(self) -> Copies:
        """All weights that are copies, by one kernel."""
        return Copies(self._table, list(enumerate(self._places)))

    @cached_property
    def _unfolded(self) -> tuple[Table, Copies, PinnedCopies]:
        """The same, and those that are kept, to behind the layout's stem: by one kernel, or from pinned memory."""
        parts = [*self._parts, *(self._part(name) for name in self.kept.slots)]
        places = [*self._places, *(self._layout.stem + slot.offset for slot in self.kept.slots.values())]
        table = Table(parts, self._device)
        return table, Copies(table, list(enumerate(places))), PinnedCopies(parts, places, self._device)

    @cached_property
    def _pinned(self) -> PinnedCopies:
        return PinnedCopies(self._parts, self._places, self._device)

    @cached_property
    def _pinned_staging(self) -> PinnedCopies:
        places = [self._staging.slots[name].offset for name in self.computed_from]
        return PinnedCopies([self._part(name) for name in self.computed_from], places, self._device)

    @cached_property
    def _computed_table(self) -> Table:
        return Table([self._part(name) for name in self.computed_from], self._device)

    @cached_property
    def _families(self) -> list[Family]:
        places = {name: self._layout.slots[name].offset for name in self.formulas}
        index = {name: row for row, name in enumerate(self.computed_from)}
        return families(self.formulas, places, self._computed_table, index, HALVES.get(self._real, 0))[0]

    @cached_property
    def _staging(self) -> Layout:
        """Of source weights that formulas read, where they do not lie on the device."""
        return Layout([self._specs[name] for name in self.computed_from], torch.float32)

    def bind(self, tensors: Mapping[str, Tensor]) -> Bound:
        """Look at tensors of this device once, for many refits.

        Raises:
            EngineError: one is missing, not dense, not on this device, or not of the declared dtype and shape.
        """
        for name, spec in self._specs.items():
            tensor = tensors.get(name)
            if tensor is None:
                raise EngineError("it is missing", where=name)
            from_dlpack(tensor, spec)
            if tensor.device != self._device or not tensor.is_contiguous():
                raise EngineError(f"only dense tensors on {self._device} can be bound", where=name)
        return Bound(tensors, self)

    def fill(self, arena: Arena, sources: Mapping[str, Source], wanted: frozenset[str]) -> None:
        """Enqueue everything that makes the wanted engine weights in an arena, on the current stream.

        Args:
            arena: holds at least the wanted weights.
            sources: source weight name -> its value; ``Bound`` ones are not looked at again.
            wanted: engine weights.

        Raises:
            EngineError: a source has another dtype or shape than the plan declares, or an operator failed.
        """
        if self._kernels and arena.layout is self._layout:
            bound = sources if isinstance(sources, Bound) and sources.filler is self else None
            if bound is not None and self._fill_from(arena, bound):
                return
            if self._direct and self._copy_all(arena, sources):
                wanted = wanted - self._direct
            if self.formulas:
                self._compute_all(arena, sources)
                wanted = wanted - self.formulas.keys()
        if wanted:
            with torch.no_grad():
                self.one_by_one(arena, sources, wanted)

    def _fill_from(self, arena: Arena, bound: Bound) -> bool:
        """Everything from bound tensors, if they are all it takes; their addresses are asked for meanwhile."""
        if self._rest:
            return False
        if self._noted is bound:
            self._enqueue(arena)
            if self._table.has(bound.copied) and self._computed_table.has(bound.computed):
                return True
        self._noted = None
        if not (self._table.note(bound.copied) and self._computed_table.note(bound.computed)):
            return False
        self._noted = bound
        self._enqueue(arena)
        return True

    def fill_unfolded(self, arena: Arena, kept: Arena, sources: Mapping[str, Source]) -> None:
        """The same for an arena some of whose weights are made later: their sources are copied.

        Args:
            arena: of the whole layout.
            kept: of ``self.kept``, behind the arena's stem.
            sources: see ``fill``; all of them.

        Raises:
            EngineError: see ``fill``.
        """
        rest = frozenset(arena.layout.slots) - arena.later
        if self._kernels and self._copy_unfolded(arena, sources):
            rest = rest - self._direct
        else:
            hosted = {n: _host_bytes(sources[n], self._specs[n]) for n in self.kept.slots if _on_host(sources[n])}
            with torch.no_grad():
                self._uploader.fill(kept, hosted)
                for name in self.kept.slots.keys() - hosted.keys():
                    kept.view(name).copy_(from_dlpack(sources[name], self._specs[name]), non_blocking=True)
        if rest:
            with torch.no_grad():
                self.one_by_one(arena, sources, rest)

    def _copy_unfolded(self, arena: Arena, sources: Mapping[str, Source]) -> bool:
        """All copies at once, if all sources lie on this device or all in pinned memory."""
        table, copies, pinned = self._unfolded
        if isinstance(sources, Bound) and sources.filler is self:
            if self._noted is sources:
                copies.enqueue(arena.storage)
                if table.has(sources.unfolded):
                    return True
            self._noted = None
            if not table.note(sources.unfolded):
                return False
            self._noted = sources
            copies.enqueue(arena.storage)
            return True
        self._noted = None
        values = [sources[name] for name in (*self.copied, *self.kept.slots)]
        if table.fits(values):
            if not table.note(values):
                return False
            copies.enqueue(arena.storage)
            return True
        return pinned.enqueue(arena.storage, values)

    def _enqueue(self, arena: Arena) -> None:
        for family in self._families:
            family.enqueue(arena.storage)
        self._copies.enqueue(arena.storage)

    def _copy_all(self, arena: Arena, sources: Mapping[str, Source]) -> bool:
        """Copy every weight that is a copy, if they all lie on this device or all in pinned memory."""
        values = list(map(sources.__getitem__, self.copied))
        self._noted = None
        if self._table.fits(values):
            if not self._table.note(values):
                return False
            self._copies.enqueue(arena.storage)
            return True
        return self._pinned.enqueue(arena.storage, values)

    def _compute_all(self, arena: Arena, sources: Mapping[str, Source]) -> None:
        """Compute every weight that is a formula, by one kernel a formula."""
        values = list(map(sources.__getitem__, self.computed_from))
        table, found = self._computed_table, self._families
        self._noted = None
        if not (table.fits(values) and table.note(values)):
            values = self._staged(values)  # held until the kernels that read it are enqueued
            table.note(values)
        for family in found:
            family.enqueue(arena.storage)

    def _staged(self, values: Sequence[Source]) -> list[Tensor]:
        """Source weights from anywhere, on the device."""
        staging = Arena(self._staging, self._device)
        if self._pinned_staging.enqueue(staging.storage, values):
            return [staging.raw(name) for name in self.computed_from]
        named = dict(zip(self.computed_from, values, strict=True))
        hosted = {name: _host_bytes(v, self._specs[name]) for name, v in named.items() if _on_host(v)}
        with torch.no_grad():
            self._uploader.fill(staging, hosted)
            for name, value in named.items():
                if name not in hosted:
                    staging.view(name).copy_(from_dlpack(value, self._specs[name]), non_blocking=True)
        return [staging.raw(name) for name in named]

    def one_by_one(self, arena: Arena, sources: Mapping[str, Source], wanted: frozenset[str]) -> None:
        """The same by PyTorch's operators, a weight at a time where they come from the host."""
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


def _on_host(value: Source) -> bool:
    return is_host(value) or (isinstance(value, torch.Tensor) and value.device.type == "cpu" and not value.is_pinned())


def _host_bytes(value: Source, spec: TensorSpec) -> Any:
    """A host value whose bytes can be uploaded as they are, checked."""
    if is_host(value):
        return value
    tensor = from_dlpack(value, spec).contiguous()
    return tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
