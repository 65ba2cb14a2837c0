"""From the number of every element of a flat tensor to the strided boxes that it is made of."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnx_refit.plan.trace.recipes import Operand, Piece, Recipe, Walk
from onnx_refit.plan.trace.recognise import Numbering
from onnx_refit.tensors import TensorSpec

Numbers = npt.NDArray[np.int64]
PADDING = -1
_MOST = 256


def boxes(spec: TensorSpec, numbers: Numbers, numbering: Numbering) -> Recipe | None:
    """The recipe of a flat tensor, as few boxes as go on from element to element; None where that takes too many.

    Made for what kernels pack: tiles of a few columns, tile after tile, slice after slice, padded at the end.

    Args:
        spec: the tensor.
        numbers: the number of each element, or ``PADDING``.
        numbering: which tensor each number belongs to.
    """
    pieces: list[Piece] = []
    at = 0
    while at < len(numbers):
        if numbers[at] == PADDING:
            at += _run(numbers[at:] == PADDING)
            continue
        if len(pieces) == _MOST:
            return None
        owner = numbering.owner(int(numbers[at]))
        low, high = numbering.starts[owner], numbering.starts[owner + 1]
        inside = (numbers == PADDING) | ((numbers >= low) & (numbers < high))
        end = at + _run(inside[at:])
        piece, length = _box(numbers[at:end], at, numbering.names[owner], low)
        pieces.append(piece)
        at += length
    return Recipe(spec, tuple(pieces))


def _box(numbers: Numbers, begin: int, name: str, start: int) -> tuple[Piece, int]:
    """The largest box that begins with the first number, and how many elements it and its padding take."""
    head = numbers[: 1 << 16]
    steps = np.diff(head[: _run(head != PADDING)])
    count = 1 + (_run(steps == steps[0]) if len(steps) else 0)
    dims, strides, pitches = [count], [int(numbers[1] - numbers[0]) if count > 1 else 0], [1]
    length = count + _run(numbers[count:] == PADDING)
    while 2 * length <= len(numbers):
        rows = numbers[: len(numbers) // length * length].reshape(-1, length)
        step = int(rows[1, 0] - rows[0, 0])
        if rows[1, 0] == PADDING:
            break
        count = _run(rows[:, 0] == rows[0, 0] + step * np.arange(len(rows), dtype=np.int64))
        moved = rows[0] + step * np.arange(count, dtype=np.int64)[:, None]
        padded = rows[0] == PADDING
        # A step down from number 0 looks like padding, which it is not.
        same = (rows[:count] == np.where(padded, PADDING, moved)) & ((rows[:count] == PADDING) == padded)
        count = _run(same.all(axis=1))
        if count < 2:
            break
        dims.append(count)
        strides.append(step)
        pitches.append(length)
        length *= count
    operand = Operand(name, Walk(int(numbers[0]) - start, tuple(reversed(strides))))
    return Piece(tuple(reversed(dims)), Walk(begin, tuple(reversed(pitches))), (operand,)), length


def _run(flags: npt.NDArray[np.bool_]) -> int:
    """How many flags are set before the first that is not."""
    first = int(np.argmin(flags)) if len(flags) else 0
    return len(flags) if len(flags) and flags[first] else first
