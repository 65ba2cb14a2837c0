from __future__ import annotations

import numpy as np
import pytest

from onnx_refit.errors import WeightsError
from onnx_refit.tensors import Array
from onnx_refit.weights.finite import Reader, not_finite
from onnx_refit.weights.sources.arrays import ArraysSource


def tensors() -> list[Array]:
    rng = np.random.default_rng(0)
    sizes = (1, 31, 8192, 8193, 40_000, 0, 60_000, 8000)
    return [rng.standard_normal(size, dtype=np.float32) for size in sizes * 12]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_very_tensors_are_found(value: float) -> None:
    arrays = tensors()
    assert not_finite(arrays) == set()
    bad = {2, 3, 47, 50, 95}
    for position in bad:
        arrays[position][-1] = value
    assert not_finite(arrays) == bad


def test_large_numbers_are_finite_and_so_are_other_dtypes() -> None:
    large: Array = np.full(100, 3e38, np.float32)
    strided: Array = np.ones((20, 20), np.float32).T[::2]
    others: list[Array] = [np.arange(9), np.ones(5, np.float16), np.ones((), np.float64), np.array([True])]
    assert not_finite([large, large, strided, *others]) == set()
    others[1][2] = np.inf
    assert not_finite([large, *others]) == {2}


def test_a_reader_gives_every_tensor_and_every_error_when_it_is_asked_for() -> None:
    class Broken(ArraysSource):
        def read(self, name: str) -> Array:
            if name == "b":
                raise WeightsError("torn")
            return super().read(name)

    source = Broken({"a": np.ones(3, np.float32), "b": np.ones(3), "c": np.array([1, np.nan], np.float32)})
    reader = Reader(source, "abc", look=True)
    assert reader.read("a")[1]
    with pytest.raises(WeightsError, match="torn"):
        reader.read("b")
    assert not reader.read("c")[1]
    assert Reader(source, "c", look=False).read("c")[1]


def test_a_reader_holds_a_window_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_refit.weights.finite._WINDOW", 100)
    arrays = {f"w{i}": np.full(10, np.nan if i in {3, 8} else i, np.float32) for i in range(10)}
    read: list[str] = []

    class Counted(ArraysSource):
        def read(self, name: str) -> Array:
            read.append(name)
            return super().read(name)

    reader = Reader(Counted(arrays), list(arrays), look=True)
    for position, name in enumerate(arrays):
        array, finite = reader.read(name)
        assert array is arrays[name]
        assert finite == (position not in {3, 8})
        assert len(read) <= position + 3
