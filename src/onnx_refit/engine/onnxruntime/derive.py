"""Writes engine weights from source weights: every recipe compiled once into copies, products and packings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_refit.engine.onnxruntime.buffers import Storage
from onnx_refit.engine.onnxruntime.crew import Crew, Task
from onnx_refit.engine.onnxruntime.packer import Caster, Packer
from onnx_refit.engine.onnxruntime.packing import packing
from onnx_refit.engine.onnxruntime.program import Program
from onnx_refit.engine.onnxruntime.specialise import COMPUTED, SOURCE, Specialised
from onnx_refit.errors import EngineError
from onnx_refit.plan.trace.recipes import Gather, Piece, Recipe, Walk, along, evaluate, leading, mapped
from onnx_refit.tensors import Array, numpy_dtype

WIDE = "wide:"  # the name space of sources cast to float32
_SPLIT = 1 << 20  # elements; larger pieces are cut so that threads share them
_PACKED = 1 << 12  # elements; smaller blocked matrices are written by NumPy
_PARALLEL = 1 << 18  # elements; less than this is not worth waking a thread for

Tensors = Mapping[str, Array]
"""Flat tensors by their prefixed names."""


@dataclass(frozen=True)
class _Source:
    """Where a piece reads: name, first byte, strides in bytes; whether NumPy exposes such arrays as buffers."""

    name: str
    dtype: np.dtype[np.generic]
    dims: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    exposed: bool


class _Writer:
    """Writes one engine weight."""

    __slots__ = ("_items", "_leading", "_pack", "_pieces", "_recipe", "size", "widened")

    def __init__(self, recipe: Recipe, dtypes: Mapping[str, np.dtype[np.generic]], block: int) -> None:
        widened = {n: WIDE + n for n in recipe.sources if _is_widened(dtypes[n], recipe)}
        recipe = mapped(recipe, widened)
        self.widened = frozenset(widened)
        dtypes = {**dtypes, **dict.fromkeys(widened.values(), np.dtype(np.float32))}
        self._recipe = recipe
        self._leading = leading(recipe)
        self._pieces = [part for piece in recipe.pieces for part in _cut(piece)]
        single = all(dtypes[name] == np.float32 for name in recipe.sources)
        packed = packing(recipe, block) if single and recipe.spec.size >= _PACKED else None
        self._pack = [] if packed is None else list(packed.parts(block, _SPLIT))
        self._items = [
            tuple(
                _Source(
                    operand.name,
                    dtypes[operand.name],
                    piece.dims,
                    operand.walk.offset * dtypes[operand.name].itemsize,
                    tuple(stride * dtypes[operand.name].itemsize for stride in operand.walk.strides),
                    dtypes[operand.name].kind != "V",
                )
                for operand in piece.operands
            )
            for piece in self._pieces
        ]
        self.size = recipe.spec.size

    def tasks(self, tensors: Tensors, storage: Storage, packer: Packer | None) -> list[Task]:
        """The independent parts of the work. Called for each engine weight at each refit: kept lean."""
        if self._pack and packer is not None:
            fetch = tensors.__getitem__
            ends = [*(begin for begin, _ in self._pack[1:]), self.size]
            return [
                (end - begin, packer.pack, (part, fetch, storage.flat[begin:end]))
                for (begin, part), end in zip(self._pack, ends, strict=True)
            ]
        if self._leading is not None and self.size <= _SPLIT:
            return [(self.size, np.copyto, (storage.flat, tensors[self._leading][: self.size], "unsafe"))]
        views = storage.views
        if views is None:
            views = tuple(along(storage.flat, piece.dims, piece.target) for piece in self._pieces)
            storage.views = views
        made: list[Task] = []
        for view, sources in zip(views, self._items, strict=True):
            reads = []
            for source in sources:
                flat = tensors[source.name]
                memory = flat if source.exposed else flat.view(np.uint8)
                reads.append(np.ndarray(source.dims, source.dtype, memory, source.offset, source.strides))
            if len(reads) == 1:
                made.append((view.size, np.copyto, (view, reads[0], "unsafe")))
            else:
                made.append((view.size, np.multiply, (reads[0], reads[1], view)))
        gathers = self._recipe.gathers
        return [*made, *((16 * g.to.size, _gather, (g, tensors[g.source], storage.flat)) for g in gathers)]


def _is_widened(dtype: np.dtype[np.generic], recipe: Recipe) -> bool:
    """Whether a source is read as float32 by ONNX Runtime's cast: NumPy's takes nine times a copy."""
    return recipe.spec.dtype == "float32" and dtype == np.float16 and recipe.spec.size >= _PACKED


def _gather(gather: Gather, source: Array, target: Array) -> None:
    target[gather.to] = source[gather.take].astype(target.dtype, copy=False)


def _cut(piece: Piece) -> list[Piece]:
    """The piece in parts of about ``_SPLIT`` elements, along its first dimension."""
    size = math.prod(piece.dims)
    if size <= _SPLIT or piece.dims[0] < 2:
        return [piece]
    step = max(1, piece.dims[0] * _SPLIT // size)
    parts = []
    for begin in range(0, piece.dims[0], step):
        dims = (min(step, piece.dims[0] - begin), *piece.dims[1:])

        def moved(walk: Walk, begin: int = begin) -> Walk:
            return Walk(walk.offset + begin * walk.strides[0], walk.strides)

        operands = tuple(type(o)(o.name, moved(o.walk)) for o in piece.operands)
        parts.append(Piece(dims, moved(piece.target), operands))
    return parts


class Deriver:
    """Derives engine weights. Thread-safe.

    Args:
        specialised: the recipes.
        program: the refit program's graph.
        dtypes: of each source weight.
        block: the host's block size.
        threads: threads to write with.
    """

    def __init__(
        self,
        specialised: Specialised,
        program: onnx.ModelProto | None,
        dtypes: Mapping[str, np.dtype[np.generic]],
        block: int,
        threads: int,
    ) -> None:
        self._staged = specialised.staged
        self._program = Program(program, specialised.computed, threads)
        sizes = {SOURCE + name: dtype for name, dtype in dtypes.items()}
        sizes.update((COMPUTED + name, numpy_dtype(spec.dtype)) for name, spec in specialised.computed.items())
        sizes.update((name, numpy_dtype(recipe.spec.dtype)) for name, recipe in specialised.staged.items())
        self._keys = {name: SOURCE + name for name in dtypes}
        self._writers = {name: _Writer(recipe, sizes, block) for name, recipe in specialised.buffers.items()}
        self._packer = Packer(block) if block > 1 else None
        self._reads = {name: self._closure(recipe) for name, recipe in specialised.buffers.items()}
        self._sources = {n: self._only_sources(reads, self._program.sources_of) for n, reads in self._reads.items()}
        self._needed = {n: self._only_sources(reads, self._program.needed_for) for n, reads in self._reads.items()}
        every = frozenset().union(*self._reads.values()) if self._reads else frozenset()
        self._all_needs = {name: name.partition(":")[2] for name in sorted(every)}
        self._readers: dict[str, set[str]] = {}
        for name, sources in self._sources.items():
            for source in sources:
                self._readers.setdefault(source, set()).add(name)
        self._pool = ThreadPoolExecutor(threads - 1, "onnx-refit-derive") if threads > 1 else None
        self._threads = threads
        self._caster: Caster | None = None

    def _closure(self, recipe: Recipe) -> frozenset[str]:
        """Every tensor the recipe needs, through staged ones."""
        names = set(recipe.sources)
        for name in recipe.sources:
            if name in self._staged:
                names |= self._closure(self._staged[name])
        return frozenset(names)

    @staticmethod
    def _only_sources(names: Iterable[str], through: Callable[[str], frozenset[str]]) -> frozenset[str]:
        found: set[str] = set()
        for name in names:
            if name.startswith(SOURCE):
                found.add(name.removeprefix(SOURCE))
            elif name.startswith(COMPUTED):
                found |= through(name.removeprefix(COMPUTED))
        return frozenset(found)

    def needed_for(self, name: str) -> frozenset[str]:
        """The source weights that deriving an engine weight takes."""
        return self._needed[name]

    def affected(self, changed: Iterable[str]) -> frozenset[str]:
        """The engine weights that read one of these source weights."""
        return frozenset(name for source in changed for name in self._readers.get(source, ()))

    def derive(self, sources: Mapping[str, Array], targets: Mapping[str, Storage]) -> None:
        """Write these engine weights.

        Raises:
            EngineError: a source is missing, or a computation failed.
        """
        needed = self._needs(targets)
        try:
            tensors = {self._keys[name]: array.reshape(-1) for name, array in sources.items()}
            made = self._program.compute(
                [name for space, name in needed.items() if space.startswith(COMPUTED)], sources
            )
            tensors.update((COMPUTED + name, np.ascontiguousarray(array).reshape(-1)) for name, array in made.items())
            for name, recipe in self._staged.items():
                if name in needed:
                    tensors[name] = evaluate(recipe, tensors.__getitem__).reshape(-1)
            for name in sorted({wide for target in targets for wide in self._writers[target].widened}):
                tensors[WIDE + name] = self._widen(tensors[name])
            tasks: list[Task] = []
            for name, storage in targets.items():
                tasks += self._writers[name].tasks(tensors, storage, self._packer)
        except KeyError as error:
            raise EngineError("a source weight that is needed was not given", where=error.args[0]) from error
        for storage in targets.values():
            storage.settled = False
        self._run(tasks)
        for storage in targets.values():
            storage.settle()

    def _widen(self, flat: Array) -> Array:
        """A float16 tensor as float32."""
        if self._caster is None:
            self._caster = Caster(self._threads)
        return self._caster.widen(flat)

    def _needs(self, targets: Mapping[str, Storage]) -> Mapping[str, str]:
        """Every tensor that these engine weights need -> its name without the name space."""
        if len(targets) == len(self._writers):
            return self._all_needs
        needed = set().union(*(self._reads[name] for name in targets))
        return {name: name.partition(":")[2] for name in needed}

    def _run(self, tasks: list[Task]) -> None:
        if self._pool is None or sum(task[0] for task in tasks) < _PARALLEL:
            for _, call, arguments in tasks:
                call(*arguments)
            return
        tasks.sort(key=lambda task: -task[0])
        crew = Crew(tasks)
        try:
            for _ in range(self._threads - 1):
                self._pool.submit(crew.help)
            crew.work()
        finally:
            crew.finish()  # nobody may write any more once this returns, failed or not
        crew.check()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
