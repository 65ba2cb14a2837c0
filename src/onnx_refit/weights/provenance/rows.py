"""Weights put together from rows of checkpoint tensors in a new order: recurrent gates, gathered embeddings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_refit.tensors import Array
from onnx_refit.weights.provenance.expression import Concat, Expression, Reshape, Slice, Stored, Take
from onnx_refit.weights.provenance.pool import Pool

_MAX_ROWS = 200_000
_MAX_PIECES = 64
_SHORT_RUN = 8  # runs of fewer elements, on average, may be equal by chance
_FOLLOWED = 32


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive rows of one tensor."""

    tensor: str
    start: int
    stop: int


def find_rows(pool: Pool, wanted: Array) -> list[Expression]:
    """How a weight is made of runs of rows, bit for bit; at most one way, the one with the longest runs.

    A row is a line along the last axis or, where no tensor of the checkpoint has such lines, a single element.
    """
    if wanted.ndim == 0 or wanted.size == 0:
        return []
    length = wanted.shape[-1]
    if wanted.ndim > 1:
        tensors = {
            n: pool.read(n) for n, shape in pool.of_dtype(wanted.dtype) if len(shape) == 2 and shape[1] == length
        }
        found = _assemble(wanted.reshape(-1, length), tensors, wanted.shape)
        if found is not None:
            return [found]
    vectors = {n: pool.read(n).reshape(-1, 1) for n, shape in pool.of_dtype(wanted.dtype) if len(shape) == 1}
    found = _assemble(wanted.reshape(-1, 1), vectors, wanted.shape)
    return [] if found is None else [found]


def _keys(rows: Array) -> list[bytes]:
    data = np.ascontiguousarray(rows)
    width = data.shape[1] * data.itemsize
    raw = data.tobytes()
    return [raw[i : i + width] for i in range(0, len(raw), width)]


def _assemble(rows: Array, tensors: Mapping[str, Array], shape: tuple[int, ...]) -> Expression | None:
    if not tensors or not 0 < rows.shape[0] <= _MAX_ROWS or sum(t.shape[0] for t in tensors.values()) > _MAX_ROWS:
        return None
    wanted = _keys(rows)
    # Only where the first row occurs at all is the rest worth indexing.
    places: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    needed = set(wanted)
    stored: dict[str, list[bytes]] = {}
    for name, tensor in tensors.items():
        stored[name] = _keys(tensor)
        for i, key in enumerate(stored[name]):
            if key in needed and len(places[key]) < _FOLLOWED:
                places[key].append((name, i))
    runs: list[_Run] = []
    at = 0
    while at < len(wanted):
        best: _Run | None = None
        for name, start in places.get(wanted[at], ()):
            keys, stop = stored[name], start
            while stop < len(keys) and at + stop - start < len(wanted) and keys[stop] == wanted[at + stop - start]:
                stop += 1
            if best is None or stop - start > best.stop - best.start:
                best = _Run(name, start, stop)
        if best is None:
            return None
        runs.append(best)
        at += best.stop - best.start
    if len(runs) * _SHORT_RUN > rows.size:
        return None
    return _express(runs, tensors, rows.shape[1], shape)


def _express(
    runs: Sequence[_Run], tensors: Mapping[str, Array], width: int, shape: tuple[int, ...]
) -> Expression | None:
    parts: tuple[Expression, ...]
    if len(runs) > _MAX_PIECES:
        names = {run.tensor for run in runs}
        if len(names) > 1:
            return None
        parts = (Take(Stored(names.pop()), 0, tuple(i for run in runs for i in range(run.start, run.stop))),)
    else:
        parts = tuple(
            Stored(run.tensor)
            if run.stop - run.start == tensors[run.tensor].shape[0]
            else Slice(Stored(run.tensor), 0, run.start, run.stop)
            for run in runs
        )
    whole = parts[0] if len(parts) == 1 else Concat(parts, 0)
    count = sum(run.stop - run.start for run in runs)
    flat = (count,) if width == 1 and len(shape) == 1 else (count, width)
    return whole if shape == flat else Reshape(whole, shape)
