"""Source weights on this device become a weight set there: checked, derived, kept and compared in one pass."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch

from onnx_refit.engine.cuda import kernels
from onnx_refit.engine.cuda.arena import Arena, Layout
from onnx_refit.engine.cuda.aside import Marks, Places, PutAside, marks_of
from onnx_refit.engine.cuda.attached import Attached
from onnx_refit.engine.cuda.by_operators import Given
from onnx_refit.engine.cuda.comparing import Comparison
from onnx_refit.engine.cuda.filling import Filler
from onnx_refit.engine.cuda.folding import Folding, Unfolded
from onnx_refit.engine.cuda.lowering.operators import Tensor, torch_dtype
from onnx_refit.engine.cuda.memory import Recycled
from onnx_refit.engine.cuda.route import Route
from onnx_refit.engine.cuda.streams import on_device
from onnx_refit.engine.cuda.weightset import CudaWeightSet
from onnx_refit.engine.protocol import Holder, Taken
from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.plan.evaluate import affected, required
from onnx_refit.tensors import Array, TensorSpec

T = TypeVar("T")

_ROUTES = 8  # sets of given weights whose tables are kept
_EARLY = 0.7  # of all bytes: on their way while the other weights are looked at
_MANY = 48  # weights from which looking at tensors takes as long as taking many of them


@dataclass(frozen=True)
class Wanted:
    """What a set of source weights changes.

    Attributes:
        given: the source weights.
        weights: the engine weights that are made anew.
        layout: of these.
        whole: whether all source weights are given.
        aside: of the given weights that are kept as they are.
        folding: makes those of the engine weights that are left to be made; None where none are.
        others: source weights that are read too, and that the version before has.
        first: those given that are worth taking before the others are looked at; none where it does not matter.
    """

    given: tuple[str, ...]
    weights: frozenset[str]
    layout: Layout
    whole: bool
    aside: Layout
    folding: Folding | None
    others: tuple[str, ...]
    first: frozenset[str]

    @property
    def now(self) -> frozenset[str]:
        """The engine weights that are made at once."""
        return self.weights if self.folding is None else self.weights - self.folding.names


@dataclass(frozen=True)
class _Last:
    """Tensors, and what is looked up of them; it keeps no tensor's memory."""

    attached: weakref.ref[Attached]
    wanted: Wanted
    places: Places
    routes: tuple[Route, ...]
    alone: tuple[Route, ...]  # the first of them
    simple: bool  # all weights, by one kernel that reads them as they lie


