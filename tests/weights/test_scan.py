"""The fast passes agree with the slow, obvious ones."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnx_refit.tensors import dtype_name, numpy_dtype
from onnx_refit.weights.scan import CastProblem, all_finite, cast, first_non_finite, measure, same_bits

FLOATS = ["float16", "bfloat16", "float32", "float64", "float8e4m3fn", "float8e5m2"]
BIG = 300_000  # several blocks


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1, 7, BIG])
def test_one_non_finite_value_is_seen_wherever_it_is(dtype: str, size: int) -> None:
    array = np.linspace(-3, 3, size).astype(numpy_dtype(dtype))
    assert all_finite(array)
    assert first_non_finite(array) is None
    values = [np.nan, -np.nan] + ([] if dtype == "float8e4m3fn" else [np.inf, -np.inf])
    for value in values:
        for at in {0, size // 2, size - 1}:
            bad = array.copy()
            bad[at] = value
            assert not all_finite(bad), (value, at)
            worst = first_non_finite(bad)
            assert worst is not None
            assert (worst.index, worst.count) == ((at,), 1)


def test_every_float16_and_bfloat16_is_judged_right() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        values = bits.view(dtype)
        expected = np.isfinite(values.astype(np.float32))
        got = np.array([all_finite(values[i : i + 1]) for i in range(values.size)])
        assert np.array_equal(got, expected)


def test_large_finite_values_are_finite() -> None:
    for dtype in (np.float32, np.float64):
        array: Any = np.full(1000, np.finfo(dtype).max, dtype)
        assert all_finite(array)
        assert all_finite(-array)
        array[-1] = np.inf
        assert not all_finite(array)


@pytest.mark.parametrize(
    "array", [np.zeros((0, 3), np.float32), np.array([1, 2]), np.array(True), np.zeros(3, ml_dtypes.int4)]
)
def test_what_cannot_be_infinite_is_finite(array: np.ndarray) -> None:
    assert all_finite(array)


def test_complex_and_strided_arrays() -> None:
    assert all_finite(np.ones(3, np.complex64))
    assert not all_finite(np.array([1, complex(0, np.nan)]))
    array = np.ones((4, 6), np.float32)
    array[1, 3] = np.nan
    assert not all_finite(array.T)
    assert all_finite(array[:, ::2])
    assert not all_finite(array[:, 1::2])


@pytest.mark.parametrize("size", [0, 1, 3, 5000, BIG + 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_same_bits_sees_any_one_bit(dtype: type, size: int) -> None:
    array: Any = np.random.default_rng(0).integers(0, 200, size).astype(dtype)
    assert same_bits(array, array.copy())
    for at in {0, size // 3, size - 1} if size else ():
        other = array.copy()
        other.view(np.uint8)[at * other.itemsize] ^= 1
        assert not same_bits(array, other)


def test_same_bits_is_about_bits_not_values() -> None:
    nan = np.array([np.nan], np.float32)
    assert same_bits(nan, nan.copy())
    assert not same_bits(np.array([0.0]), np.array([-0.0]))
    assert not same_bits(np.zeros(2, np.float32), np.zeros(2, np.int32))
    assert not same_bits(np.zeros((1, 2)), np.zeros((2, 1)))
    array = np.random.default_rng(0).random((200, 300))
    assert same_bits(array.T, np.ascontiguousarray(array.T))


@pytest.mark.parametrize(
    ("values", "source", "target"),
    [
        ([1.5, -2.25, np.nan], "float16", "float32"),
        ([1.5, -2.25, np.inf], "bfloat16", "float32"),
        ([0.5, -1.5], "float8e4m3fn", "float16"),
        ([1.5, -2.25, np.nan, np.inf], "float32", "float16"),
        ([1.5, -2.25], "float64", "bfloat16"),
        ([1, -127], "int8", "bfloat16"),
        ([1, 2**24], "int64", "float32"),
        ([-128, 127], "int64", "int8"),
        ([0, 255], "int32", "uint8"),
    ],
)
def test_lossless_casts(values: list[float], source: str, target: str) -> None:
    array = np.array(values).astype(numpy_dtype(source))
    result = cast(array, target, rounding=False)
    assert result.array is not None
    assert dtype_name(result.array.dtype) == target
    np.testing.assert_array_equal(result.array.astype(np.float64), array.astype(np.float64))


@pytest.mark.parametrize(
    ("values", "source", "target", "problem", "index"),
    [
        ([1.0, 1.1, 1.0001], "float32", "float16", CastProblem.LOSSY, 1),
        ([1.0, 1e6, 7e4], "float32", "float16", CastProblem.OVERFLOW, 1),
        ([1.1, -1e39], "float64", "float32", CastProblem.OVERFLOW, 1),
        ([1.0, 1000.0], "float32", "float8e4m3fn", CastProblem.OVERFLOW, 1),
        ([0, 2**24 + 1], "int32", "float32", CastProblem.LOSSY, 1),
        ([0, 2**63 - 1], "int64", "float64", CastProblem.LOSSY, 1),
        ([0, 70000], "int32", "float16", CastProblem.OVERFLOW, 1),
        ([0, 128], "int32", "int8", CastProblem.OVERFLOW, 1),
        ([0, -1], "int8", "uint8", CastProblem.OVERFLOW, 1),
    ],
)
def test_casts_that_lose_are_refused_with_the_worst_value(values, source, target, problem, index) -> None:
    array = np.array(values).astype(numpy_dtype(source))
    result = cast(array, target, rounding=False)
    assert result.array is None
    assert result.problem is problem
    assert result.worst is not None
    assert result.worst.index == (index,)
    assert result.worst.value == array[index].item()
    rounded = cast(array, target, rounding=True)
    assert (rounded.array is None) is (problem is CastProblem.OVERFLOW)


def test_the_worst_value_is_found_across_blocks() -> None:
    array = np.ones(BIG, np.float32)
    array[[5, BIG - 2]] = [1.0001, 1000.3]
    result = cast(array, "float16", rounding=False)
    assert result.worst is not None
    assert (result.worst.index, result.worst.count) == ((BIG - 2,), 2)
    array[17] = 1e5
    result = cast(array, "float16", rounding=True)
    assert result.worst is not None
    assert (result.problem, result.worst.index, result.worst.count) == (CastProblem.OVERFLOW, (17,), 1)


@pytest.mark.parametrize(
    ("source", "target"), [("float32", "int32"), ("bool", "float32"), ("complex64", "float32"), ("int8", "bool")]
)
def test_casts_between_kinds_are_refused(source: str, target: str) -> None:
    assert cast(np.zeros(2, numpy_dtype(source)), target, rounding=True).problem is CastProblem.KIND


def test_measure() -> None:
    old = np.zeros(BIG, np.float32)
    old[0] = 4
    new = old.copy()
    new[BIG - 1] = 3
    result = measure(new, old)
    assert result.norm == 5
    assert result.largest_relative_change == 0.75
    assert result.changed_bytes == 2  # 3.0 is 0x40400000
    assert measure(new, None).changed_bytes is None
    assert measure(np.ones(2), np.zeros(2)).largest_relative_change == float("inf")
    assert measure(np.zeros(2), np.zeros(2)).largest_relative_change == 0
