"""What a version keeps of its source weights: copies that nobody can change, in memory that is used again."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from onnx_refit.refit import retain
from onnx_refit.refit.retain import Retainer
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype

SPECS = (TensorSpec("a", "float32", (3, 5)), TensorSpec("b", "float16", (7,)))


def weights(value: float) -> dict[str, Array]:
    return {spec.name: np.full(spec.static_shape, value, numpy_dtype(spec.dtype)) for spec in SPECS}


@pytest.fixture
def retainer(monkeypatch: pytest.MonkeyPatch) -> Retainer:
    monkeypatch.setattr(retain, "_SPARE_SECONDS", 1e6)  # however slow the machine is, nothing is freed meanwhile
    return Retainer(SPECS)


def test_it_copies_and_nobody_can_change_the_copies(retainer: Retainer) -> None:
    given = weights(1.0)
    kept = retainer.retain(given, None)
    given["a"][:] = 9.0
    assert set(kept) == {"a", "b"}
    for name, array in weights(1.0).items():
        np.testing.assert_array_equal(kept[name], array)
        assert kept[name].dtype == array.dtype
        assert not kept[name].flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            kept[name][...] = 0


def test_what_is_not_given_stays(retainer: Retainer) -> None:
    before = retainer.retain(weights(1.0), None)
    kept = retainer.retain({"b": weights(2.0)["b"]}, before)
    del before
    retainer.retain(weights(3.0), None)
    np.testing.assert_array_equal(kept["a"], weights(1.0)["a"])
    np.testing.assert_array_equal(kept["b"], weights(2.0)["b"])


def test_memory_is_used_again_only_when_every_array_read_from_it_is_gone(retainer: Retainer) -> None:
    kept = retainer.retain(weights(1.0), None)
    address = kept["a"].ctypes.data
    view = kept["a"][1:, ::2]
    del kept
    gc.collect()
    other = retainer.retain(weights(2.0), None)
    assert other["a"].ctypes.data != address
    np.testing.assert_array_equal(view, weights(1.0)["a"][1:, ::2])
    del view
    gc.collect()
    assert retainer.retain(weights(3.0), None)["a"].ctypes.data == address
    np.testing.assert_array_equal(other["a"], weights(2.0)["a"])


def test_spare_memory_can_be_freed(retainer: Retainer) -> None:
    retainer.retain(weights(1.0), None)
    assert retainer.seconds_left() > 0
    retainer.clear()
    np.testing.assert_array_equal(retainer.retain(weights(2.0), None)["b"], weights(2.0)["b"])


def test_nothing_to_keep() -> None:
    assert Retainer(()).retain(weights(1.0), None) == {}
