"""Addresses of arrays, by whichever way this interpreter allows."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from onnx_refit.moves import addresses


@given(arrays.arrays(st.sampled_from([np.float32, np.int8, np.float64]), arrays.array_shapes(min_side=0)), st.data())
def test_it_is_where_the_elements_are(array: np.ndarray, data: st.DataObject) -> None:
    view = array[data.draw(arrays.basic_indices(array.shape, allow_ellipsis=False))]
    for one in (array, view):
        if isinstance(one, np.ndarray):
            assert addresses.address_of(one) == one.__array_interface__["data"][0]


def test_another_interpreter_is_asked_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.implementation, "name", "another")
    assert not addresses._agree()


def test_another_layout_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_HEAD", addresses._HEAD + 8)
    assert not addresses._agree()
