"""From the number of every element of a flat tensor to the strided boxes that it is made of."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from onnx_refit.plan.trace.recipes import Operand, Piece, Recipe, Walk
from onnx_refit.plan.trace.recognise import Numbering
from onnx_refit.tensors import TensorSpec

Numbers = npt.NDArray[np.signedinteger]
"""Of either width. In 32 bits the first number that a step would carry beyond the range becomes one below
``PADDING``, which no element has, so a box never goes on across the end of the range."""
PADDING = -1
_MOST = 256
_HEAD = 1 << 16
_GLANCES = 5  # columns looked at before all


def boxes(spec: TensorSpec, numbers: Numbers, numbering: Numbering) -> Recipe | None:
    """The recipe of a flat tensor, as few boxes as go on from element to element; None where that takes too many.

    Made for what kernels pack: tiles of a few columns, tile after tile, slice after slice, padded at the end.

    Args:
        spec: the tensor.
        numbers: the number of each element, or ``PADDING``; int32 or int64.
        numbering: which tensor each number belongs to.
    """
    pieces: list[Piece] = []
    at, most, least = 0, int(numbers.max(initial=PADDING)), _least(numbers)
    while at < len(numbers):
        if numbers[at] == PADDING:
            at += _run(numbers[at:] == PADDING)
            continue
        if len(pieces) == _MOST:
            return None
        owner = numbering.owner(int(numbers[at]))
        low, high = numbering.starts[owner], numbering.starts[owner + 1]
        end = len(numbers)
        if not low <= least <= most < high:
            inside = (numbers[at:] == PADDING) | ((numbers[at:] >= low) & (numbers[at:] < high))
            end = at + _run(inside)
        piece, length = _box(numbers[at:end], at, numbering.names[owner], low)
        pieces.append(piece)
        at += length
    return Recipe(spec, tuple(pieces))


def _least(numbers: Numbers) -> int:
    """The least number of an element that is not padding; a large one where there is none."""
    least = int(numbers.min()) if len(numbers) else PADDING
    return least if least != PADDING else int(numbers.min(initial=np.iinfo(numbers.dtype).max, where=numbers >= 0))


def _box(numbers: Numbers, begin: int, name: str, start: int) -> tuple[Piece, int]:
    """The largest box that begins with the first number, and how many elements it and its padding take."""
    levels = list(_levels(numbers, thorough=False))
    if not _holds(numbers, levels):
        levels = list(_levels(numbers, thorough=True))
    dims = tuple(count for count, _, _ in reversed(levels))
    strides = tuple(step for _, step, _ in reversed(levels))
    pitches = tuple(pitch for _, _, pitch in reversed(levels))
    operand = Operand(name, Walk(int(numbers[0]) - start, strides))
    length = levels[-1][0] * levels[-1][2] if len(levels) > 1 else _row(numbers)[1]
    return Piece(dims, Walk(begin, pitches), (operand,)), length


def _row(numbers: Numbers) -> tuple[int, int]:
    """How many elements go on from the first in one step, and how many they are with the padding after them."""
    head = numbers[:_HEAD]
    steps = np.diff(head[: _run(head != PADDING)])
    count = 1 + (_run(steps == steps[0]) if len(steps) else 0)
    padding = numbers[count : count + 1]
    return count, count + (_run(numbers[count:] == PADDING) if len(padding) and padding[0] == PADDING else 0)


def _levels(numbers: Numbers, *, thorough: bool) -> Iterator[tuple[int, int, int]]:
    """From the inside out, the (elements, step between their numbers, distance between them) of a box.

    Args:
        numbers: what begins with the box.
        thorough: look at all elements; else at a few of each row: then the box may be too large, but never too small.
    """
    count, length = _row(numbers)
    yield count, int(numbers[1] - numbers[0]) if count > 1 else 0, 1
    while 2 * length <= len(numbers):
        rows = numbers[: len(numbers) // length * length].reshape(-1, length)
        if rows[1, 0] == PADDING:
            return
        step = int(rows[1, 0] - rows[0, 0])
        rows = rows[: _run(_alike(rows[:, :1], step)[:, 0])]
        few = rows if thorough else rows[:, sorted({k * (length - 1) // (_GLANCES - 1) for k in range(_GLANCES)})]
        whole: npt.NDArray[np.bool_] = np.all(_alike(few, step), axis=1)
        count = _run(whole)
        if count < 2:
            return
        yield count, step, length
        length *= count


def _holds(numbers: Numbers, levels: list[tuple[int, int, int]]) -> bool:
    """Whether a box is right in every element: the outermost rows like the first of them, in which the next are."""
    return all(
        _alike(numbers[: count * length].reshape(count, length), step).all()
        for count, step, length in reversed(levels[1:])
    )


def _alike(rows: Numbers, step: int) -> npt.NDArray[np.bool_]:
    """For each element of each row whether it is that of the first row, so many steps on; padding under padding."""
    same: npt.NDArray[np.bool_]
    padded = rows[0] == PADDING
    moved = rows[0] + _times(step, rows)[:, None]
    if padded.any():
        moved[:, padded] = PADDING
    same = rows == moved
    if step < 0 and int(rows[0].min(initial=0, where=~padded)) + step * (len(rows) - 1) <= PADDING:
        same &= padded | (moved != PADDING)  # a step down from number 0 looks like padding, which it is not
    return same


def _times(step: int, rows: Numbers) -> Numbers:
    """0, 1, 2, ... steps, for each row."""
    multiples: Numbers = np.arange(len(rows), dtype=rows.dtype)
    multiples *= multiples.dtype.type(step)
    return multiples


def _run(flags: npt.NDArray[np.bool_]) -> int:
    """How many flags are set before the first that is not."""
    first = int(np.argmin(flags)) if len(flags) else 0
    return len(flags) if len(flags) and flags[first] else first
