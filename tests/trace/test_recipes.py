"""Recipes, walks through walks and recipes through recipes, against NumPy's own idea of them."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_refit.plan.trace.affine import Order, through
from onnx_refit.plan.trace.compose import resolve, simplified
from onnx_refit.plan.trace.recipes import (
    Gather,
    Operand,
    Piece,
    Recipe,
    Walk,
    agrees,
    c_strides,
    evaluate,
    is_whole,
    whole,
)
from onnx_refit.tensors import Array, TensorSpec

dims = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def positions(extents: tuple[int, ...], walk: Walk) -> Array:
    index = np.indices(extents).reshape(len(extents), -1)
    found: Array = walk.offset + (np.array(walk.strides)[:, None] * index).sum(0)
    return found


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], Array]:
    """A shape, and a transposed and reshaped view's positions in it."""
    shape = draw(dims)
    flat = np.arange(math.prod(shape)).reshape(shape)
    return shape, flat.transpose(draw(st.permutations(range(len(shape)))))


@given(views(), st.data())
@settings(max_examples=200, deadline=None)
def test_a_walk_through_a_walk_visits_what_numpy_visits(
    view: tuple[tuple[int, ...], Array], data: st.DataObject
) -> None:
    shape, seen = view
    order = Order(seen.shape, Walk(3, tuple(s // seen.itemsize for s in seen.strides)))
    size = math.prod(shape)
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    inner = data.draw(st.sampled_from(divisors))
    outer = data.draw(st.integers(1, size // inner))
    box, walk = (outer, inner), Walk(0, (inner, 1))
    split = through(box, walk, order)
    if split is None:
        return
    wanted = seen.reshape(-1)[positions(box, walk)] + 3
    assert (positions(split.dims, split.walk) == wanted).all()
    target = Walk(1, (7 * inner, 7))
    assert (positions(split.dims, split.carry(target)) == positions(box, target)).all()


@given(views(), views())
@settings(max_examples=200, deadline=None)
def test_composed_recipes_give_what_they_give_one_after_the_other(
    first: tuple[tuple[int, ...], Array], second: tuple[tuple[int, ...], Array]
) -> None:
    shape, seen = first
    size = math.prod(shape)
    middle = Recipe(TensorSpec("m", "float32", seen.shape), (_piece("s", seen),))
    outer_shape, outer = second
    if math.prod(outer_shape) != size:
        outer = np.arange(size).reshape(seen.shape).transpose()
    last = Recipe(TensorSpec("l", "float32", outer.shape), (_piece("m", outer),))
    composed, staged = resolve(last, {"m": middle})
    source = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    stages: dict[str, Array] = {"s": source}
    for name, recipe in staged.items():
        stages[name] = evaluate(recipe, stages.__getitem__).reshape(-1)
    wanted = source[seen.reshape(-1)][outer.reshape(-1)].reshape(outer.shape)
    assert (evaluate(composed, stages.__getitem__) == wanted).all()


def _piece(name: str, seen: Array) -> Piece:
    strides = tuple(s // seen.itemsize for s in seen.strides)
    return Piece(seen.shape, Walk(0, c_strides(seen.shape)), (Operand(name, Walk(0, strides)),))


def test_a_transpose_then_its_inverse_is_the_tensor_itself() -> None:
    seen = np.arange(12).reshape(3, 4).T
    middle = Recipe(TensorSpec("m", "float32", (4, 3)), (_piece("s", seen),))
    back = Recipe(TensorSpec("l", "float32", (3, 4)), (_piece("m", np.arange(12).reshape(4, 3).T),))
    composed, staged = resolve(back, {"m": middle})
    assert not staged
    assert is_whole(composed, 12) == "s"
    assert is_whole(composed, 13) is None


def test_the_beginning_of_a_tensor_takes_over_no_more_than_its_own_elements() -> None:
    middle = Recipe(TensorSpec("m", "float32", (4, 3)), (_piece("s", np.arange(12).reshape(3, 4).T),))
    begins = Recipe(TensorSpec("l", "float32", (3,)), (Piece((3,), Walk(0, (1,)), (Operand("m", Walk(0, (1,))),)),))
    composed, _ = resolve(begins, {"m": middle})
    source = np.arange(12, dtype=np.float32)
    assert (evaluate(composed, {"s": source}.__getitem__) == [0, 4, 8]).all()


def test_a_scalar_spreads_and_reshapes() -> None:
    scalar = Order((), Walk(5, ()))
    split = through((1, 4), Walk(0, (3, 0)), scalar)
    assert split is not None
    assert positions(split.dims, split.walk).tolist() == [5, 5, 5, 5]


def test_what_does_not_compose_is_staged() -> None:
    halves = Recipe(
        TensorSpec("m", "float32", (8,)),
        (
            Piece((4,), Walk(0, (1,)), (Operand("a", Walk(0, (1,))),)),
            Piece((4,), Walk(4, (1,)), (Operand("b", Walk(0, (1,))),)),
        ),
    )
    crossing = _piece("m", np.arange(8).reshape(2, 4).T)
    composed, staged = resolve(Recipe(TensorSpec("l", "float32", (4, 2)), (crossing,)), {"m": halves})
    assert list(staged) == ["m"]
    assert composed.sources == {"m"}


def test_a_tensor_that_is_another_takes_over_its_pieces() -> None:
    halves = Recipe(
        TensorSpec("m", "float32", (8,)),
        (
            Piece((4,), Walk(0, (1,)), (Operand("a", Walk(0, (1,))),)),
            Piece((4,), Walk(4, (1,)), (Operand("b", Walk(0, (1,))),)),
        ),
    )
    composed, staged = resolve(whole(TensorSpec("l", "float32", (2, 4)), "m"), {"m": halves})
    assert not staged
    assert composed.sources == {"a", "b"}
    assert composed.spec.shape == (2, 4)


def test_products_and_padding_and_gathers() -> None:
    tensors: dict[str, Array] = {
        "w": np.arange(6, dtype=np.float32),
        "s": np.array([10, 100], np.float32),
    }
    scaled = Piece((2, 3), Walk(1, (4, 1)), (Operand("w", Walk(0, (3, 1))), Operand("s", Walk(0, (1, 0)))))
    recipe = Recipe(TensorSpec("t", "float32", (10,)), (scaled,), (Gather("w", np.array([9]), np.array([5])),))
    wanted = np.array([0, 0, 10, 20, 0, 300, 400, 500, 0, 5], np.float32)
    assert (evaluate(recipe, tensors.__getitem__) == wanted).all()
    assert not recipe.is_full
    assert agrees(recipe, tensors.__getitem__, wanted)
    assert not agrees(recipe, tensors.__getitem__, wanted + np.eye(1, 10, 3, dtype=np.float32)[0])


def test_agreement_is_of_bits_not_of_values() -> None:
    recipe = whole(TensorSpec("t", "float32", (2,)), "w")
    tensors = {"w": np.array([0.0, np.nan], np.float32)}
    assert agrees(recipe, tensors.__getitem__, tensors["w"])
    assert not agrees(recipe, tensors.__getitem__, np.array([-0.0, np.nan], np.float32))


def test_simplified_pieces_visit_the_same_elements_in_the_same_order() -> None:
    piece = Piece((2, 1, 3, 4), Walk(0, (12, 99, 4, 1)), (Operand("w", Walk(5, (24, 7, 4, 1))),))
    simple = simplified(piece)
    assert simple.dims == (2, 12)
    assert (positions(piece.dims, piece.operands[0].walk) == positions(simple.dims, simple.operands[0].walk)).all()
