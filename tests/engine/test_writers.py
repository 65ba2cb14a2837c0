"""Writers write what their recipes say, and look at each element of what they read exactly once."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_refit.engine.onnxruntime.blocked import Matrix, block_size, blocked_matrix
from onnx_refit.engine.onnxruntime.buffers import Storage
from onnx_refit.engine.onnxruntime.packer import Packer
from onnx_refit.engine.onnxruntime.packing import panels
from onnx_refit.engine.onnxruntime.writers import SPLIT, Writer, alone
from onnx_refit.plan.trace.recipes import Operand, Piece, Recipe, Walk, evaluate, whole
from onnx_refit.tensors import Array, TensorSpec

BLOCK = block_size()
pytestmark = pytest.mark.skipif(BLOCK == 1, reason="no blocked layout on this processor")


class Counting:
    """A look that counts."""

    def __init__(self, flat: Array, keep: Array | None) -> None:
        self.flat, self.keep, self.watched = flat, keep, True
        self.seen = np.zeros(flat.size, np.int64)

    def suspect(self) -> None:
        raise AssertionError("all of it is finite")

    def watch(self, begin: int, end: int) -> None:
        self.seen[begin:end] += 1

    def __call__(self, begin: int, end: int) -> None:
        self.watch(begin, end)
        if self.keep is not None:
            self.keep[begin:end] = self.flat[begin:end]


def panel_piece(parts: int, blocks: int, k: int, between: int) -> Piece:
    """``parts`` ranges of K, each as panels of whole blocks, out of rows with other elements behind them."""
    stride = parts * k + between
    size = blocks * k * BLOCK
    target = Walk(0, (size, k * BLOCK, BLOCK, 1))
    return Piece((parts, blocks, k, BLOCK), target, (Operand("w", Walk(3, (k, BLOCK * stride, 1, stride))),))


def written(recipe: Recipe, tensors: dict[str, Array], looks: dict[str, Counting]) -> Array:
    dtypes = {name: array.dtype for name, array in tensors.items()}
    writer = Writer(recipe, dtypes, Packer(BLOCK), BLOCK)
    storage = Storage(recipe.spec)
    for _ in range(2):  # the second time over what the first one prepared
        storage.flat[:] = 0
        for look in looks.values():
            look.seen[:] = 0
        for _, call, arguments in writer.tasks(tensors, storage, list(looks.items())):
            call(*arguments)
    return storage.flat


@pytest.mark.parametrize(("parts", "blocks", "k", "between"), [(2, 3, 64, 40), (1, 4, 128, 0), (3, 1, 100, 1)])
@pytest.mark.parametrize("kept", [False, True])
def test_panels_are_written_and_looked_at(parts: int, blocks: int, k: int, between: int, kept: bool) -> None:
    piece = panel_piece(parts, blocks, k, between)
    assert panels(piece, BLOCK, SPLIT)
    size = parts * blocks * k * BLOCK
    recipe = Recipe(TensorSpec("t", "float32", (size,)), (piece,))
    w = np.random.default_rng(0).standard_normal(3 + blocks * BLOCK * (parts * k + between)).astype(np.float32)
    look = Counting(w, np.zeros_like(w) if kept else None)
    np.testing.assert_array_equal(written(recipe, {"w": w}, {"w": look}), evaluate(recipe, {"w": w}.__getitem__))
    assert (look.seen == 1).all()
    if look.keep is not None:
        np.testing.assert_array_equal(look.keep, w)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("size", [1000, 3 * SPLIT + 5])
def test_copies_are_written_and_looked_at(size: int, kept: bool) -> None:
    w = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    look = Counting(w, np.zeros_like(w) if kept else None)
    np.testing.assert_array_equal(written(whole(TensorSpec("t", "float32", (size,)), "w"), {"w": w}, {"w": look}), w)
    assert (look.seen == 1).all()
    assert look.keep is None or np.array_equal(look.keep, w)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("k", "n"), [(128, 64), (1024, 640)])
def test_blocked_matrices_keep_what_they_read(k: int, n: int, kept: bool) -> None:
    recipe = blocked_matrix("t", Matrix("w", k, n, transposed=True), BLOCK)
    w = np.random.default_rng(0).standard_normal(k * n).astype(np.float32)
    look = Counting(w, np.zeros_like(w) if kept else None)
    wanted = evaluate(recipe, {"w": w}.__getitem__).reshape(-1)
    np.testing.assert_array_equal(written(recipe, {"w": w}, {"w": look}), wanted)
    assert (look.seen == 1).all()
    assert look.keep is None or np.array_equal(look.keep, w)


def test_two_sources_of_one_weight_are_both_looked_at() -> None:
    one = blocked_matrix("t", Matrix("a", 128, 64, transposed=True), BLOCK)
    tail = Piece((100,), Walk(one.spec.size, (1,)), (Operand("b", Walk(0, (1,))),))
    recipe = Recipe(TensorSpec("t", "float32", (one.spec.size + 100,)), (*one.pieces, tail))
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in (("a", 128 * 64), ("b", 100))}
    looks = {name: Counting(array, np.zeros_like(array)) for name, array in tensors.items()}
    np.testing.assert_array_equal(written(recipe, tensors, looks), evaluate(recipe, tensors.__getitem__))
    for name, look in looks.items():
        assert (look.seen == 1).all()
        assert look.keep is not None
        np.testing.assert_array_equal(look.keep, tensors[name])


def test_what_nobody_reads_is_looked_at_in_parts() -> None:
    look = Counting(np.ones(2 * SPLIT + 3, np.float32), None)
    tasks = alone(look, look.flat.size)
    assert len(tasks) == 3
    for _, call, arguments in tasks:
        call(*arguments)
    assert (look.seen == 1).all()
