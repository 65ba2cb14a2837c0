"""Writes engine weights from source weights: computes, stages, and shares the work among threads.

Native code moves all that is only moved or scaled, in one call a thread; Python writers do the rest, and everything
where no native code was compiled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx

from onnx_refit.engine.onnxruntime.batch import Batcher, Ready
from onnx_refit.engine.onnxruntime.buffers import Rack, Storage
from onnx_refit.engine.onnxruntime.crew import Task
from onnx_refit.engine.onnxruntime.packer import Caster, Packer
from onnx_refit.engine.onnxruntime.program import Program
from onnx_refit.engine.onnxruntime.specialise import COMPUTED, SOURCE, Specialised
from onnx_refit.engine.onnxruntime.steady import UNSTEADY, Steady
from onnx_refit.engine.onnxruntime.traffic import Traffic
from onnx_refit.engine.onnxruntime.workers import Workers
from onnx_refit.engine.onnxruntime.writers import WIDE, Writer, alone
from onnx_refit.engine.protocol import Inspector, Look
from onnx_refit.errors import EngineError
from onnx_refit.moves.library import Absent, Library
from onnx_refit.moves.roll import Called
from onnx_refit.plan.trace.recipes import Recipe, evaluate
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype

_LARGE = 32 << 20  # bytes of weights; for less, the memory that packers keep would be seen beside them


_NOTHING: Mapping[str, Array] = {}


def _computed(needs: Mapping[str, str]) -> Sequence[str]:
    """The computed values among these tensors."""
    return [name for prefixed, name in needs.items() if prefixed.startswith(COMPUTED)]


def _rest(sources: Mapping[str, Array], steady: Steady) -> Iterable[str]:
    """The sources that are not in lasting memory."""
    if len(sources) == len(steady.lasting) + len(steady.rest):
        return steady.rest
    return sources.keys() - steady.lasting.keys()


def _besides(targets: Mapping[str, Storage], rack: Rack | None) -> Collection[Storage]:
    """The targets that are not in the rack, all of whose storage is."""
    if rack is None:
        return targets.values()
    if len(targets) == len(rack.storages):
        return ()
    return [storage for name, storage in targets.items() if name not in rack.storages]


def _carriers(recipes: Mapping[str, Recipe]) -> dict[str, str]:
    """Source weight -> the engine weight that is written while it is looked at: the largest that reads it."""
    carried: dict[str, str] = {}
    for name, recipe in recipes.items():
        for read in recipe.sources:
            source = read.removeprefix(SOURCE)
            held = carried.get(source)
            if read.startswith(SOURCE) and (held is None or recipes[held].spec.size < recipe.spec.size):
                carried[source] = name
    return carried


class Deriver:
    """Derives engine weights. Thread-safe.

    Args:
        specialised: the recipes.
        program: the refit program's graph.
        shapes: every source weight.
        block: the host's block size.
        threads: threads to write with.
        library: the native code, or why there is none.
    """

    def __init__(
        self,
        specialised: Specialised,
        program: onnx.ModelProto | None,
        shapes: Mapping[str, TensorSpec],
        block: int,
        threads: int,
        library: Library | Absent,
    ) -> None:
        self._staged = specialised.staged
        self._program = Program(program, specialised.computed, threads)
        read = {SOURCE + name: spec for name, spec in shapes.items()}
        read.update((COMPUTED + name, spec) for name, spec in specialised.computed.items())
        read.update((name, recipe.spec) for name, recipe in specialised.staged.items())
        dtypes = {name: numpy_dtype(spec.dtype) for name, spec in read.items()}
        sizes = {name: spec.size for name, spec in read.items()}
        self._keys = {name: SOURCE + name for name in shapes}
        self._carried = _carriers(specialised.buffers)
        self._batcher: Batcher | None = None
        others = dict(specialised.buffers)
        if isinstance(library, Library):
            self._batcher = Batcher(library, others, dtypes, sizes, self._carried, SOURCE)
            others = {name: recipe for name, recipe in others.items() if name not in self._batcher.names}
        large = sum(recipe.spec.nbytes for recipe in others.values()) >= _LARGE
        self._packer = packer = Packer(block, arena=large) if block > 1 and others else None
        self._writers = {name: Writer(recipe, dtypes, packer, block) for name, recipe in others.items()}
        self._widens = any(writer.widened for writer in self._writers.values())
        self._count = len(specialised.buffers)
        self._elements = sum(recipe.spec.size for recipe in specialised.buffers.values())
        self._reads = {name: self._closure(recipe) for name, recipe in specialised.buffers.items()}
        self._plain = {key: name for name, key in self._keys.items()}
        self._sources = {n: self._only_sources(reads, self._program.sources_of) for n, reads in self._reads.items()}
        self._needed = {n: self._only_sources(reads, self._program.needed_for) for n, reads in self._reads.items()}
        for name, sources in self._sources.items():
            if self._needed[name] == sources:  # mostly: hundreds of equal sets would be seen beside small weights
                self._needed[name] = sources
        every = frozenset().union(*self._reads.values()) if self._reads else frozenset()
        self._all_needs = {name: name.partition(":")[2] for name in sorted(every)}
        self._all_computed = _computed(self._all_needs)
        self._every_moved = self._batcher is not None and len(self._batcher.names) == self._count
        self._readers: dict[str, set[str]] = {}
        for name, sources in self._sources.items():
            for source in sources:
                self._readers.setdefault(source, set()).add(name)
        self._workers = Workers(library, threads)
        self._threads = threads
        self._caster: Caster | None = None
        self._lock = threading.Lock()
        self._steady = UNSTEADY

    def _closure(self, recipe: Recipe) -> frozenset[str]:
        """Every tensor the recipe needs, through staged ones."""
        names = set(recipe.sources)
        for name in recipe.sources:
            if name in self._staged:
                names |= self._closure(self._staged[name])
        return frozenset(names)

    def _only_sources(self, names: Iterable[str], through: Callable[[str], frozenset[str]]) -> frozenset[str]:
        found: set[str] = set()
        for name in names:
            if name in self._plain:
                found.add(self._plain[name])
            elif name.startswith(COMPUTED):
                found |= through(name.removeprefix(COMPUTED))
        return frozenset(found)

    @property
    def moved(self) -> int:
        """How many engine weights native code writes."""
        return 0 if self._batcher is None else len(self._batcher.names)

    @property
    def neighbours(self) -> Sequence[str]:
        """See ``Backend.neighbours``."""
        return self._program.neighbours

    def needed_for(self, name: str) -> frozenset[str]:
        """The source weights that deriving an engine weight takes."""
        return self._needed[name]

    def affected(self, changed: Iterable[str]) -> frozenset[str]:
        """The engine weights that read one of these source weights."""
        return frozenset(name for source in changed for name in self._readers.get(source, ()))

    def derive_all(
        self,
        sources: Mapping[str, Array],
        rack: Rack,
        hosted: Mapping[str, Storage],
        inspector: Inspector | None = None,
        beside: Traffic | None = None,
    ) -> None:
        """Write every engine weight; see ``derive``.

        Args:
            sources: all of them.
            rack: where they go, but those in
            hosted: where these go: the same mapping as long as it is the same memory.
            inspector: see ``derive``.
            beside: see ``derive``.
        """
        if inspector is None or not self._quickly(sources, rack, hosted, inspector, beside):
            targets = {**hosted, **rack.storages} if hosted else rack.storages
            self.derive(sources, targets, inspector, rack=rack, beside=beside)

    def _quickly(
        self,
        sources: Mapping[str, Array],
        rack: Rack,
        hosted: Mapping[str, Storage],
        inspector: Inspector,
        beside: Traffic | None,
    ) -> bool:
        """The same where native code does everything with weights that it has called, and nobody keeps any; whether."""
        if not isinstance(sources, Called) or sources.addresses is None or not self._every_moved:
            return False
        if beside is None:
            self._workers.rouse(self._elements)
        with self._lock:
            tensors, steady = self._tensors(sources, self._all_needs, inspector)
            assert self._batcher is not None
            if tensors or not self._batcher.sees(sources, steady.lasting):
                return False
            suspect = inspector.claim_all()
            if suspect is None:
                return False
            rack.settled = False
            ready = self._batcher.ready_all(sources, steady.flats, rack, hosted)
            self._workers.do([], ready, beside)
            if any(ready.flags):
                suspect()
            rack.settle()
        return True

    def derive(
        self,
        sources: Mapping[str, Array],
        targets: Mapping[str, Storage],
        inspector: Inspector | None = None,
        *,
        rack: Rack | None = None,
        beside: Traffic | None = None,
    ) -> None:
        """Write these engine weights, and let the inspector look at the sources.

        Args:
            sources: see ``Backend.derive``.
            targets: engine weight -> where it goes.
            inspector: see ``Backend.derive``.
            rack: where some of them, or all, lie together.
            beside: the requests to let go first, and so to take a few times as long; None where there are none.

        Raises:
            EngineError: a source is missing, or a computation failed.
        """
        needed = self._needs(targets)
        with self._lock:
            try:
                tensors, steady = self._tensors(sources, needed, inspector)
                for name in self._wide(targets):
                    tensors[WIDE + name] = self._widen(tensors[name])
                claims, looks, tasks = self._looks(sources, targets, inspector)
                called = sources if isinstance(sources, Called) and not tensors else None
                ready = self._ready(targets, rack, tensors, steady, claims, called)
                for name, writer in self._others(targets):
                    if name in steady.writers:
                        tasks += steady.tasks(writer, targets[name])
                    else:
                        tasks += writer.tasks(tensors, targets[name], looks.get(name, ()))
            except KeyError as error:
                raise EngineError("a source weight that is needed was not given", where=error.args[0]) from error
            single = _besides(targets, rack)
            for storage in single:
                storage.settled = False
            if rack is not None:
                rack.settled = False
            self._workers.do(tasks, ready, beside)
            if ready is not None:
                ready.tell()
            for storage in single:
                storage.settle()
            if rack is not None:
                rack.settle()

    def _tensors(
        self, sources: Mapping[str, Array], needed: Mapping[str, str], inspector: Inspector | None
    ) -> tuple[dict[str, Array], Steady]:
        """Every tensor that is needed, flat; and what is as it was the last time.

        None is needed where native code does everything and the addresses of all are known.
        """
        lasting = _NOTHING if inspector is None else inspector.lasting
        wanted = self._all_computed if needed is self._all_needs else _computed(needed)
        values = self._program.compute(wanted, sources, lasting)
        steady = self._steady if lasting else UNSTEADY
        if lasting and (steady.lasting is not lasting or steady.values is not self._program.lasting):
            flats = {SOURCE + name: array.reshape(-1) for name, array in lasting.items()}
            flats.update((COMPUTED + name, array) for name, array in self._program.lasting.items())
            writers = frozenset(n for n, w in self._writers.items() if w.reads and w.reads <= flats.keys())
            rest = [name for name in self._keys if name not in lasting]
            steady = self._steady = Steady(lasting, rest, self._program.lasting, flats, writers)
        known = isinstance(sources, Called) and sources.addresses is not None
        if known and steady is not UNSTEADY and values is steady.values and self._every_moved and not self._staged:
            return {}, steady
        tensors = dict(steady.flats)
        keys = self._keys
        for name in _rest(sources, steady):
            tensors[keys[name]] = sources[name].reshape(-1)
        if values is not steady.values:
            for name, array in values.items():
                if COMPUTED + name not in steady.flats:
                    tensors[COMPUTED + name] = np.ascontiguousarray(array).reshape(-1)
        for name, recipe in self._staged.items():
            if name in needed:
                tensors[name] = evaluate(recipe, tensors.__getitem__).reshape(-1)
        return tensors, steady

    def _looks(
        self, sources: Mapping[str, Array], targets: Mapping[str, Storage], inspector: Inspector | None
    ) -> tuple[Mapping[str, Look], Mapping[str, list[tuple[str, Look]]], list[Task]]:
        """What native code looks at; target -> what its writer looks at; and the tasks that look at what is left."""
        claims: dict[str, Look] = {}
        looks: dict[str, list[tuple[str, Look]]] = {}
        others: list[Task] = []
        if inspector is not None:
            seen = frozenset() if self._batcher is None else self._batcher.seen
            for name in _rest(sources, self._steady if inspector.lasting else UNSTEADY):
                array, look = sources[name], inspector.claim(name)
                if look is None:
                    continue
                carrier = self._carried.get(name)
                if name in seen and (carrier is None or carrier in targets):
                    claims[name] = look
                elif carrier is not None and carrier in targets and carrier in self._writers:
                    looks.setdefault(carrier, []).append((SOURCE + name, look))
                else:
                    others += alone(look, array.size)
        return claims, looks, others

    def _ready(
        self,
        targets: Mapping[str, Storage],
        rack: Rack | None,
        tensors: Mapping[str, Array],
        steady: Steady,
        claims: Mapping[str, Look],
        called: Called | None,
    ) -> Ready | None:
        """The batch of what native code does; None if that is nothing."""
        batcher = self._batcher
        if batcher is None:
            return None
        own = targets
        if not self._every_moved:
            own = {name: storage for name, storage in targets.items() if name in batcher.names}
        return batcher.ready(own, tensors, steady.flats, claims, rack, called) if own or claims else None

    def _others(self, targets: Mapping[str, Storage]) -> Iterable[tuple[str, Writer]]:
        """The targets that Python writes."""
        if len(targets) < len(self._writers):
            return [(name, self._writers[name]) for name in targets if name in self._writers]
        return [(name, writer) for name, writer in self._writers.items() if name in targets]

    def _wide(self, targets: Mapping[str, Storage]) -> Iterable[str]:
        """The float16 tensors that the targets read as float32."""
        if not self._widens:
            return ()
        return sorted({name for _, writer in self._others(targets) for name in writer.widened})

    def _widen(self, flat: Array) -> Array:
        """A float16 tensor as float32."""
        if self._caster is None:
            self._caster = Caster(self._threads)
        return self._caster.widen(flat)

    def _needs(self, targets: Mapping[str, Storage]) -> Mapping[str, str]:
        """Every tensor that these engine weights need -> its name without the name space."""
        if len(targets) == self._count:
            return self._all_needs
        needed = set().union(*(self._reads[name] for name in targets))
        return {name: name.partition(":")[2] for name in needed}

    def rest(self) -> None:
        """Keep no memory for the next weights, and none alive that others keep for them."""
        with self._lock:
            self._steady = UNSTEADY
            self._program.rest()
            if self._batcher is not None:
                self._batcher.rest()
        if self._packer is not None:
            self._packer.rest()

    def close(self) -> None:
        """End the threads."""
        self._workers.close()
