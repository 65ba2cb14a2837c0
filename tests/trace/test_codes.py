from __future__ import annotations

import numpy as np
import pytest

from onnx_refit.plan.trace.codes import FOREIGN, MULTIPLIERS, PADDING, Code, RandomValues

DTYPES = ["float32", "float64", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "int64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("total", [1, 5, 40_000, 3_000_000])
def test_numbers_survive_coding(dtype: str, total: int) -> None:
    code = Code(dtype, total)
    first = max(0, total - 1000)
    count = total - first
    values = [code.encode(first, count, digit) for digit in range(code.digits)]
    assert (code.decode(values) == np.arange(first, total)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_different_numbers_have_different_codes(dtype: str) -> None:
    code = Code(dtype, 30_000)
    rows = np.stack(
        [code.encode(0, 30_000, digit).view(np.uint8).reshape(30_000, -1) for digit in range(code.digits)], 1
    )
    assert len({row.tobytes() for row in rows}) == 30_000


def test_a_float32_of_half_a_billion_numbers_takes_one_run_and_more_take_two() -> None:
    assert Code("float32", 1 << 29).digits == 1
    assert Code("float32", (1 << 29) + 1).digits == 2


def test_numbers_above_two_runs_survive() -> None:
    code = Code("float32", 3 << 30)
    first = (3 << 30) - 100
    assert (code.decode([code.encode(first, 100, d) for d in range(2)]) == np.arange(first, first + 100)).all()


def test_zero_is_padding_and_anything_else_is_foreign() -> None:
    code = Code("float32", 100)
    values = np.array([0.0, -0.0, 1.0, np.nan, np.inf], np.float32)
    assert code.decode([values]).tolist() == [PADDING, FOREIGN, FOREIGN, FOREIGN, FOREIGN]
    assert (Code("float32", 10).decode([code.encode(0, 100, 0)]) == [*range(10), *[FOREIGN] * 90]).all()


def test_codes_are_ordinary_floats() -> None:
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        values = Code(dtype, 20_000).encode(0, 20_000, 0).astype(np.float64)
        assert np.isfinite(values).all()
        assert (values > 0).all()
        assert not np.isin(values, [0.5, 1.0, 2.0, 4.0]).all()


def test_multipliers_are_odd() -> None:
    assert all(multiplier % 2 for multiplier in MULTIPLIERS)


def test_random_values_differ_from_each_other_and_from_run_to_run() -> None:
    draw = RandomValues()
    first, second = draw("float32", 2_000_000), draw("float32", 2_000_000)
    assert np.isfinite(first).all()
    assert ((np.abs(first) >= 0.25) & (np.abs(first) < 0.5)).all()
    assert (first == second).mean() < 1e-3
    assert (RandomValues()("float32", 1000) == first[:1000]).mean() < 1e-2
    assert 0.4 < (first.astype(np.float64) > 0).mean() < 0.6
