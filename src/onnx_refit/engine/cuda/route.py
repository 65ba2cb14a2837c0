"""One pass over source weights on a GPU, by few kernels: looked at, copied, cast, computed, kept and compared."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from onnx_refit.engine.cuda import kernels
from onnx_refit.engine.cuda.arena import Arena, Layout, Slot
from onnx_refit.engine.cuda.aside import Places
from onnx_refit.engine.cuda.attached import Attached
from onnx_refit.engine.cuda.families import HALVES, NOWHERE, Formula, families, half_of
from onnx_refit.engine.cuda.filling import Filler
from onnx_refit.engine.cuda.gather import KINDS, Part, cut, upload
from onnx_refit.engine.cuda.lowering.operators import Tensor, torch_dtype
from onnx_refit.engine.cuda.lowering.pointwise import walk_of
from onnx_refit.tensors import TensorSpec

_FILES = ("gather.cu", "halves.cu", "taking.cu")
_THREADS = 256
_PART = np.dtype(
    [("tensor", "<u4"), ("nbytes", "<u4"), ("from", "<u8"), ("to", "<u8"), ("keep", "<u8"), ("cast", "<u8")]
)
_PART_NBYTES = 32 << 10
_CONVERSION = np.dtype(
    [("to", "<u8"), ("source", "<u4"), ("target", "<u4"), ("sizes", "<u4", 4), ("strides", "<i8", 4)]
)
_STRETCH = 8 << 10  # elements
_SAMPLERS = 8  # weights whose samples one block takes
_NOT_FINITE, _CHANGED, _ALIKE, _EACH = range(4)  # words of what kernels say, as in taking.cu


class Addresses:
    """Addresses that kernels read, on a GPU; sent only when they change.

    Args:
        count: how many.
        device: the GPU.
    """

    def __init__(self, count: int, device: Any) -> None:
        self.device = device
        self._host = torch.zeros(max(1, count), dtype=torch.int64, pin_memory=True)
        self._memory = self._host.numpy()
        self._there = self._host.to(device)
        self._noted: Sequence[int] = ()
        self.address = self._there.data_ptr()

    def note(self, pointers: Sequence[int]) -> None:
        """Enqueue these. What was enqueued before must have been waited for."""
        if pointers is not self._noted and pointers != self._noted:
            self._memory[: len(pointers)] = pointers
            self._there.copy_(self._host, non_blocking=True)
        self._noted = pointers


class Route:
    """The tables and kernels that take some source weights, and make the engine weights that come of them.

    Args:
        own: the weights given that it looks at, keeps and samples.
        read: further weights that it reads.
        weights: the engine weights that it makes.
        layout: what lies where in their arena.
        aside: the same of what is kept.
        formulas: engine weights that are elementwise formulas.
        specs: of all source weights.
        places: where samples are taken.
        device: the GPU.
        beside: its second stream.

    Attributes:
        rest: engine weights among these that no kernel of ours makes.
    """

    def __init__(
        self,
        own: Sequence[str],
        read: Sequence[str],
        weights: Collection[str],
        layout: Layout,
        aside: Layout,
        formulas: Mapping[str, Formula],
        specs: Mapping[str, TensorSpec],
        places: Places,
        device: Any,
        beside: kernels.Beside,
    ) -> None:
        self._own, self._read, self._device, self._specs = tuple(own), tuple(read), device, specs
        self._sources = (*own, *read)
        self._addresses = Addresses(len(self._sources), device)
        index = {name: row for row, name in enumerate(self._sources)}
        sinks: dict[str, list[tuple[Slot, int]]] = {}
        for slot in layout.plain:
            cast = _cast(slot, specs[str(slot.source)])
            if cast is not None and slot.spec.name in weights:
                sinks.setdefault(str(slot.source), []).append((slot, cast))
        kept = {name: slot.offset for name, slot in aside.slots.items()}
        takes = {n: kept.get(n, NOWHERE) for n in own if n not in sinks and specs[n].dtype == "float32"}
        computed = {name: formula for name, formula in formulas.items() if name in weights}
        offsets = {name: layout.slots[name].offset for name in computed}
        made, taken = families(computed, offsets, self._addresses, index, half_of(layout, computed), takes)
        copied = {slot.spec.name for slots in sinks.values() for slot, _ in slots}
        self.rest = frozenset(weights) - copied - computed.keys()
        parts: list[tuple[int, int, int, int, int, int]] = []
        for name in own:
            if name not in taken:
                goals = [(slot.offset, cast) for slot, cast in sinks.get(name, [])] or [(NOWHERE, 0)]
                for turn, (to, cast) in enumerate(goals):
                    keep = kept.get(name, NOWHERE) if turn == 0 else NOWHERE
                    parts += _parts(index[name], specs[name].nbytes, to, keep, cast)
        rows = [places.row[name] for name in own]
        dtypes = [torch_dtype(specs[name].dtype, name) for name in own]
        self._found = torch.zeros(_EACH + len(own), dtype=torch.int32, pin_memory=True)
        self._said = memoryview(self._found.numpy())
        found = self._found.data_ptr()
        self._tables = [
            upload(np.array(parts, _PART), device),
            upload(np.array([KINDS.get(dtype, 0) for dtype in dtypes], np.int32), device),
            upload(np.array([places.itemsizes[row] for row in rows], np.int32), device),
            upload(np.array(rows, np.int32), device),
            upload(places.positions[rows], device),
        ]
        fixed = (self._addresses.address, *(table.data_ptr() for table in self._tables), len(own), found)
        blocks = len(parts) + -(-len(own) // _SAMPLERS)
        self._take = kernels.Prepared(kernels.kernel(_FILES, "take", device.index), device, blocks, _THREADS, fixed, 4)
        self._families = made
        self._compute = [family.prepared(found) for family in made]
        # The largest runs on the caller's stream, all others beside it: each alone leaves most of the GPU idle.
        self._beside = beside
        sizes = [4 * family.elements for family in made]
        self._largest = int(np.argmax([sum(part[1] for part in parts), *sizes]))
        self._alive: list[object] = []
        self._narrows = any(cast for slots in sinks.values() for _, cast in slots)
        self._casts = False
        # Neither keeps memory that was bound.
        self._conversions: tuple[weakref.ref[Attached], Conversions] | None = None
        self._known: tuple[weakref.ref[Attached], Sequence[int]] | None = None

    def enqueue(
        self,
        stream: int,
        attached: Attached,
        tensors: Sequence[Any],
        others: Mapping[str, Tensor],
        arena: Arena,
        kept: int,
        before: int,
        after: int,
        filler: Filler,
    ) -> None:
        """Enqueue everything, on the current stream and the one beside it: both must be waited for.

        Args:
            stream: the current stream.
            attached: where the given weights lie.
            tensors: the tensors they lie in.
            others: weights of the version before, dense.
            arena: takes the engine weights.
            kept: the address of what is kept.
            before: the address of the samples of the version before.
            after: where the new ones go.
            filler: makes what no kernel of ours makes.

        Raises:
            EngineError: an operator of the refit program failed.
        """
        said = self._said
        if said[_NOT_FINITE] or said[_CHANGED] or said[_ALIKE]:
            self._found.zero_()
        made = None if attached.dense else self._convert(attached, tensors)
        if made is None and not others:
            self._addresses.note(self._pointers(attached))
        else:
            known = dict(zip(attached.names, attached.pointers, strict=True))
            known |= {name: tensor.data_ptr() for name, tensor in others.items()}
            known |= {} if made is None else made.addresses
            self._addresses.note([known[name] for name in self._sources])
        weights = arena.storage.data_ptr()
        if self._compute:
            self._launch_all(stream, before, after, weights, kept)
        else:
            self._take(stream, before, after, weights, kept)
        self._casts = self._narrows or not attached.dense
        if self.rest:
            dense = {**others, **({} if made is None else made.tensors())}
            self._fill(attached, tensors, dense, arena, filler)

    def _launch_all(self, stream: int, before: int, after: int, weights: int, kept: int) -> None:
        """The largest kernel first, on the caller's stream, and all others beside it."""
        largest, beside = self._largest, self._beside
        beside.mark(stream)
        if largest:
            self._compute[largest - 1](stream, 0, weights, kept)
        else:
            self._take(stream, before, after, weights, kept)
        beside.follow()
        for place, compute in enumerate(self._compute, 1):
            if place != largest:
                compute(beside.stream, 0, weights, kept)
        if largest:
            self._take(beside.stream, before, after, weights, kept)

    def _pointers(self, attached: Attached) -> Sequence[int]:
        if self._known is None or self._known[0]() is not attached:
            known = dict(zip(attached.names, attached.pointers, strict=True))
            self._known = weakref.ref(attached), [known[name] for name in self._sources]
        return self._known[1]

    def _convert(self, attached: Attached, tensors: Sequence[Any]) -> Made:
        if self._conversions is None or self._conversions[0]() is not attached:
            self._conversions = weakref.ref(attached), Conversions(attached, self._specs, self._device)
        made = self._conversions[1].enqueue(attached, tensors, self._found.data_ptr())
        self._alive = [made]
        return made

    def _fill(
        self,
        attached: Attached,
        tensors: Sequence[Any],
        dense: Mapping[str, Tensor],
        arena: Arena,
        filler: Filler,
    ) -> None:
        named = {one.name: one for one in attached.lying}
        sources = {
            name: dense[name].view(self._specs[name].static_shape)
            if name in dense
            else attached.value(named[name], tensors)
            for name in self._sources
        }
        with torch.no_grad():
            filler.one_by_one(arena, sources, self.rest)

    def alike(self, *, look: bool) -> tuple[str, ...] | None:
        """After everything was waited for: the weights whose samples are those of before; None if one is unsound.

        Args:
            look: whether weights that are not finite are unsound where no cast makes them so.
        """
        said = self._said
        if self._alive:
            self._alive = []
        if said[_CHANGED] or (said[_NOT_FINITE] and (look or self._casts)):
            return None
        if not said[_ALIKE]:
            return ()
        return tuple(self._own[row] for row in np.flatnonzero(np.asarray(said)[_EACH:]).tolist())


