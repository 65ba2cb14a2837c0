"""The quick check says what the thorough one says, or leaves the word to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_refit.plan.compiled import SourceWeight
from onnx_refit.refit.check import CheckOptions, check
from onnx_refit.refit.declared import Declared
from onnx_refit.tensors import TensorSpec
from onnx_refit.weights.sources.arrays import ArraysSource

SPECS = [
    TensorSpec("b", "float32", (2, 3)),
    TensorSpec("a", "float32", ()),
    TensorSpec("h", "float16", (4,)),
    TensorSpec("i", "int64", (2,)),
    TensorSpec("e", "float32", (0, 3)),
]
SOURCES = [SourceWeight(spec, ()) for spec in SPECS]


def fitting(spec: TensorSpec) -> Any:
    return np.ones(spec.static_shape, spec.dtype)


ODD = {
    "transposed": lambda spec: np.asfortranarray(np.ones((*spec.static_shape, 2), spec.dtype)),
    "strided": lambda spec: np.ones((*spec.static_shape, 2), spec.dtype)[..., 0],
    "float64": lambda spec: np.ones(spec.static_shape, np.float64),
    "big-endian": lambda spec: np.ones(spec.static_shape, spec.dtype).astype(">f4"),
    "scalar": lambda spec: np.float32(1),
}


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_it_agrees_with_the_thorough_check(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from([*(spec.name for spec in SPECS), "other"]), unique=True))
    specs = {spec.name: spec for spec in [*SPECS, TensorSpec("other", "float32", (2,))]}
    given = {name: fitting(specs[name]) for name in names}
    odd = data.draw(st.sampled_from([None, None, *ODD]))
    if odd is not None and names:
        name = data.draw(st.sampled_from(names))
        given[name] = ODD[odd](specs[name])
    options = CheckOptions(partial=data.draw(st.booleans()))
    source = ArraysSource(given)
    quick = Declared(SPECS).check(source, options)
    report, arrays = check(SOURCES, source, options=options, finite_later=True)
    if quick is None:
        return
    assert report.ok
    assert quick[0].ok
    assert quick[0].to_json() == report.to_json()
    assert quick[0] == report
    assert list(quick[1]) == list(arrays)
    assert all(quick[1][name] is arrays[name] for name in arrays)


def test_it_takes_some_and_all_weights_as_they_are() -> None:
    declared = Declared(SPECS)
    every = {spec.name: fitting(spec) for spec in SPECS}
    assert declared.check(ArraysSource(every), CheckOptions()) is not None
    assert declared.check(ArraysSource(every), CheckOptions(partial=True)) is not None
    some = {"h": every["h"], "b": every["b"]}
    found = declared.check(ArraysSource(some), CheckOptions(partial=True))
    assert found is not None
    assert list(found[1]) == ["b", "h"]
    assert [missing.name for missing in found[0].missing] == ["a", "i", "e"]
    assert found[0].missing[-1].spec == SPECS[-1]
    assert len(found[0].missing[1:]) == 2


@pytest.mark.parametrize(
    "options", [CheckOptions(), CheckOptions(partial=True, compare=True), CheckOptions(partial=True, measure=True)]
)
def test_it_leaves_other_questions_to_the_thorough_check(options: CheckOptions) -> None:
    assert Declared(SPECS).check(ArraysSource({"h": fitting(SPECS[2])}), options) is None


def test_nothing_is_not_taken_for_a_refit() -> None:
    assert Declared(SPECS).check(ArraysSource({}), CheckOptions(partial=True)) is None
    unknown = {"h": fitting(SPECS[2]), "other": np.ones(2, np.float32)}
    assert Declared(SPECS).check(ArraysSource(unknown), CheckOptions(partial=True)) is None
