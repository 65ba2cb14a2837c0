"""All engine weights that native code writes, as batches of moves: one call for each thread, whatever the model."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from onnx_refit.engine.onnxruntime.buffers import Rack, Storage
from onnx_refit.engine.onnxruntime.covering import covered
from onnx_refit.engine.onnxruntime.moving import Slots, Unit, look_slots, looking, looks, units, watchable
from onnx_refit.engine.onnxruntime.programs import Part, Program, compiled, part_of
from onnx_refit.engine.protocol import Look
from onnx_refit.errors import EngineError
from onnx_refit.moves.addresses import address_of
from onnx_refit.moves.library import BATCH, NOWHERE, Library
from onnx_refit.moves.roll import Called
from onnx_refit.plan.trace.recipes import Recipe
from onnx_refit.tensors import Array

_STREAMED = 8 << 20  # bytes written; more do not stay in the caches anyway
_COUNT = BATCH.index("count")
_KEPT = 8  # lists of moves for partial refits
_NONE: Mapping[str, Storage] = {}


@dataclass(frozen=True)
class _Whole:
    """What is the same whenever everything is written from sources whose addresses are known.

    Attributes:
        template: addresses, but those of targets and of sources.
        program: the moves.
        pairs: slot of a source, and its place in the roll.
    """

    template: array[int]
    program: Program
    pairs: Sequence[tuple[int, int]]


class Ready(NamedTuple):
    """A batch to be worked on, with everything that it points at.

    Attributes:
        header: the batch.
        elements: how many it writes.
        flags: of each look a byte, which is set where something was seen that is not finite.
        looks: the looks.
        held: what must stay alive.
    """

    header: array[int]
    elements: int
    flags: bytearray
    looks: Sequence[Look]
    held: tuple[object, ...]

    @property
    def units(self) -> int:
        """How many units it has."""
        return self.header[_COUNT]

    @property
    def address(self) -> int:
        """What ``Library.work`` takes."""
        return self.header.buffer_info()[0]

    def tell(self) -> None:
        """Tell the looks what was seen: once nobody works on it any more."""
        if any(self.flags):
            for look, flag in zip(self.looks, self.flags, strict=False):
                if flag:
                    look.suspect()


class Batcher:
    """Makes batches. One at a time.

    Attributes:
        names: the engine weights that it can write.
        seen: the source weights that it can look at: those that are read by these only.

    Args:
        library: the native code.
        recipes: engine weight -> its recipe.
        dtypes: of every tensor that recipes read.
        sizes: elements of these.
        carriers: source weight -> the engine weight that is written while it is looked at; its tensor's name.
        prefix: what the names of source weights begin with in recipes.
    """

    def __init__(
        self,
        library: Library,
        recipes: Mapping[str, Recipe],
        dtypes: Mapping[str, np.dtype[np.generic]],
        sizes: Mapping[str, int],
        carriers: Mapping[str, str],
        prefix: str,
    ) -> None:
        self.library = library
        self._slots = Slots()
        written: dict[str, tuple[Unit, ...]] = {}
        carried: dict[str, dict[str, str]] = {}
        for source, writer in carriers.items():
            carried.setdefault(writer, {})[prefix + source] = f"moved:{source}"
        moved: dict[str, str] = {}  # tensor -> slot
        for name, recipe in recipes.items():
            flags = covered(recipe, dtypes, sizes, carried.get(name, {}))
            moved.update(flags)
            made = units(recipe, dtypes, sizes, _target(name), self._slots, flags)
            if made is not None:
                written[name] = made
        self.names = frozenset(written)
        self._alone: dict[str, Part] = {}
        self._look_slots: dict[str, tuple[int, int, int]] = {}
        self._moved_slots: dict[str, int] = {}
        for source in sorted({name.removeprefix(prefix) for name in dtypes if name.startswith(prefix)}):
            carrier, tensor = carriers.get(source), prefix + source
            if not watchable(dtypes[tensor]) or (carrier is not None and carrier not in self.names):
                continue
            if carrier is None:
                self._alone[source] = part_of(looks(source, dtypes[tensor], sizes[tensor], self._slots))
            else:
                written[carrier] = looking(written[carrier], tensor, source, dtypes[tensor], sizes[tensor], self._slots)
            a, b, c = (self._slots[slot] for slot in look_slots(source))
            self._look_slots[source] = a, b, c
            if tensor in moved:
                self._moved_slots[source] = self._slots[moved[tensor]]
        self.seen = frozenset(self._look_slots)
        self._prefix = prefix
        self._parts = {name: part_of(parts) for name, parts in written.items()}
        self._targets = {name: self._slots[_target(name)] for name in written}
        self._reads = {name: self._slots.numbers[name] for name in dtypes if name in self._slots.numbers}
        self._programs: dict[tuple[frozenset[str], frozenset[str]], Program] = {}
        self._forms = {name: (dtype, sizes[name] * dtype.itemsize) for name, dtype in dtypes.items()}
        self._steady: Mapping[str, Array] = {}
        self._template = array("Q")
        self._unsettled: tuple[Program | None, Sequence[tuple[str, int]]] = None, ()
        self._pairs: Sequence[tuple[int, int]] | None = None
        self._whole: _Whole | None = None
        self._flag = bytearray(1)
        self._seen_beside: tuple[Mapping[str, Array] | None, bool] = None, False
        self._settle(self._steady)

    def ready(
        self,
        targets: Mapping[str, Storage],
        tensors: Mapping[str, Array],
        steady: Mapping[str, Array],
        claims: Mapping[str, Look],
        rack: Rack | None = None,
        called: Called | None = None,
    ) -> Ready:
        """A batch that writes these engine weights and looks at these sources.

        Args:
            targets: engine weight -> where it goes; of ``names`` only.
            tensors: the flat, C-contiguous tensors that their recipes read.
            steady: some of them, in the very same memory as long as this is the same mapping.
            claims: source weight -> what to do with each of its elements; of ``seen`` only.
            rack: where some of the targets lie, or all.
            called: the source weights, if their addresses are known: then ``tensors`` need not have them.

        Raises:
            KeyError: a tensor is missing.
            EngineError: a tensor is not what its recipe takes.
        """
        program = self._program(targets, claims)
        if steady is not self._steady:
            self._settle(steady)
        # Arrays of the standard library: many single elements are written, which NumPy is slow at; and copying a list
        # touches every number in it.
        places = self._targets
        single: Iterable[tuple[str, Storage]] = targets.items()
        if rack is None:
            addresses = self._template[:]
        else:
            addresses = self._racked(rack)[:]
            racked = rack.storages
            single = [] if targets is racked else [(n, s) for n, s in single if n not in racked]
        for name, storage in single:
            addresses[places[name]] = storage.address
        if program is not self._unsettled[0]:
            self._pairs = None
            self._unsettled = program, [read for read in program.reads if not self._template[read[1]]]
        if called is None or called.addresses is None:
            for name, slot in self._unsettled[1]:
                addresses[slot] = self._address(name, tensors[name])
        else:
            for slot, place in self._called(called):
                addresses[slot] = called.addresses[place]
        flags = bytearray(len(claims) + 1)
        first = _buffer(flags)
        kept = 0
        for number, (name, look) in enumerate(claims.items()):
            target = look.keep
            if target is None and name in self._moved_slots:
                if look.watched:
                    addresses[self._moved_slots[name]] = first + number
                continue
            where, keep, flag = self._look_slots[name]
            tensor = self._prefix + name
            addresses[where] = addresses[self._reads.get(tensor, NOWHERE)]
            if not addresses[where]:
                flat = tensors[tensor] if called is None else called[name].reshape(-1)
                addresses[where] = self._address(tensor, flat)
            if target is not None:
                addresses[keep] = self._address(tensor, target)
                kept += target.nbytes
            if look.watched:
                addresses[flag] = first + number
        stream = int(program.nbytes + kept > _STREAMED)
        header = array("q", (*program.places, addresses.buffer_info()[0], len(program.bounds) - 1, stream, 0, 0))
        held = program, addresses, tensors, steady, targets, called
        return Ready(header, program.elements, flags, tuple(claims.values()), held)

    def sees(self, called: Called, lasting: Mapping[str, Array]) -> bool:
        """Whether it can look at each of these that is not lasting."""
        if self._seen_beside[0] is not lasting:
            self._seen_beside = lasting, called.keys() - lasting.keys() <= self.seen
        return self._seen_beside[1]

    def ready_all(
        self, called: Called, steady: Mapping[str, Array], rack: Rack, hosted: Mapping[str, Storage]
    ) -> Ready:
        """A batch that writes every engine weight and looks at every source that is not steady: see ``sees``.

        Asked again for the same rack it does nothing but fill in where the sources are. The one flag is of them all.

        Args:
            called: all source weights, their addresses known.
            steady: see ``ready``.
            rack: where the targets lie, but those in ``hosted``.
            hosted: the same mapping as long as it is the same memory.
        """
        if steady is not self._steady:
            self._settle(steady)
        whole = self._whole
        if whole is None:
            whole = self._whole = self._made_whole(called)
        addresses = self._racked(rack, whole, hosted)
        found = called.addresses
        assert found is not None
        for slot, place in whole.pairs:
            addresses[slot] = found[place]
        self._flag[0] = 0
        program = whole.program
        stream = int(program.nbytes > _STREAMED)
        header = array("q", (*program.places, addresses.buffer_info()[0], len(program.bounds) - 1, stream, 0, 0))
        return Ready(header, program.elements, self._flag, (), (program, addresses, steady, rack, hosted, called))

    def _made_whole(self, called: Called) -> _Whole:
        places = {self._prefix + name: place for place, name in enumerate(called)}
        looked = [name for name in called if self._prefix + name not in self._steady]
        program = self._program(self.names, looked)
        pairs = [(slot, places[name]) for name, slot in program.reads if not self._template[slot]]
        template = self._template[:]
        for name in looked:
            if name in self._moved_slots:
                template[self._moved_slots[name]] = _buffer(self._flag)
            else:
                where, _, flag = self._look_slots[name]
                pairs.append((where, places[self._prefix + name]))
                template[flag] = _buffer(self._flag)
        return _Whole(template, program, pairs)

    def work(self, ready: Ready) -> None:
        """Do units of a batch until none is left to begin; any number of threads may.

        Native code knows addresses only: each thread that is in it holds the batch, for an interrupt may take whoever
        waits for the threads away.
        """
        self.library.work(ready.address)

    def _address(self, name: str, flat: Array) -> int:
        dtype, nbytes = self._forms[name]
        if flat.nbytes != nbytes or (flat.dtype is not dtype and flat.dtype != dtype) or not flat.flags.c_contiguous:
            raise EngineError(f"{flat.nbytes} bytes of {flat.dtype} instead of {nbytes} of {dtype}", where=name)
        return address_of(flat)

    def rest(self) -> None:
        """Keep no steady tensor alive."""
        self._settle({})
        self._seen_beside = None, False

    def _called(self, called: Called) -> Sequence[tuple[int, int]]:
        """Slots that are not settled, and the place of each one's tensor in the roll, which never changes."""
        if self._pairs is None:
            places = {self._prefix + name: place for place, name in enumerate(called)}
            self._pairs = [(slot, places[name]) for name, slot in self._unsettled[1]]
        return self._pairs

    def _racked(self, rack: Rack, whole: _Whole | None = None, hosted: Mapping[str, Storage] = _NONE) -> array[int]:
        """A template with the addresses of a rack's storages, and of others, made once."""
        template = self._template if whole is None else whole.template
        key = rack.prepared
        if key is None or key[0] is not template or key[1] is not hosted:
            filled = template[:]
            for storages in (rack.storages, hosted):
                for name, storage in storages.items():
                    if name in self._targets:
                        filled[self._targets[name]] = storage.address
            key = rack.prepared = template, hosted, filled
        made: array[int] = key[2]
        return made

    def _settle(self, steady: Mapping[str, Array]) -> None:
        """Make a table of addresses in which those of the steady tensors are filled in."""
        template = array("Q", bytes(8 * len(self._slots.numbers)))
        for name, flat in steady.items():
            if name in self._reads:
                template[self._reads[name]] = self._address(name, flat)
        self._template, self._steady, self._unsettled, self._pairs = template, steady, (None, ()), None
        self._whole = None

    def _program(self, targets: Collection[str], claims: Iterable[str]) -> Program:
        alone = frozenset(name for name in claims if name in self._alone) if self._alone else frozenset()
        names = self.names if len(targets) == len(self.names) else frozenset(targets)
        key = names, alone
        found = self._programs.get(key)
        if found is None:
            chosen = [self._parts[name] for name in sorted(names)]
            chosen += [self._alone[name] for name in sorted(alone)]
            if len(self._programs) > _KEPT:
                self._programs.clear()
            found = self._programs[key] = compiled(chosen, self._reads)
            if names is self.names:  # parts of it from now on: moves are not small beside small weights
                self._parts.update(zip(sorted(names), found.parts, strict=False))
        return found


def _buffer(memory: bytearray) -> int:
    """The address of memory that nobody changes the size of."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _target(name: str) -> str:
    return f"target:{name}"