def _cast(slot: Slot, spec: TensorSpec) -> int | None:
    """How a slot holds its source weight: 0 as it is, else the kind of its halves; None where kernels cannot tell."""
    if slot.nbytes == spec.nbytes:
        return 0
    return HALVES.get(slot.dtype) if spec.dtype == "float32" else None


def _parts(index: int, nbytes: int, to: int, keep: int, cast: int) -> list[tuple[int, int, int, int, int, int]]:
    return [
        (
            index,
            min(_PART_NBYTES, nbytes - begin),
            begin,
            NOWHERE if to == NOWHERE else to + (begin // 2 if cast else begin),
            NOWHERE if keep == NOWHERE else keep + begin,
            cast,
        )
        for begin in range(0, nbytes, _PART_NBYTES)
    ]


@dataclass(frozen=True)
class Made:
    """Weights that were made dense, to be held until they were read.

    Attributes:
        arena: those that were converted.
        computed: those that PyTorch's operators made.
        addresses: of all.
    """

    arena: Arena
    computed: Mapping[str, Tensor]
    addresses: Mapping[str, int]

    def tensors(self) -> dict[str, Tensor]:
        """All of them, flat or in their shapes."""
        return {**{name: self.arena.raw(name) for name in self.arena.layout.slots}, **self.computed}


class Conversions:
    """Makes dense weights of the declared dtypes out of tensors in other orders and dtypes, by one kernel.

    Args:
        attached: the weights.
        specs: as they are declared.
        device: the GPU.
    """

    def __init__(self, attached: Attached, specs: Mapping[str, TensorSpec], device: Any) -> None:
        self._device = device
        self._views = [one for one in attached.lying if not one.dense and one.tensor is not None]
        self._computed = [one for one in attached.lying if one.tensor is None]
        self._layout = Layout([specs[one.name] for one in self._views], torch.float32)
        rows, stretches = np.zeros(len(self._views), _CONVERSION), []
        for row, one in enumerate(self._views):
            walk = walk_of([one.shape], [one.strides])
            assert walk is not None  # else it were computed
            target = torch_dtype(specs[one.name].dtype, one.name)
            plain = 16 + target.itemsize
            casts = one.dtype is not target or target.is_floating_point
            kinds = (KINDS.get(one.dtype, plain), KINDS.get(target, plain)) if casts else (plain, plain)
            rows[row] = (self._layout.slots[one.name].offset, *kinds, walk.sizes, walk.strides[0])
            size = specs[one.name].size
            stretches += [(row, begin, min(_STRETCH, size - begin), 0) for begin in range(0, size, _STRETCH)]
        self._rows = upload(rows, device)
        self._stretches = upload(np.array(stretches, np.uint32), device)
        self._count = len(stretches)
        self._addresses = Addresses(len(self._views), device)
        pointers = dict(zip(attached.names, attached.pointers, strict=True))
        self._pointers = [pointers[one.name] for one in self._views]
        self._kernel = kernels.kernel(_FILES, "convert", device.index)

    def enqueue(self, attached: Attached, tensors: Sequence[Any], found: int) -> Made:
        """Enqueue it all; what is made must be held until it was read.

        Args:
            attached: the weights.
            tensors: what the weights lie in.
            found: the address of what kernels say.
        """
        arena = Arena(self._layout, self._device)
        begin = int(arena.storage.data_ptr())
        addresses = {name: begin + slot.offset for name, slot in self._layout.slots.items()}
        if self._count:
            self._addresses.note(self._pointers)
            tables = (self._addresses.address, self._rows.data_ptr(), self._stretches.data_ptr())
            arguments = (*tables, begin, int(attached.rounding), found)
            kernels.launch(self._kernel, self._device, (self._count,), (_THREADS,), arguments)
        with torch.no_grad():
            computed = {one.name: attached.value(one, tensors) for one in self._computed}
        return Made(arena, computed, addresses | {name: value.data_ptr() for name, value in computed.items()})


class Comparison:
    """Tells which of some weights have the same bytes in two places.

    Args:
        names: the weights.
        sizes: bytes of each.
        device: the GPU.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], device: Any) -> None:
        self.names, self._device = tuple(names), device
        pieces = cut([Part(torch.uint8, (size,), size) for size in sizes], [(row, 0) for row in range(len(names))])
        self._pieces = upload(pieces, device)
        self._addresses = Addresses(2 * len(names), device)
        self._found = torch.zeros(max(1, len(names)), dtype=torch.int32, pin_memory=True)
        left = self._addresses.address
        fixed = (left, left + 8 * len(names), self._pieces.data_ptr(), self._found.data_ptr())
        differ = kernels.kernel(_FILES, "differ", device.index)
        self._differ = kernels.Prepared(differ, device, len(pieces), _THREADS, fixed, 0) if len(pieces) else None

    def equal(self, left: Sequence[int], right: Sequence[int]) -> frozenset[str]:
        """Those whose bytes are the same.

        Args:
            left: an address of each, where wide loads are allowed.
            right: another one.
        """
        self._found.zero_()
        if self._differ is not None:
            stream = kernels.current_stream(self._device)
            self._addresses.note([*left, *right])
            self._differ(stream)
            kernels.wait(stream)
        return frozenset(name for name, differs in zip(self.names, self._found.tolist(), strict=False) if not differs)
