"""Recipes over recipes: what a tensor is in terms of the tensors that its sources are made of."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnx_refit.plan.trace.affine import Order, Split, through
from onnx_refit.plan.trace.recipes import Gather, Operand, Piece, Recipe, c_strides, is_whole


def resolve(recipe: Recipe, definitions: Mapping[str, Recipe]) -> tuple[Recipe, dict[str, Recipe]]:
    """A recipe in terms of tensors that no definition makes.

    Args:
        recipe: any recipe.
        definitions: tensor -> its recipe; no tensor is defined through itself.

    Returns:
        The recipe, and the definitions (resolved likewise) of the tensors it still names because their recipe and its
        own do not compose: those have to be made first, each from the ones that come before it.
    """
    staged: dict[str, Recipe] = {}
    while True:
        name = next((n for n in sorted(recipe.sources) if n in definitions and n not in staged), None)
        if name is None:
            return recipe, staged
        composed = _substitute(recipe, name, definitions[name])
        if composed is not None:
            recipe = composed
            continue
        made, before = resolve(definitions[name], definitions)
        staged = {**before, **staged, name: made}


def _substitute(recipe: Recipe, name: str, definition: Recipe) -> Recipe | None:
    """The recipe with one source replaced by what that source is made of; None where that is no recipe."""
    if is_whole(recipe, definition.spec.size) == name and recipe.spec.dtype == definition.spec.dtype:
        return Recipe(recipe.spec, definition.pieces, definition.gathers)
    orders = _orders(definition)
    if orders is None:
        return None
    pieces = []
    for piece in recipe.pieces:
        composed = _piece(piece, name, orders)
        if composed is None:
            return None
        pieces.append(composed)
    gathers = []
    for gather in recipe.gathers:
        if gather.source == name:
            if len(orders) != 1:
                return None
            source, order = orders[0]
            index = np.unravel_index(gather.take, order.dims)
            take = order.walk.offset + sum(i * s for i, s in zip(index, order.walk.strides, strict=True))
            gather = Gather(source, gather.to, np.asarray(take, np.int64))
        gathers.append(gather)
    return Recipe(recipe.spec, tuple(pieces), tuple(gathers))


def _orders(definition: Recipe) -> list[tuple[str, Order]] | None:
    """A recipe that is one box, as orders of its operands; None for any other."""
    if len(definition.pieces) != 1 or definition.gathers or not definition.is_full:
        return None
    piece = definition.pieces[0]
    if piece.target.offset or any(
        extent > 1 and stride != step
        for extent, stride, step in zip(piece.dims, piece.target.strides, c_strides(piece.dims), strict=True)
    ):
        return None
    return [(operand.name, Order(piece.dims, operand.walk)) for operand in piece.operands]


def _piece(piece: Piece, name: str, orders: list[tuple[str, Order]]) -> Piece | None:
    operands = [operand for operand in piece.operands if operand.name == name]
    if not operands:
        return piece
    if len(operands) > 1 or len(piece.operands) - 1 + len(orders) > 2:
        return None
    splits: list[tuple[str, Split]] = []
    for source, order in orders:
        split = through(piece.dims, operands[0].walk, order)
        if split is None:
            return None
        splits.append((source, split))
    cut = splits[0][1]
    made = [Operand(source, split.walk) for source, split in splits]
    others = [Operand(o.name, cut.carry(o.walk)) for o in piece.operands if o.name != name]
    return simplified(Piece(cut.dims, cut.carry(piece.target), (*made, *others)))


def simplified(piece: Piece) -> Piece:
    """The piece with neighbouring dimensions joined wherever all its walks allow, and none of extent 1."""
    walks = [piece.target, *(operand.walk for operand in piece.operands)]
    columns: list[tuple[int, tuple[int, ...]]] = []
    for position, extent in enumerate(piece.dims):
        strides = tuple(walk.strides[position] for walk in walks)
        if extent == 1:
            continue
        if columns and columns[-1][1] == tuple(extent * stride for stride in strides):
            columns[-1] = (columns[-1][0] * extent, strides)
        else:
            columns.append((extent, strides))
    if not columns:
        columns = [(1, tuple(1 for _ in walks))]
    dims = tuple(extent for extent, _ in columns)
    joined = [type(w)(w.offset, tuple(strides[k] for _, strides in columns)) for k, w in enumerate(walks)]
    operands = tuple(Operand(o.name, w) for o, w in zip(piece.operands, joined[1:], strict=True))
    return Piece(dims, joined[0], operands)
