"""Native moves write what recipes say, look at every element of what they read, and stay inside their tensors."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onnx_refit.engine.onnxruntime import batch as batching
from onnx_refit.engine.onnxruntime.batch import Batcher
from onnx_refit.engine.onnxruntime.blocked import Matrix, blocked_matrix
from onnx_refit.engine.onnxruntime.buffers import Storage
from onnx_refit.engine.onnxruntime.moving import SPLIT
from onnx_refit.errors import EngineError
from onnx_refit.moves.library import WIDE, Library, load
from onnx_refit.plan.trace.recipes import Gather, Operand, Piece, Recipe, Walk, c_strides, evaluate, whole
from onnx_refit.tensors import Array, TensorSpec, dtype_name, numpy_dtype

PREFIX = "source:"
found = load()
pytestmark = pytest.mark.skipif(not isinstance(found, Library), reason="no native code was compiled")


class Eye:
    """A look that remembers."""

    def __init__(self, keep: Array | None, *, watched: bool = True) -> None:
        self.keep, self.watched, self.suspected = keep, watched, False

    def suspect(self) -> None:
        self.suspected = True

    def watch(self, begin: int, end: int) -> None:
        raise AssertionError("native code looks for itself")

    def __call__(self, begin: int, end: int) -> None:
        raise AssertionError("native code looks for itself")


def batcher(recipe: Recipe, tensors: Mapping[str, Array], carried: Sequence[str] = ()) -> Batcher:
    assert isinstance(found, Library)
    dtypes = {name: array.dtype for name, array in tensors.items()}
    sizes = {name: array.size for name, array in tensors.items()}
    return Batcher(found, {"t": recipe}, dtypes, sizes, dict.fromkeys(carried, "t"), PREFIX)


def moved(recipe: Recipe, tensors: Mapping[str, Array], eyes: Mapping[str, Eye] | None = None) -> Array:
    """What native code makes of a recipe, between two guards."""
    eyes = eyes or {}
    made = batcher(recipe, tensors, [name for name in eyes if PREFIX + name in recipe.sources])
    assert made.names == {"t"}
    guarded = Storage(TensorSpec("t", recipe.spec.dtype, (recipe.spec.size + 64,)))
    guarded.flat[-64:] = 1
    ready = made.ready({"t": guarded}, tensors, {}, eyes)
    made.work(ready)
    made.work(ready)  # whoever comes late finds nothing to do
    ready.tell()
    assert (guarded.flat[-64:] == 1).all()
    return guarded.flat[: recipe.spec.size]


def unaligned(array: Array, by: int) -> Array:
    """The same elements, beginning at any byte that the dtype allows."""
    room = np.zeros(array.size + by, array.dtype)
    room[by:] = array
    return room[by:]


@st.composite
def pieces(draw: st.DrawFn) -> tuple[Piece, int, int]:
    """A piece whose source is its target with the axes in another order; elements of the target and of the source."""
    dims = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5).filter(lambda d: math.prod(d) <= 1 << 17))
    order = draw(st.permutations(range(len(dims))))
    gap, before = draw(st.integers(0, 3)), draw(st.integers(0, 20))
    turned = [dims[k] for k in order]
    turned[-1] += gap
    inner = c_strides(turned)
    strides = tuple(inner[order.index(k)] for k in range(len(dims)))
    after, wide = draw(st.integers(0, 20)), draw(st.integers(0, 2))
    target = c_strides([*dims[:-1], dims[-1] + wide])
    piece = Piece(tuple(dims), Walk(after, target), (Operand(PREFIX + "w", Walk(before, strides)),))
    return piece, after + math.prod([*dims[:-1], dims[-1] + wide]), before + math.prod(turned)


@settings(max_examples=300, deadline=None)
@given(
    pieces(), st.sampled_from(["float32", "float16", "int8", "float64", "bfloat16"]), st.integers(0, 3), st.booleans()
)
def test_any_order_of_axes(made: tuple[Piece, int, int], dtype: str, by: int, stream: bool) -> None:
    piece, size, count = made
    rng = np.random.default_rng(count)
    w = unaligned(rng.integers(0, 100, count).astype(numpy_dtype(dtype)), by)
    recipe = Recipe(TensorSpec("t", dtype, (size,)), (piece,))
    eye = Eye(np.zeros_like(w))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(batching, "_STREAMED", 0 if stream else 1 << 60)
        got = moved(recipe, {PREFIX + "w": w}, {"w": eye})
    np.testing.assert_array_equal(got, evaluate(recipe, lambda _: w))
    np.testing.assert_array_equal(eye.keep, w)
    assert not eye.suspected


@settings(max_examples=200, deadline=None)
@given(pieces(), st.data())
def test_products_are_those_of_numpy(made: tuple[Piece, int, int], data: st.DataObject) -> None:
    piece, size, count = made
    rng = np.random.default_rng(count)
    w = rng.standard_normal(count).astype(np.float32)
    along = [data.draw(st.booleans()) for _ in piece.dims]
    steps = c_strides([d if a else 1 for d, a in zip(piece.dims, along, strict=True)])
    strides = tuple(s if a else 0 for s, a in zip(steps, along, strict=True))
    f = rng.standard_normal(math.prod(d for d, a in zip(piece.dims, along, strict=True) if a)).astype(np.float32)
    operands = [*piece.operands, Operand("computed:f", Walk(0, strides))]
    if data.draw(st.booleans()):
        operands.reverse()
    recipe = Recipe(TensorSpec("t", "float32", (size,)), (Piece(piece.dims, piece.target, tuple(operands)),))
    tensors: dict[str, Array] = {PREFIX + "w": w, "computed:f": f}
    np.testing.assert_array_equal(moved(recipe, tensors), evaluate(recipe, tensors.__getitem__))


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("k", "n"), [(1000, 512), (512, 1004), (64, 12), (7, 4096), (4096, 96)])
@pytest.mark.parametrize("stream", [False, True])
def test_blocked_matrices(
    block: int, turned: bool, k: int, n: int, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "_STREAMED", 0 if stream else 1 << 60)
    w = np.random.default_rng(k).standard_normal(k * n).astype(np.float32)
    recipe = blocked_matrix("t", Matrix(PREFIX + "w", k, n, turned), block)
    eye = Eye(np.zeros_like(w))
    np.testing.assert_array_equal(moved(recipe, {PREFIX + "w": w}, {"w": eye}), evaluate(recipe, lambda _: w).ravel())
    np.testing.assert_array_equal(eye.keep, w)


FLOATS = ["float32", "float64", "float16", "bfloat16", "float8e4m3fn", "float8e5m2"]


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kept", [False, True])
@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 70), n=st.integers(1, 70), data=st.data())
def test_what_is_not_finite_is_seen_while_it_is_moved(
    block: int, turned: bool, kept: bool, k: int, n: int, data: st.DataObject
) -> None:
    w = np.ones(k * n, np.float32)
    matrix = blocked_matrix("t", Matrix(PREFIX + "w", k, n, turned), block)
    factor = Operand("computed:f", Walk(0, (0,)))
    scaled = tuple(
        Piece(p.dims, p.target, (*p.operands, Operand(factor.name, Walk(0, (0,) * len(p.dims))))) for p in matrix.pieces
    )
    recipe = data.draw(st.sampled_from([matrix, Recipe(matrix.spec, scaled)]))
    tensors: dict[str, Array] = {PREFIX + "w": w, "computed:f": np.full(1, 3, np.float32)}

    def suspected() -> bool:
        eye = Eye(np.zeros_like(w) if kept else None)
        got = moved(recipe, tensors, {"w": eye})
        np.testing.assert_array_equal(got, evaluate(recipe, tensors.__getitem__).ravel())
        return eye.suspected

    assert not suspected()
    w[data.draw(st.integers(0, k * n - 1))] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    assert suspected()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FLOATS), st.integers(1, 3 * SPLIT), st.data(), st.booleans())
@example("float32", SPLIT, None, True)
def test_what_is_not_finite_is_seen_wherever_it_is(
    dtype: str, size: int, data: st.DataObject | None, read: bool
) -> None:
    """Whether an engine weight is written from the source, or nothing is."""
    kind = numpy_dtype(dtype)
    at = size - 1 if data is None else data.draw(st.integers(0, size - 1))
    bad = ["nan"] if dtype == "float8e4m3fn" else ["nan", "inf", "-inf", "-nan"]
    value = "nan" if data is None else data.draw(st.sampled_from(bad))
    w = np.ones(size, kind)
    recipe = whole(TensorSpec("t", dtype, (size,)), PREFIX + "w" if read else PREFIX + "v")
    tensors = {PREFIX + "w": w, PREFIX + "v": np.ones(size, kind)}
    extremes = [ml_dtypes.finfo(kind).max, ml_dtypes.finfo(kind).min, 0, ml_dtypes.finfo(kind).smallest_subnormal]
    w[: min(4, size)] = np.array(extremes[: min(4, size)], kind)

    def suspected(*, watched: bool = True) -> bool:
        eye = Eye(None, watched=watched)
        moved(recipe, tensors, {"w": eye})
        return eye.suspected

    assert not suspected()
    w[at] = np.array(float(value), kind)
    assert suspected()
    assert not suspected(watched=False)


@pytest.mark.parametrize("kept", [False, True])
def test_what_only_scales_others_is_seen_and_kept(kept: bool) -> None:
    rows, wide = 3 * SPLIT // 2, 2
    w, f = np.ones(rows * wide, np.float32), np.ones(rows, np.float32)
    operands = (Operand(PREFIX + "w", Walk(0, (wide, 1))), Operand(PREFIX + "f", Walk(0, (1, 0))))
    piece = Piece((rows, wide), Walk(0, (wide, 1)), operands)
    recipe = Recipe(TensorSpec("t", "float32", (rows * wide,)), (piece,))
    tensors: dict[str, Array] = {PREFIX + "w": w, PREFIX + "f": f}

    def suspected() -> list[str]:
        eyes = {name: Eye(np.zeros_like(tensors[PREFIX + name]) if kept else None) for name in ("w", "f")}
        moved(recipe, tensors, eyes)
        for name, eye in eyes.items():
            assert eye.keep is None or eye.keep.tobytes() == tensors[PREFIX + name].tobytes()
        return [name for name, eye in eyes.items() if eye.suspected]

    assert suspected() == []
    for position in (0, SPLIT, rows - 1):
        f[position] = np.nan
        assert suspected() == ["f"]
        f[position] = 1


def test_what_is_moved_in_part_and_scales_in_part_is_seen() -> None:
    half = 2 * WIDE
    w, v = np.ones(2 * half, np.float32), np.ones(half, np.float32)
    plain = Walk(0, (1,))
    pieces = (
        Piece((half,), plain, (Operand(PREFIX + "w", plain),)),
        Piece((half,), Walk(half, (1,)), (Operand(PREFIX + "v", plain), Operand(PREFIX + "w", Walk(half, (1,))))),
    )
    recipe = Recipe(TensorSpec("t", "float32", (2 * half,)), pieces)
    for position in (0, half - 1, half, 2 * half - 1):
        w[position] = np.inf
        eye = Eye(None)
        moved(recipe, {PREFIX + "w": w, PREFIX + "v": v}, {"w": eye})
        assert eye.suspected
        w[position] = 1


def test_the_bits_of_nan_survive() -> None:
    bits = np.arange(0x7F800001, 0x7F800001 + 160, dtype=np.uint32)
    w = bits.view(np.float32)
    for strides in ((1, 16), (10, 1), (1, 10)):
        dims = (16, 10) if strides == (10, 1) else (10, 16) if strides == (1, 10) else (16, 10)
        piece = Piece(dims, Walk(0, c_strides(dims)), (Operand(PREFIX + "w", Walk(0, strides)),))
        recipe = Recipe(TensorSpec("t", "float32", (160,)), (piece,))
        wanted = np.ndarray(dims, np.uint32, bits, 0, tuple(4 * s for s in strides)).ravel()
        np.testing.assert_array_equal(moved(recipe, {PREFIX + "w": w}).view(np.uint32), wanted)


@pytest.mark.parametrize("by", range(1, 8))
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("steps", [(40, 1), (1, 60), (2, 120)])
@pytest.mark.parametrize("scaled", [False, True])
def test_sources_that_begin_at_any_byte(by: int, dtype: str, steps: tuple[int, int], scaled: bool) -> None:
    """As tensors of a checkpoint may, of which a view was taken."""

    def at_byte(values: Array) -> Array:
        room = np.zeros(values.nbytes + by, np.uint8)[by:]
        placed: Array = room.view(values.dtype)
        placed[:] = values
        return placed

    w = at_byte(np.arange(4800).astype(numpy_dtype(dtype)))
    operands = [Operand(PREFIX + "w", Walk(0, steps))]
    tensors: dict[str, Array] = {PREFIX + "w": w}
    if scaled and dtype == "float32":
        tensors["computed:f"] = at_byte(np.full(40, 3, np.float32))
        operands.append(Operand("computed:f", Walk(0, (0, 1))))
    recipe = Recipe(TensorSpec("t", dtype, (2400,)), (Piece((60, 40), Walk(0, (40, 1)), tuple(operands)),))
    eye = Eye(at_byte(np.zeros_like(w)))
    np.testing.assert_array_equal(moved(recipe, tensors, {"w": eye}), evaluate(recipe, tensors.__getitem__))
    np.testing.assert_array_equal(eye.keep, w)


def test_names_are_any_names() -> None:
    """An engine weight may be called like what is only looked at."""
    assert isinstance(found, Library)
    spec = TensorSpec("t", "float32", (100,))
    recipes = {name: whole(spec, PREFIX + "w") for name in ("a", "b", "look v")}
    ones = {PREFIX + name: np.ones(100, np.float32) for name in ("w", "v")}
    sizes, dtypes = dict.fromkeys(ones, 100), dict.fromkeys(ones, np.dtype(np.float32))
    made = Batcher(found, recipes, dtypes, sizes, {"w": "a"}, PREFIX)
    first = {name: Storage(spec) for name in ("a", "look v")}
    made.work(made.ready(first, ones, {}, {}))
    second = {"a": Storage(spec)}
    ones[PREFIX + "v"][7] = np.nan
    eye = Eye(None)
    ready = made.ready(second, ones, {}, {"v": eye})
    assert ready.elements == 200
    made.work(ready)
    ready.tell()
    assert eye.suspected
    assert all(storage.flat.all() for storage in (*first.values(), *second.values()))


def test_who_works_on_a_batch_keeps_all_that_it_points_at() -> None:
    """Whoever waits for the threads may be interrupted, and forget it."""
    begun, go = threading.Event(), threading.Event()

    def work(address: int) -> None:
        begun.set()
        assert go.wait(60)

    recipe = whole(TensorSpec("t", "float32", (100,)), PREFIX + "w")
    tensors: dict[str, Array] = {PREFIX + "w": np.ones(100, np.float32)}
    held = weakref.ref(tensors[PREFIX + "w"])
    made = batcher(recipe, tensors)
    assert isinstance(found, Library)
    made.library = replace(found, work=work)
    batches = [made.ready({"t": Storage(recipe.spec)}, tensors, {}, {})]
    thread = threading.Thread(target=lambda: made.work(batches.pop()))
    thread.start()
    del tensors
    assert begun.wait(60)
    gc.collect()
    assert held() is not None
    go.set()
    thread.join()
    assert held() is None


def test_a_batch_keeps_tensors_whose_addresses_were_known_before() -> None:
    recipe = whole(TensorSpec("t", "float32", (100,)), PREFIX + "w")
    steady: dict[str, Array] = {PREFIX + "w": np.ones(100, np.float32)}
    held = weakref.ref(steady[PREFIX + "w"])
    made = batcher(recipe, steady)
    ready = made.ready({"t": Storage(recipe.spec)}, {}, steady, {})
    del steady
    made.rest()
    gc.collect()
    assert held() is not None  # an interrupt may have left a thread that reads it
    del ready
    gc.collect()
    assert held() is None


def test_gathers() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal(500).astype(np.float32)
    to, take = rng.permutation(300)[:200], rng.integers(0, 500, 200)
    recipe = Recipe(TensorSpec("t", "float32", (300,)), (), (Gather(PREFIX + "w", to, take),))
    np.testing.assert_array_equal(moved(recipe, {PREFIX + "w": w}), evaluate(recipe, lambda _: w))


@pytest.mark.parametrize(
    "walk", [Walk(0, (11, 1)), Walk(-1, (10, 1)), Walk(1, (10, 1)), Walk(0, (-10, 1)), Walk(1 << 40, (10, 1))]
)
@pytest.mark.parametrize("side", ["target", "source", "factor"])
def test_what_leaves_a_tensor_is_not_moved(walk: Walk, side: str) -> None:
    plain = Walk(0, (10, 1))
    walks = {name: walk if name == side else plain for name in ("target", "source", "factor")}
    operands = (Operand(PREFIX + "w", walks["source"]), Operand("computed:f", walks["factor"]))
    recipe = Recipe(TensorSpec("t", "float32", (100,)), (Piece((10, 10), walks["target"], operands),))
    zeros = np.zeros(100, np.float32)
    assert not batcher(recipe, {PREFIX + "w": zeros, "computed:f": zeros}).names


@pytest.mark.parametrize(("to", "take"), [([300], [0]), ([-1], [0]), ([0], [500]), ([0], [-1]), ([0, 1], [0])])
def test_gathers_that_leave_a_tensor_are_not_moved(to: list[int], take: list[int]) -> None:
    gather = Gather(PREFIX + "w", np.array(to), np.array(take))
    recipe = Recipe(TensorSpec("t", "float32", (300,)), (), (gather,))
    assert not batcher(recipe, {PREFIX + "w": np.zeros(500, np.float32)}).names


@pytest.mark.parametrize("wrong", [np.zeros(9, np.float32), np.zeros(10, np.float64), np.zeros(20, np.float32)[::2]])
def test_other_tensors_than_those_agreed_are_refused(wrong: Array) -> None:
    recipe = whole(TensorSpec("t", "float32", (10,)), PREFIX + "w")
    made = batcher(recipe, {PREFIX + "w": np.zeros(10, np.float32)})
    storage = Storage(recipe.spec)
    with pytest.raises(EngineError, match="source:w"):
        made.ready({"t": storage}, {PREFIX + "w": wrong}, {}, {})
    with pytest.raises(KeyError):
        made.ready({"t": storage}, {}, {}, {})


@pytest.mark.parametrize("dtype", [np.float16, np.int32])
def test_casts_and_products_of_other_dtypes_are_left_to_python(dtype: type) -> None:
    tensors: dict[str, Array] = {PREFIX + "w": np.zeros(10, dtype), "f": np.zeros(10, dtype)}
    assert not batcher(whole(TensorSpec("t", "float32", (10,)), PREFIX + "w"), tensors).names
    operands = (Operand(PREFIX + "w", Walk(0, (1,))), Operand("f", Walk(0, (1,))))
    product = Recipe(TensorSpec("t", dtype_name(dtype), (10,)), (Piece((10,), Walk(0, (1,)), operands),))
    assert not batcher(product, tensors).names
