from __future__ import annotations

import numpy as np
import pytest

from onnx_refit.plan.trace.codes import PADDING, Numbers
from onnx_refit.plan.trace.recipes import Recipe, evaluate
from onnx_refit.plan.trace.recognise import Numbering, quick, thorough
from onnx_refit.tensors import Array, TensorSpec

SPECS = [TensorSpec("a", "float32", (12, 40)), TensorSpec("b", "float32", (480,)), TensorSpec("c", "float32", (7,))]
NUMBERING = Numbering.of(SPECS)
A = np.arange(480).reshape(12, 40)
B = 480 + np.arange(480)


def sources() -> dict[str, Array]:
    rng = np.random.default_rng(3)
    return {spec.name: rng.standard_normal(spec.size).astype(np.float32) for spec in SPECS}


def values(numbers: Numbers) -> Array:
    flat = np.concatenate([sources()[spec.name] for spec in SPECS])
    return np.where(numbers == PADDING, np.float32(0), flat[np.maximum(numbers, 0)])


def found(numbers: Numbers) -> Recipe:
    recipe = thorough(TensorSpec("t", "float32", numbers.shape), numbers.reshape(-1).copy(), NUMBERING)
    assert recipe is not None
    assert (evaluate(recipe, sources().__getitem__) == values(numbers)).all()
    return recipe


def blocked(matrix: Numbers, block: int) -> Numbers:
    rows, columns = matrix.shape
    up = -(-columns // block) * block
    padded = np.full((rows, up), PADDING)
    padded[:, :columns] = matrix
    return np.ascontiguousarray(padded.reshape(rows, up // block, block).transpose(1, 0, 2)).reshape(up, rows, 1, 1)


@pytest.mark.parametrize(
    ("numbers", "pieces"),
    [
        (A, 1),
        (A.T, 1),
        (A.reshape(12, 8, 5).transpose(1, 0, 2), 1),
        (A[2:9, 5:33:2], 1),
        (A[::-1], 1),
        (blocked(A, 8), 1),
        (np.concatenate([A.reshape(-1), B]), 2),
        (np.concatenate([A, B.reshape(12, 40)], axis=1), 2),
        (np.pad(A, ((0, 4), (0, 8)), constant_values=PADDING), 1),
        (np.broadcast_to(B[:40], (3, 40)), 1),
    ],
)
def test_rearrangements_are_boxes_of_strides(numbers: Numbers, pieces: int) -> None:
    recipe = found(np.ascontiguousarray(numbers))
    assert len(recipe.pieces) == pieces
    assert not recipe.gathers


def test_gates_in_another_order_are_slices() -> None:
    big = np.arange(4 * 600 * 8).reshape(4, 600, 8)
    numbering = Numbering.of([TensorSpec("w", "float32", big.shape)])
    order = big[[0, 3, 1, 2]]
    recipe = thorough(TensorSpec("t", "float32", order.shape), order.reshape(-1).copy(), numbering)
    assert recipe is not None
    assert not recipe.gathers
    assert len(recipe.pieces) <= 4


def test_anything_else_is_a_gather() -> None:
    shuffled = np.random.default_rng(0).permutation(A.reshape(-1))
    recipe = found(shuffled)
    assert not recipe.pieces
    assert [gather.source for gather in recipe.gathers] == ["a"]


def test_padded_convolution_weights_are_boxes() -> None:
    weight = np.arange(20 * 3 * 3 * 3).reshape(20, 3, 3, 3)
    numbering = Numbering.of([TensorSpec("w", "float32", weight.shape)])
    padded = np.full((32, 3, 3, 3), PADDING)
    padded[:20] = weight
    stored = np.ascontiguousarray(padded.reshape(2, 16, 27).transpose(0, 2, 1)).reshape(32, 3, 3, 3)
    recipe = thorough(TensorSpec("t", "float32", stored.shape), stored.reshape(-1).copy(), numbering)
    assert recipe is not None
    assert not recipe.gathers
    assert 1 <= len(recipe.pieces) <= 2
    source = np.random.default_rng(0).standard_normal(weight.size).astype(np.float32)
    wanted = np.where(stored == PADDING, np.float32(0), source[np.maximum(stored, 0)])
    assert (evaluate(recipe, {"w": source}.__getitem__) == wanted).all()


@pytest.mark.parametrize("numbers", [A, A.T, blocked(A, 8), A.reshape(4, 3, 8, 5).transpose(2, 0, 3, 1)])
def test_the_quick_guess_is_right_where_it_is_made(numbers: Numbers) -> None:
    flat = np.ascontiguousarray(numbers).reshape(-1)
    recipe = quick(TensorSpec("t", "float32", numbers.shape), lambda at: int(flat[at]), NUMBERING)
    assert recipe is not None
    assert (evaluate(recipe, sources().__getitem__) == values(np.ascontiguousarray(numbers))).all()


def test_no_recipe_for_foreign_values() -> None:
    assert thorough(TensorSpec("t", "float32", (2,)), np.array([3, -2]), NUMBERING) is None
