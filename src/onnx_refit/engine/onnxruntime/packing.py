"""Which recipes ONNX Runtime's ReorderInput writes, alone or after a scale and before a permutation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from onnx_refit.engine.onnxruntime.blocked import Matrix, blocked_matrix, up
from onnx_refit.plan.trace.compose import simplified
from onnx_refit.plan.trace.recipes import Operand, Piece, Recipe, Walk, c_strides


@dataclass(frozen=True)
class Scale:
    """A factor for each column, read along a stride."""

    name: str
    offset: int
    stride: int


@dataclass(frozen=True)
class Packing:
    """A blocked tensor that ReorderInput can write.

    Attributes:
        source: the tensor read.
        offset: its first element used.
        channels_last: whether rows of the source are contiguous (``[K, N]``) rather than columns (``[N, K]``).
        rows: K; for a convolution ``inputs * window``.
        columns: N, a multiple of 4, which ReorderInput pads to whole blocks.
        window: positions of a convolution's kernel, whose inputs are blocked too: ``[N/b][I/b][window][b][b]``.
        scale: what each column is multiplied by.
        stride: elements from one column of an ``[N, K]`` source to the next; 0 where they lie side by side.
    """

    source: str
    offset: int
    channels_last: bool
    rows: int
    columns: int
    window: int = 1
    scale: Scale | None = None
    stride: int = 0

    def parts(self, block: int, elements: int) -> Iterator[tuple[int, Packing]]:
        """(first element of the target, packing) of parts of about so many elements, whole blocks each."""
        step = max(1, elements // (self.rows * block)) * block
        if self.channels_last or step >= self.columns:
            yield 0, self
            return
        for begin in range(0, self.columns, step):
            scale = self.scale
            if scale is not None:
                scale = replace(scale, offset=scale.offset + begin * scale.stride)
            offset = self.offset + begin * self.rows
            count = min(step, self.columns - begin)
            yield begin * self.rows, replace(self, offset=offset, columns=count, scale=scale)


def packing(recipe: Recipe, block: int) -> Packing | None:
    """The recipe as a packing, if there is one that writes exactly that tensor."""
    if recipe.gathers or recipe.spec.dtype != "float32" or not recipe.pieces or block < 2:
        return None
    operands = recipe.pieces[0].operands
    if any(len(piece.operands) != len(operands) for piece in recipe.pieces):
        return None
    for candidate in _candidates(recipe, operands, block):
        if candidate.columns % 4 == 0 and _pieces(candidate, block, recipe) == recipe.pieces:
            return candidate
    return None


def panels(piece: Piece, block: int, elements: int) -> list[tuple[int, Packing]]:
    """(first element of the target, packing) of a piece that consists of blocked matrices, of about so many elements.

    Args:
        piece: with one operand, both flat tensors being float32.
        block: the host's block size.
        elements: how many a packing shall write.

    Returns:
        Packings that write together what the piece says; none where it is something else.
    """
    if len(piece.operands) != 1 or len(piece.dims) < 3:
        return []
    source, target = piece.operands[0].walk, piece.target
    count, k, width = piece.dims[-3:]
    stride = source.strides[-1]
    blocked = width == block and target.strides[-3:] == (k * block, block, 1)
    if not blocked or source.strides[-3:] != (block * stride, 1, stride) or stride < k or k < block:
        return []
    step = max(1, elements // (k * block))
    found = []
    for index in np.ndindex(piece.dims[:-3]):
        begin = target.offset + sum(i * s for i, s in zip(index, target.strides, strict=False))
        offset = source.offset + sum(i * s for i, s in zip(index, source.strides, strict=False))
        for first in range(0, count, step):
            columns = min(step, count - first) * block
            gap = 0 if stride == k else stride
            at = offset + first * block * stride
            found.append(
                (begin + first * k * block, Packing(piece.operands[0].name, at, False, k, columns, stride=gap))
            )
    return found


def _candidates(recipe: Recipe, operands: tuple[Operand, ...], block: int) -> Iterator[Packing]:
    """Packings that the recipe may be, to be compared with it."""
    first = recipe.pieces[0]
    for source, scale in ((operands[0], operands[-1]), (operands[-1], operands[0])):
        factor = None if len(operands) == 1 else Scale(scale.name, scale.walk.offset, scale.walk.strides[-1])
        shape = recipe.spec.static_shape
        if len(shape) == 4 and shape[0] % block == 0 and shape[1] % block == 0 and shape[2] * shape[3] > 1:
            window = shape[2] * shape[3]
            yield Packing(
                source.name, source.walk.offset, False, shape[1] * window, shape[0], window=window, scale=factor
            )
        if len(first.dims) == 3 and first.dims[2] == block:
            rest = recipe.pieces[1].dims[-1] if len(recipe.pieces) == 2 else 0
            columns = first.dims[0] * block + rest
            for last in (False, True):
                yield Packing(source.name, source.walk.offset, last, first.dims[1], columns, scale=factor)
        if len(operands) == 1:
            return


def _pieces(packing: Packing, block: int, recipe: Recipe) -> tuple[Piece, ...]:
    """The pieces of the recipe that the packing stands for, operands in the recipe's order."""
    if up(packing.columns, block) * packing.rows != recipe.spec.size:
        return ()
    if packing.window > 1:
        pieces: tuple[Piece, ...] = (_convolution(packing, block),)
    else:
        matrix = Matrix(packing.source, packing.rows, packing.columns, not packing.channels_last)
        pieces = tuple(
            _scaled(_moved(p, packing.offset), packing, block) for p in blocked_matrix("", matrix, block).pieces
        )
    swapped = recipe.pieces[0].operands[0].name != packing.source
    return tuple(simplified(Piece(p.dims, p.target, p.operands[::-1] if swapped else p.operands)) for p in pieces)


def _moved(piece: Piece, offset: int) -> Piece:
    operand = piece.operands[0]
    walk = Walk(operand.walk.offset + offset, operand.walk.strides)
    return Piece(piece.dims, piece.target, (Operand(operand.name, walk),))


def _scaled(piece: Piece, packing: Packing, block: int) -> Piece:
    """The piece of a blocked matrix with its columns' factors as second operand."""
    if packing.scale is None:
        return piece
    stride = packing.scale.stride
    if len(piece.dims) == 3:
        walk = Walk(packing.scale.offset, (block * stride, 0, stride))
    else:
        walk = Walk(packing.scale.offset + (packing.columns - piece.dims[-1]) * stride, (0, stride))
    return Piece(piece.dims, piece.target, (*piece.operands, Operand(packing.scale.name, walk)))


def _convolution(packing: Packing, block: int) -> Piece:
    window = packing.window
    dims = (packing.columns // block, packing.rows // window // block, window, block, block)
    walk = Walk(packing.offset, (block * packing.rows, block * window, 1, window, packing.rows))
    operands: tuple[Operand, ...] = (Operand(packing.source, walk),)
    if packing.scale is not None:
        stride = packing.scale.stride
        factors = Walk(packing.scale.offset, (block * stride, 0, 0, 0, stride))
        operands = (*operands, Operand(packing.scale.name, factors))
    return Piece(dims, Walk(0, c_strides(dims)), operands)
