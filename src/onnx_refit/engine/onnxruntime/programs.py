"""The moves of engine weights in the form that native code reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_refit.engine.onnxruntime.moving import Unit
from onnx_refit.moves.library import LOOK, MOVE
from onnx_refit.tensors import Array


@dataclass(frozen=True)
class Part:
    """The units of one engine weight, or of one source that is only looked at, as native code reads them.

    Attributes:
        moves: theirs, one unit's after the other's.
        counts: how many each unit has.
        elements: how many they write or look at.
        nbytes: the same in bytes.
        held: arrays whose addresses are in the moves.
    """

    moves: Array
    counts: Array
    elements: int
    nbytes: int
    held: tuple[Array, ...]


@dataclass(frozen=True)
class Program:
    """Moves in the form that native code reads; the parts hold what the moves' addresses point at.

    Attributes:
        moves: all of them.
        bounds: the first move of each unit, and the end.
        places: the addresses of both.
        elements: how many they write or look at.
        nbytes: the same in bytes.
        reads: name and slot of each tensor that they read.
        parts: what it was made of.
    """

    moves: Array
    bounds: Array
    places: tuple[int, int]
    elements: int
    nbytes: int
    reads: Sequence[tuple[str, int]]
    parts: Sequence[Part]


def compiled(chosen: Sequence[Part], slots: Mapping[str, int]) -> Program:
    """One program of these parts; ``slots`` are those of the tensors that parts may read."""
    moves = np.concatenate([part.moves for part in chosen])
    counts = np.concatenate([part.counts for part in chosen])
    bounds = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=bounds[1:])
    written = moves[moves["kind"] != LOOK]
    read = {*written["source"].tolist(), *written["factor"].tolist()}
    reads = [(name, slot) for name, slot in slots.items() if slot in read]
    nbytes = sum(part.nbytes for part in chosen)
    places = moves.ctypes.data, bounds.ctypes.data
    return Program(
        moves, bounds, places, sum(part.elements for part in chosen), nbytes, reads, list(_views(chosen, moves))
    )


def _views(parts: Sequence[Part], moves: Array) -> Iterator[Part]:
    """The same parts, their moves read out of those of all of them."""
    begin = 0
    for part in parts:
        end = begin + len(part.moves)
        yield replace(part, moves=moves[begin:end])
        begin = end


def part_of(units: Sequence[Unit]) -> Part:
    """The units of one engine weight together."""
    rows = [row for unit in units for row in unit.rows]
    return Part(
        np.array(rows, MOVE),
        np.array([len(unit.rows) for unit in units], np.int64),
        sum(unit.elements for unit in units),
        sum(unit.elements * unit.rows[-1][1] for unit in units),
        tuple(array for unit in units for array in unit.held),
    )
