"""Engine weights in one flat piece of device memory, so that moving all of them is one copy."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from onnx_refit.engine.cuda.lowering.operators import Tensor, torch_dtype
from onnx_refit.engine.cuda.memory import Memory
from onnx_refit.engine.cuda.plain import Plain
from onnx_refit.tensors import TensorSpec

ALIGNMENT = 256
"""Bytes: what CUDA's own allocator aligns to, enough for every vectorised load."""

_VECTOR = 16  # bytes of the widest load; neighbours that are to be read as one matrix lie no further apart

_serials = itertools.count()


@dataclass(frozen=True)
class Slot:
    """Where one engine weight lies.

    Attributes:
        spec: the engine weight as the plan declares it.
        dtype: PyTorch's dtype it is stored in (half where the plan says float32 and the precision is half).
        offset: bytes from the beginning of the arena.
        nbytes: bytes it takes.
        source: name of the source weight whose elements it holds in the source's own order; None if it is computed.
        strides: of the engine weight over the slot, in elements; None where it is contiguous.
    """

    spec: TensorSpec
    dtype: Any
    offset: int
    nbytes: int
    source: str | None = None
    strides: tuple[int, ...] | None = None


class Layout:
    """The slots of some engine weights, one behind the other in the order given.

    Args:
        specs: the engine weights.
        real: the dtype that stands for float32.
        plain: those that are views of source weights.
        together: groups of weights that are read as one matrix: each group lies without gaps where sizes allow it.
        last: weights that lie behind all others, unless they are in a group with some of those.

    Attributes:
        slots: name -> where it lies.
        behind: the weights that lie behind all others.
        stem: bytes of these others, with the gaps between them.
        payload: bytes of all slots.
        nbytes: the same with the gaps between them.
        room: bytes to allocate, at least one.
    """

    def __init__(
        self,
        specs: Iterable[TensorSpec],
        real: Any,
        plain: Mapping[str, Plain] | None = None,
        together: Sequence[Sequence[str]] = (),
        last: Collection[str] = (),
    ) -> None:
        known = {spec.name: spec for spec in specs}
        views = plain or {}
        self._real, self._views = real, views
        slots: dict[str, Slot] = {}
        end = 0
        groups, later = _ordered(known, together), frozenset(last)
        front = [names for names in groups if not later.issuperset(names)]
        behind = [names for names in groups if later.issuperset(names)]
        self.behind = frozenset(name for names in behind for name in names)
        stem: int | None = None
        for turn, names in enumerate([*front, *behind]):
            end = _aligned(end, ALIGNMENT)
            stem = end if turn == len(front) else stem
            for name in names:
                spec = known[name]
                dtype = torch_dtype(spec.dtype, name)
                dtype = real if dtype is torch.float32 else dtype
                nbytes = spec.size * dtype.itemsize
                view = views.get(name)
                contiguous = tuple(torch.empty(spec.static_shape, device="meta").stride())
                strides = None if view is None or view.strides == contiguous else view.strides
                end = _aligned(end, _VECTOR)
                slots[name] = Slot(spec, dtype, end, nbytes, None if view is None else view.source, strides)
                end += nbytes
        self.slots: Mapping[str, Slot] = slots
        self.payload = sum(slot.nbytes for slot in slots.values())
        self.nbytes = _aligned(end, ALIGNMENT)
        self.stem = self.nbytes if stem is None else stem
        self.room = max(1, self.nbytes)

    @cached_property
    def plain(self) -> tuple[Slot, ...]:
        """The slots that hold source weights."""
        return tuple(slot for slot in self.slots.values() if slot.source is not None)

    def part(self, names: Collection[str]) -> Layout:
        """A layout of some of the weights, each as it is here."""
        return Layout([slot.spec for name, slot in self.slots.items() if name in names], self._real, self._views)


def _ordered(known: Mapping[str, TensorSpec], together: Sequence[Sequence[str]]) -> list[list[str]]:
    """The names in groups: each member of a group beside the others, at the place of the first one."""
    group_of = {name: tuple(names) for names in together for name in names if all(n in known for n in names)}
    ordered, placed = [], set()
    for name in known:
        if name not in placed:
            names = list(group_of.get(name, (name,)))
            ordered.append(names)
            placed.update(names)
    return ordered


