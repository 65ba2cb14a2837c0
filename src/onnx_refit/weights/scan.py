"""Passes over the bytes of tensors, at the speed of memory: finite, equal, cast without loss, measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np

from onnx_refit.tensors import Array, dtype_name, is_floating, numpy_dtype

# Elements a step of the passes that need temporaries: they stay in the second-level cache.
_CHUNK = 1 << 17
_COMPARE_BYTES = 1 << 18
_SINGLE = np.dtype(np.float32)

# A float16 and narrower is not finite where its bits without the sign reach this.
_NOT_FINITE_FROM = {"float16": 0x7C00, "bfloat16": 0x7F80, "float8e4m3fn": 0x7F, "float8e5m2": 0x7C}

# Every value of the first is a value of the second.
_WIDENS = {
    "float32": {"float64"},
    "float16": {"float32", "float64"},
    "bfloat16": {"float32", "float64"},
    "float8e4m3fn": {"float16", "bfloat16", "float32", "float64"},
    "float8e5m2": {"float16", "bfloat16", "float32", "float64"},
    "int8": {"int16", "int32", "int64", "float16", "float32", "float64"},
    "uint8": {"int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64"},
    "int16": {"int32", "int64", "float32", "float64"},
    "uint16": {"int32", "uint32", "int64", "uint64", "float32", "float64"},
    "int32": {"int64", "float64"},
    "uint32": {"int64", "uint64", "float64"},
}


def flat(array: Array) -> Array:
    """The elements in memory order as one dimension; a view where the array is contiguous in any order."""
    return array.ravel(order="K")


# Entering a block costs more than reading a few thousand elements; a decorator half of it.
@np.errstate(over="ignore", invalid="ignore")
def all_finite(array: Array) -> bool:
    """Whether no element is NaN or infinite, in one pass without temporaries (true for integers)."""
    if array.dtype is _SINGLE and array.ndim == 1 and math.isfinite(np.dot(array, array)):
        return True
    kind = array.dtype.kind
    if array.size == 0 or kind in "biu":
        return True
    values = flat(array)
    if kind == "c":
        values = values.view(np.float32 if values.itemsize == 8 else np.float64)
    if values.dtype == np.float32 or values.dtype == np.float64:
        # A sum of squares cannot cancel, so it is finite only if every element is. Where large elements overflow it,
        # look again the slow way.
        if math.isfinite(np.dot(values, values)):
            return True
        return all(bool(np.isfinite(values[i : i + _CHUNK]).all()) for i in range(0, values.size, _CHUNK))
    limit = _NOT_FINITE_FROM.get(dtype_name(values.dtype))
    if limit is None:  # a dtype without infinities and NaN
        return True
    unsigned, signed = (np.uint16, np.int16) if values.itemsize == 2 else (np.uint8, np.int8)
    sign = 0x8000 if values.itemsize == 2 else 0x80
    for i in range(0, values.size, _CHUNK):
        chunk = values[i : i + _CHUNK]
        # As signed numbers the largest is a positive value, as unsigned ones a negative value.
        highest = int(chunk.view(unsigned).max())
        if highest >= sign + limit or int(chunk.view(signed).max()) >= limit:
            return False
    return True


@dataclass(frozen=True)
class Worst:
    """One element that stands for a problem, and how many share it.

    Attributes:
        index: where it is.
        value: what it is.
        becomes: what it would become, where it is about a cast.
        count: how many elements have the problem.
    """

    index: tuple[int, ...]
    value: object
    becomes: object
    count: int


def first_non_finite(array: Array) -> Worst | None:
    """The first element that is NaN or infinite, and how many there are."""
    if array.dtype.kind in "biu":
        return None
    wide = array if array.dtype.kind in "fc" and array.dtype.itemsize >= 4 else array.astype(np.float32)
    bad = ~np.isfinite(wide)
    count = int(bad.sum())
    if not count:
        return None
    index = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), array.shape))
    return Worst(index, wide[index].item(), None, count)


def same_bits(left: Array, right: Array) -> bool:
    """Whether two arrays of one dtype and shape hold the same bits; stops at the first block that differs."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.nbytes <= 16384:
        return left.tobytes() == right.tobytes()
    a = np.ascontiguousarray(left).reshape(-1).view(np.uint8)
    b = np.ascontiguousarray(right).reshape(-1).view(np.uint8)
    words = a.size // 8 * 8
    if not bool((a[words:] == b[words:]).all()):
        return False
    wide_a, wide_b = a[:words].view(np.uint64), b[:words].view(np.uint64)
    step = _COMPARE_BYTES // 8
    # Look at a few elements of each part first: a tensor that was trained differs everywhere.
    if not np.array_equal(wide_a[::4096], wide_b[::4096]):
        return False
    return all(np.array_equal(wide_a[i : i + step], wide_b[i : i + step]) for i in range(0, wide_a.size, step))


class CastProblem(Enum):
    """Why a cast was refused."""

    KIND = "kind"
    LOSSY = "lossy"
    OVERFLOW = "overflow"


@dataclass(frozen=True)
class Cast:
    """The result of a cast: the array, or why there is none.

    Attributes:
        array: the array in the wanted dtype; None where the cast was refused.
        problem: why it was refused.
        worst: the element that changes most.
    """

    array: Array | None
    problem: CastProblem | None = None
    worst: Worst | None = None


