"""Engine weights in one flat piece of device memory, so that moving all of them is one copy."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from onnx_refit.engine.cuda.lowering.operators import Tensor, torch_dtype
from onnx_refit.tensors import TensorSpec

ALIGNMENT = 256
"""Bytes: what CUDA's own allocator aligns to, enough for every vectorised load."""

_serials = itertools.count()


@dataclass(frozen=True)
class Slot:
    """Where one engine weight lies.

    Attributes:
        spec: the engine weight as the plan declares it.
        dtype: PyTorch's dtype it is stored in (half where the plan says float32 and the precision is half).
        offset: bytes from the beginning of the arena.
        nbytes: bytes it takes.
    """

    spec: TensorSpec
    dtype: Any
    offset: int
    nbytes: int


class Layout:
    """The slots of some engine weights, one behind the other in the order given.

    Args:
        specs: the engine weights.
        real: the dtype that stands for float32.
    """

    def __init__(self, specs: Iterable[TensorSpec], real: Any) -> None:
        slots, end = {}, 0
        for spec in specs:
            dtype = torch_dtype(spec.dtype, spec.name)
            dtype = real if dtype is torch.float32 else dtype
            nbytes = spec.size * dtype.itemsize
            slots[spec.name] = Slot(spec, dtype, end, nbytes)
            end += -(-nbytes // ALIGNMENT) * ALIGNMENT
        self.slots: Mapping[str, Slot] = slots
        self.nbytes = end


class Arena:
    """Memory for a layout.

    Attributes:
        serial: a number that no other arena of the process has: an address may be used again, this is not.
        layout: what lies where.
        storage: the bytes, uint8 [layout.nbytes] on the device.
        views: name -> tensor of the slot's dtype and shape over the storage.
    """

    def __init__(self, layout: Layout, device: Any) -> None:
        self.serial = next(_serials)
        self.layout = layout
        self.storage: Tensor = torch.empty(max(1, layout.nbytes), dtype=torch.uint8, device=device)
        self.views: Mapping[str, Tensor] = {
            name: self.storage[slot.offset : slot.offset + slot.nbytes].view(slot.dtype).view(slot.spec.static_shape)
            for name, slot in layout.slots.items()
        }


class LiveArena:
    """The arena that recorded graphs read: they hold addresses, so new weights are copied to where the old ones lie.

    A copy is enqueued on the stream of the inferences, between two of them: each sees one version whole, and nothing
    waits. Not thread-safe: the runner's lock guards it.
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
        """Enqueue copies of what differs from what lies here; returns the bytes.

        Args:
            places: engine weight name -> the arena that holds it.
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
        if len(stale) == len(places) and len(sources) == 1 and whole.layout is self.arena.layout:
            self.arena.storage.copy_(whole.storage, non_blocking=True)
            nbytes = self.arena.layout.nbytes
        else:
            torch._foreach_copy_(
                [self.views[name] for name in stale], [places[name].views[name] for name in stale], non_blocking=True
            )
            nbytes = sum(self.arena.layout.slots[name].nbytes for name in stale)
        self._holds.update((name, places[name].serial) for name in stale)
        self.copied_nbytes += nbytes
        return nbytes
