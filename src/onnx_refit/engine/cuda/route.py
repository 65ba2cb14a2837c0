"""One pass over source weights on a GPU, by few kernels: looked at, copied, cast, computed, kept and compared."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from onnx_refit.engine.cuda import kernels
from onnx_refit.engine.cuda.addresses import Addresses
from onnx_refit.engine.cuda.arena import Arena, Layout, Slot
from onnx_refit.engine.cuda.aside import Places
from onnx_refit.engine.cuda.attached import Attached
from onnx_refit.engine.cuda.converting import Conversions, Made
from onnx_refit.engine.cuda.families import HALVES, NOWHERE, Formula, families, half_of
from onnx_refit.engine.cuda.filling import Filler
from onnx_refit.engine.cuda.gather import KINDS, upload
from onnx_refit.engine.cuda.lowering.operators import Tensor, torch_dtype
from onnx_refit.tensors import TensorSpec

_FILES = ("gather.cu", "halves.cu", "taking.cu")
_THREADS = 256
_PART = np.dtype(
    [("tensor", "<u4"), ("nbytes", "<u4"), ("from", "<u8"), ("to", "<u8"), ("keep", "<u8"), ("cast", "<u8")]
)
_PART_NBYTES = 32 << 10
_SAMPLERS = 8  # weights whose samples one block takes
_NOT_FINITE, _CHANGED, _ALIKE, _EACH = range(4)  # words of what kernels say, as in taking.cu


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
        plain: whether one kernel makes everything of the weights given alone.
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
        self.plain = not made and not self.rest and not read
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
        self._forget()
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

    def launch(self, stream: int, attached: Attached, before: int, after: int, weights: int, kept: int) -> None:
        """Enqueue everything where the route is plain and the tensors are dense: one kernel, on the current stream.

        Args:
            stream: the current stream.
            attached: where the weights lie.
            before: the address of the samples of the version before.
            after: where the new ones go.
            weights: where the engine weights go.
            kept: where what is kept goes.
        """
        self._forget()
        if self._known is None or self._known[0]() is not attached or self._addresses.noted is not self._known[1]:
            self._addresses.note(self._pointers(attached))
        self._take(stream, before, after, weights, kept)
        self._casts = self._narrows

    def _forget(self) -> None:
        """What kernels said of a refit before, which was waited for."""
        said = self._said
        if said[_NOT_FINITE] or said[_CHANGED] or said[_ALIKE]:
            self._found.zero_()

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
        if not (said[_NOT_FINITE] or said[_CHANGED] or said[_ALIKE]):
            return ()
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