def cast(array: Array, dtype: str, *, rounding: bool) -> Cast:
    """Cast an array to another dtype.

    Finite values never become infinite and integers never wrap, whatever ``rounding`` says; floating-point numbers
    never become integers.

    Args:
        array: any numeric array.
        dtype: the project's name of the wanted dtype.
        rounding: whether values may be rounded to the nearest one of the wanted dtype.
    """
    source = dtype_name(array.dtype)
    target = numpy_dtype(dtype)
    if source == dtype:
        return Cast(array)
    numbers = is_floating(source) or "int" in source
    if not numbers or not (is_floating(dtype) or ("int" in dtype and not is_floating(source))):
        return Cast(None, CastProblem.KIND)
    with np.errstate(all="ignore"):
        if dtype in _WIDENS.get(source, ()):
            return Cast(array.astype(target, order="C"))
        return _narrow(np.ascontiguousarray(array), target, rounding=rounding)


def _narrow(array: Array, target: np.dtype[np.generic], *, rounding: bool) -> Cast:
    """Cast block by block, comparing each with what it came from."""
    result = np.empty(array.shape, target)
    values, out = array.reshape(-1), result.reshape(-1)
    lossy = overflow = 0
    worst_lossy = worst_overflow = (-1.0, 0)  # (how bad, where)
    for start in range(0, values.size, _CHUNK):
        chunk = values[start : start + _CHUNK]
        part = chunk.astype(target)
        out[start : start + _CHUNK] = part
        where = np.flatnonzero(_differs(chunk, part))
        if not where.size:
            continue
        was, now = chunk[where].astype(np.float64), part[where].astype(np.float64)
        spilled = np.isfinite(was) & (~np.isfinite(now) if target.kind not in "iu" else True)
        error = np.nan_to_num(np.abs(was - now), nan=np.inf)
        at = int(error.argmax())
        worst_lossy = max(worst_lossy, (float(error[at]), start + int(where[at])), key=lambda w: w[0])
        if spilled.any():
            size = np.where(spilled, np.abs(was), -1.0)
            at = int(size.argmax())
            worst_overflow = max(worst_overflow, (float(size[at]), start + int(where[at])), key=lambda w: w[0])
        lossy += int(where.size)
        overflow += int(spilled.sum())
    if overflow or (lossy and not rounding):
        position = (worst_overflow if overflow else worst_lossy)[1]
        index = tuple(int(i) for i in np.unravel_index(position, array.shape))
        worst = Worst(index, array[index].item(), result[index].item(), overflow or lossy)
        return Cast(None, CastProblem.OVERFLOW if overflow else CastProblem.LOSSY, worst)
    return Cast(result)


def _differs(values: Array, converted: Array) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which elements are not the same number after a cast; NaN stays NaN."""
    back = converted.astype(values.dtype)
    differs: np.ndarray[tuple[int], np.dtype[np.bool_]] = np.asarray(back != values)
    if values.dtype.kind not in "iu":
        differs &= ~(np.isnan(back) & np.isnan(values))
        return differs
    if converted.dtype.kind in "iu":
        # Between signed and unsigned the way back undoes the wrap: look at the signs.
        differs |= np.less(converted, 0) != np.less(values, 0)
    else:
        # The way back to an integer may saturate to the very value that was lost: ask the float itself.
        real = converted.astype(np.float64)
        differs |= real != values.astype(np.float64)
        if values.dtype.itemsize == 8:
            differs |= real >= (2.0**64 if values.dtype.kind == "u" else 2.0**63)
    return differs


@dataclass(frozen=True)
class Measure:
    """How large a tensor is and how far it moved.

    Attributes:
        norm: its Euclidean norm.
        changed_bytes: bytes that differ from the current tensor; None where there is none to compare with.
        largest_relative_change: the largest change of an element over the largest magnitude in the current tensor;
            infinite where the current one is all zeros and the new one is not.
    """

    norm: float
    changed_bytes: int | None = None
    largest_relative_change: float | None = None


def measure(array: Array, current: Array | None) -> Measure:
    """Measure a numeric tensor in float64, block by block; ``current`` has the same shape and dtype."""
    values = np.ascontiguousarray(array).reshape(-1)
    before = None if current is None else np.ascontiguousarray(current).reshape(-1)
    squares = scale = change = 0.0
    changed = 0
    with np.errstate(all="ignore"):
        for start in range(0, values.size, _CHUNK):
            raw = values[start : start + _CHUNK]
            chunk = _as_float64(raw)
            squares += float(np.dot(chunk, chunk))
            if before is not None:
                old_raw = before[start : start + _CHUNK]
                old = _as_float64(old_raw)
                changed += int(np.count_nonzero(raw.view(np.uint8) != old_raw.view(np.uint8)))
                scale = max(scale, float(np.abs(old).max()))
                change = max(change, float(np.abs(chunk - old).max()))
    if before is None:
        return Measure(float(np.sqrt(squares)))
    relative = 0.0 if change == 0 else (change / scale if scale else float("inf"))
    return Measure(float(np.sqrt(squares)), changed, relative)


def _as_float64(values: Array) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    if values.dtype.kind == "c":
        values = np.abs(values)
    return values.astype(np.float64)