def _aligned(offset: int, to: int) -> int:
    return -(-offset // to) * to


class Arena:
    """Memory for a layout.

    Attributes:
        serial: a number that no other arena of the process has: an address may be used again, this is not.
        layout: what lies where.
        storage: uint8 on the device, where the bytes are; ``[layout.nbytes]`` unless they share it with others.
        begin: where they begin in it, in bytes.
        memory: what the storage is lent from; None where it is its own.

    Args:
        layout: see above.
        device: where.
        storage: see above; None for memory of its own.
        begin: see above.
        memory: see above.
    """

    def __init__(
        self, layout: Layout, device: Any, storage: Tensor | None = None, begin: int = 0, memory: Memory | None = None
    ) -> None:
        self.serial = next(_serials)
        self.layout = layout
        self.storage: Tensor = (
            torch.empty(layout.room, dtype=torch.uint8, device=device) if storage is None else storage
        )
        self.begin = begin
        self.memory = memory

    @property
    def pointer(self) -> int:
        """The address of its first byte, on the device."""
        return int(self.storage.data_ptr()) + self.begin

    def address(self, name: str) -> int:
        """Of a slot, on the device."""
        return self.pointer + self.layout.slots[name].offset

    def raw(self, name: str) -> Tensor:
        """The elements of a slot as they lie, [elements]."""
        self.keep()
        slot = self.layout.slots[name]
        begin = self.begin + slot.offset
        return self.storage[begin : begin + slot.nbytes].view(slot.dtype)

    def view(self, name: str) -> Tensor:
        """An engine weight, of the slot's dtype and the engine weight's shape."""
        slot = self.layout.slots[name]
        shape = slot.spec.static_shape
        flat = self.raw(name)
        return flat.view(shape) if slot.strides is None else flat.as_strided(shape, slot.strides)

    @cached_property
    def views(self) -> Mapping[str, Tensor]:
        """Name -> engine weight; made when first asked for, which most refits never do."""
        return {name: self.view(name) for name in self.layout.slots}

    def keep(self) -> None:
        """Somebody may read these bytes who does not hold this arena; see ``Memory``."""
        if self.memory is not None:
            self.memory.keep()

    @property
    def later(self) -> frozenset[str]:
        """Those of its weights that are not there yet; ``finish`` makes them."""
        return frozenset()

    def finish(self, target: Arena) -> None:
        """Enqueue what makes them in another arena of the same layout, on the current stream."""


class LiveArena:
    """The arena that recorded graphs read: they hold addresses, so new weights are copied to where the old ones lie.

    A copy is enqueued on the stream of the inferences, between two of them: each sees one version whole, and nothing
    waits. What a refit left to be computed is computed there instead of copied. Not thread-safe: the runner's lock
    guards it.
    """

    def __init__(self, layout: Layout, device: Any) -> None:
        self.arena = Arena(layout, device)
        self._holds: dict[str, int] = {}
        self.copied_nbytes = 0

    @property
    def views(self) -> Mapping[str, Tensor]:
        """Name -> tensor that graphs read."""
        return self.arena.views

    def switch(self, places: Mapping[str, Arena]) -> int:
        """Enqueue what makes everything that lies here that of other arenas; returns the bytes written.

        Args:
            places: engine weight name -> the arena that holds it, of this arena's layout or of a part of it.
        """
        stale = [name for name, arena in places.items() if self._holds.get(name) != arena.serial]
        if not stale:
            return 0
        sources = {places[name].serial: places[name] for name in stale}
        if self.arena.storage.is_cuda:
            for arena in sources.values():
                # A set may be freed while its copy is still queued: its memory must not be given away before that.
                arena.storage.record_stream(torch.cuda.current_stream(self.arena.storage.device))
        whole = next(iter(sources.values()))
        layout = self.arena.layout
        if len(stale) == len(places) and len(sources) == 1 and whole.layout is layout:
            nbytes = layout.nbytes
            self._copy_whole(whole)
        else:
            stale = self._finish(places, stale)
            nbytes = sum(layout.slots[name].nbytes for name in stale)
            copied = [name for name in stale if name not in places[name].later]
            if copied:
                torch._foreach_copy_(
                    [self.arena.raw(n) for n in copied], [places[n].raw(n) for n in copied], non_blocking=True
                )
        self._holds.update((name, places[name].serial) for name in stale)
        self.copied_nbytes += nbytes
        return nbytes

    def _copy_whole(self, whole: Arena) -> None:
        if not whole.later:
            self.arena.storage.copy_(whole.storage, non_blocking=True)
            return
        stem = self.arena.layout.stem
        if stem:
            self.arena.storage[:stem].copy_(whole.storage[:stem], non_blocking=True)
        whole.finish(self.arena)

    def _finish(self, places: Mapping[str, Arena], stale: Sequence[str]) -> list[str]:
        """Enqueue what computes stale weights; what it overwrites beside them is stale then too."""
        unmade = {places[name].serial: places[name] for name in stale if name in places[name].later}
        again = set(stale)
        for arena in unmade.values():
            arena.finish(self.arena)
            again |= arena.later
        return [name for name in places if name in again]