class Taker:
    """Takes source weights that lie on one device. Not thread-safe: refits come one at a time.

    Args:
        compiled: the plan's portable part.
        layout: of a whole weight set.
        filler: makes engine weights that kernels of ours do not.
        device: where.
        real: the dtype that stands for float32.
        recoverable: source weight -> the engine weight that holds it bit for bit.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        layout: Layout,
        filler: Filler,
        device: Any,
        real: Any,
        recoverable: Mapping[str, str],
    ) -> None:
        self._compiled = compiled
        self._layout = layout
        self._filler = filler
        self._device = device
        self._index = 0 if device.index is None else device.index
        self._recoverable = recoverable
        self._specs: Mapping[str, TensorSpec] = {source.spec.name: source.spec for source in compiled.sources}
        self._kernels = device.type == "cuda" and kernels.available()
        self._wanted: OrderedDict[tuple[str, ...], Wanted] = OrderedDict()
        self._routes: OrderedDict[tuple[str, ...], tuple[Route, ...]] = OrderedDict()
        self._comparison: Comparison | None = None  # that of the last refit: what is frozen stays frozen
        self._last: _Last | None = None
        self._unsettled = False
        self._beside: Any = kernels.Beside(device) if self._kernels else None
        self._synchronize: Any = kernels.waiter() if self._kernels else None
        self._nothing = Arena(Layout([], torch.float32), device)
        self._nothing_kept = PutAside(self._nothing, self._specs)
        self._positions: Mapping[str, Array] | None = None
        self._places: Places | None = None

    def take(
        self,
        attached: Attached,
        tensors: Sequence[Any],
        base: CudaWeightSet,
        holder: Holder,
        positions: Mapping[str, Array],
        before: Mapping[str, bytes],
        look: bool,
    ) -> Taken | None:
        """See ``InPlace.take``."""
        last = self._last
        if last is None or positions is not self._positions or last.attached() is not attached:
            # Names are looked up when other tensors come: hundreds of them take microseconds.
            last = self._prepare(attached, positions)
        wanted, places = last.wanted, last.places
        marks = before if type(before) is Marks and before.places is places else marks_of(before, places)
        now = Marks(places)
        if last.simple and attached.held:
            return self._take_at_once(last, attached, tensors, marks, now, look)
        arena, aside = self._memory(wanted)
        if not wanted.whole:
            now.there.copy_(marks.there)
        others = {name: self._other(name, base, holder) for name in wanted.others} if wanted.others else {}
        if not self._kernels:
            old, new = marks.there, now.there
            given = Given(attached, tensors, self._specs, places, self._device)
            alike = given.take(old, new, aside, look=look)
            if alike is not None:
                self._filler.fill(arena, {**given.values, **others}, wanted.now)
                if self._device.type == "cuda":
                    kernels.synchronize(self._device)
            return Taken(self._made(wanted, base, arena), PutAside(aside, self._specs), now, lambda: alike)
        stream = kernels.current_stream(self._device)
        if self._unsettled:
            self._wait(stream)
        self._unsettled = True
        try:
            routes = self._enqueue(stream, attached, tensors, last, others, arena, aside, marks.address, now.address)
        except BaseException:
            self._wait(stream)
            raise
        if not routes and not attached.held:
            self._wait(stream)
            return None
        settle = partial(self._settle, stream, attached, tensors, routes, look, marks)
        return Taken(self._made(wanted, base, arena), PutAside(aside, self._specs), now, settle)

    def _take_at_once(
        self, last: _Last, attached: Attached, tensors: Sequence[Any], marks: Marks, now: Marks, look: bool
    ) -> Taken:
        """All weights, out of memory that somebody holds, by one kernel: launched before anything else is made.

        For small models calls of Python are most of a refit, so there are few here.
        """
        folding, layout, stream = last.wanted.folding, self._layout, torch._C._cuda_getCurrentRawStream(self._index)
        if self._unsettled:
            self._wait(stream)
        memory = self._recycled.memory()
        begin = memory.address
        self._unsettled = True
        last.routes[0].launch(stream, attached, marks.address, now.address, begin, begin + layout.stem)
        settle = partial(self._settle, stream, attached, tensors, last.alone, look, marks)
        if folding is None:
            arena = Arena(layout, self._device, memory.storage, 0, memory)
            return Taken(CudaWeightSet(arena), self._nothing_kept, now, settle)
        unfolded = Unfolded(folding, memory)
        return Taken(CudaWeightSet(unfolded), PutAside(unfolded.kept(), self._specs), now, settle)

    def _memory(self, wanted: Wanted) -> tuple[Arena, Arena]:
        """For what is made, and for what is kept."""
        if wanted.folding is not None:
            arena = Unfolded(wanted.folding, self._recycled.memory())
            return arena, arena.kept()
        made = Arena(wanted.layout, self._device)
        return made, Arena(wanted.aside, self._device) if wanted.aside.nbytes else self._nothing

    def unfolded(self) -> Unfolded:
        """Memory for a whole set, some of whose weights are made later; it is not used again at once."""
        made = Unfolded(self._folding, self._recycled.memory())
        made.keep()
        return made

    def close(self) -> None:
        """Give back memory that no version holds."""
        self._recycled.clear()

    @cached_property
    def _recycled(self) -> Recycled:
        """Of a whole set."""
        return Recycled(self._folding.nbytes if self._layout.behind else self._layout.room, self._device)

    @cached_property
    def _folding(self) -> Folding:
        return Folding(self._layout, self._filler.kept, self._specs, self._filler, self._device)

    def _settle(
        self,
        stream: int,
        attached: Attached,
        tensors: Sequence[Any],
        routes: Sequence[Route],
        look: bool,
        held: object,
    ) -> Sequence[str] | None:
        """See ``Taken.settle``; ``held`` is what kernels read and must not be given back before."""
        same = not attached.held or attached.form.same(tensors)
        if torch._C._cuda_getDevice() == self._index:
            self._synchronize(stream)
            if self._beside.busy:
                self._beside.wait()
        else:
            with on_device(self._device):
                self._wait(stream)
        self._unsettled = False
        if not same:
            return None
        if len(routes) == 1:
            return routes[0].alike(look=look)
        found = [route.alike(look=look) for route in routes]
        return None if None in found else [name for names in found if names for name in names]

    def _wait(self, stream: int) -> None:
        """Wait for everything; on the current device."""
        kernels.wait(stream)
        self._beside.wait()

    def _made(self, wanted: Wanted, base: CudaWeightSet, arena: Arena) -> CudaWeightSet:
        if wanted.layout is self._layout:
            return CudaWeightSet(arena)
        everywhere = {**base.places, **dict.fromkeys(wanted.weights, arena)}
        return CudaWeightSet(arena, everywhere, base.nbytes - wanted.layout.payload)

    def _enqueue(
        self,
        stream: int,
        attached: Attached,
        tensors: Sequence[Any],
        last: _Last,
        others: Mapping[str, Tensor],
        arena: Arena,
        aside: Arena,
        before: int,
        after: int,
    ) -> Sequence[Route]:
        """Everything by kernels of ours; nothing where the tensors are not the ones that were attached.

        Nothing is read before it is known to be there. Where somebody holds the memory it is, and the tensors are
        looked at later; else a few large weights are looked at first, and all others while these are on their way.
        """
        routes, kept = last.routes, aside.pointer
        if attached.held:
            routes[0].enqueue(stream, attached, tensors, others, arena, kept, before, after, self._filler)
            return routes[:1]
        parted = len(routes) > 1 and attached.dense
        forms = attached.parted(last.wanted.first, tensors) if parted else (attached.form,)
        chosen = routes[1:] if parted else routes[:1]
        for route, form in zip(chosen, forms, strict=True):
            if not form.same(tensors):
                return ()
            route.enqueue(stream, attached, tensors, others, arena, kept, before, after, self._filler)
        return chosen

    def _prepare(self, attached: Attached, positions: Mapping[str, Array]) -> _Last:
        """What is looked up of tensors when they are not those of the refit before."""
        if positions is not self._positions or self._places is None:
            self._positions, self._places = positions, Places(self._specs, positions, self._device)
            self._routes.clear()
        names = attached.names
        wanted = self._wanted.get(names) or self._want(names)
        routes = (self._routes.get(names) or self._route(wanted)) if self._kernels else ()
        kept = wanted.folding is not None or not wanted.aside.nbytes
        simple = wanted.whole and kept and attached.dense and len(routes) > 0 and routes[0].plain
        self._last = _Last(weakref.ref(attached), wanted, self._places, routes, routes[:1], simple)
        return self._last

    def _want(self, given: tuple[str, ...]) -> Wanted:
        program, kept = self._compiled.program, self._specs.keys() - self._recoverable.keys()
        whole = len(given) == len(self._specs)
        weights = frozenset(self._layout.slots) if whole else affected(program, frozenset(given))
        folding = self._folding if whole and self._layout.behind else None
        aside = Layout([self._specs[name] for name in given if name in kept], torch.float32)
        needed = required(program, weights) - frozenset(given)
        others = tuple(name for name in self._specs if name in needed)
        layout = self._layout if len(weights) == len(self._layout.slots) else self._layout.part(weights)
        first = frozenset() if len(given) < _MANY else self._large(weights) & frozenset(given)
        first = first if 2 * len(first) <= len(given) else frozenset()
        return _remember(self._wanted, given, Wanted(given, weights, layout, whole, aside, folding, others, first))

    def _large(self, weights: frozenset[str]) -> frozenset[str]:
        """The source weights of the largest engine weights, which make up most of all bytes."""
        sizes = {name: self._layout.slots[name].nbytes for name in weights}
        left, found = _EARLY * sum(sizes.values()), set[str]()
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            if left <= 0:
                break
            left -= sizes[name]
            found |= self._compiled.program.dependencies[name]
        return frozenset(found)

    def _route(self, wanted: Wanted) -> tuple[Route, ...]:
        """One route for everything, and, where that is worthwhile, two that do the same one after the other."""
        now = wanted.now
        formulas = {name: self._filler.formulas[name] for name in now if name in self._filler.formulas}
        places = self._places
        assert places is not None

        def made(own: Sequence[str], weights: frozenset[str]) -> Route:
            needed = required(self._compiled.program, weights) - frozenset(own)
            read = [name for name in self._specs if name in needed]
            layout, aside, specs = wanted.layout, wanted.aside, self._specs
            return Route(own, read, weights, layout, aside, formulas, specs, places, self._device, self._beside)

        routes: tuple[Route, ...] = (made(wanted.given, now),)
        if wanted.first and not routes[0].rest and not wanted.others:
            large = [name for name in wanted.given if name in wanted.first]
            left = [name for name in wanted.given if name not in wanted.first]
            own = frozenset(large)
            early = frozenset(w for w in now if self._compiled.program.dependencies[w] <= own)
            routes = (*routes, made(large, early), made(left, now - early))
        return _remember(self._routes, wanted.given, routes)

    def _other(self, name: str, base: CudaWeightSet, holder: Holder) -> Tensor:
        """A source weight of the version before, dense, flat or in its shape."""
        engine = self._recoverable.get(name)
        if engine is not None:
            raw = base.places[engine].raw(engine)
            return raw.view(self._specs[name].static_shape)
        held = holder(name)
        if isinstance(held, PutAside) and held.device == self._device:
            return held.there(name).view(self._specs[name].static_shape)
        spec = self._specs[name]
        array = np.ascontiguousarray(held[name]).reshape(-1).view(np.uint8)
        flat = torch.from_numpy(array.copy()).to(self._device)
        return flat.view(torch_dtype(spec.dtype, name)).view(spec.static_shape)

    def equal(
        self, names: Sequence[str], left: tuple[CudaWeightSet, Holder], right: tuple[CudaWeightSet, Holder]
    ) -> frozenset[str]:
        """See ``InPlace.equal``."""
        if not self._kernels:
            pairs = {name: (self._other(name, *left), self._other(name, *right)) for name in names}
            return frozenset(name for name, (one, other) in pairs.items() if _same_bits(one, other))
        alive: list[Tensor] = []
        one, other = (self._addresses(names, *side, alive) for side in (left, right))
        if self._comparison is None or self._comparison.names != tuple(names):
            self._comparison = Comparison(names, [self._specs[name].nbytes for name in names], self._device)
        return self._comparison.equal(one, other)

    def _addresses(
        self, names: Sequence[str], weights: CudaWeightSet, holder: Holder, alive: list[Tensor]
    ) -> list[int]:
        """Of source weights of a version; what had to be brought to the device is put where it stays alive."""
        engines, slots = self._recoverable, self._layout.slots
        whole = weights.arena.layout is self._layout
        begin = int(weights.arena.storage.data_ptr())
        found = []
        last: PutAside | None = None  # most are in one
        aside, there = 0, slots
        for name in names:
            engine = engines.get(name)
            if engine is not None and whole:
                found.append(begin + slots[engine].offset)
            elif engine is not None:
                found.append(weights.places[engine].address(engine))
            elif (held := holder(name)) is last and last is not None:
                found.append(aside + there[name].offset)
            elif type(held) is PutAside and held.device == self._device:
                last, aside, there = held, held.begin, held.slots
                found.append(aside + there[name].offset)
            else:
                alive.append(self._other(name, weights, holder))
                found.append(int(alive[-1].data_ptr()))
        return found


def _remember(cache: OrderedDict[tuple[str, ...], T], key: tuple[str, ...], value: T) -> T:
    cache[key] = value
    while len(cache) > _ROUTES:
        cache.popitem(last=False)
    return value


def _same_bits(one: Tensor, other: Tensor) -> bool:
    left, right = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return bool(torch.equal(left, right))
