"""Checking the inputs of a request: what was right before passes quickly, and nothing else does."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_refit.errors import InputError
from onnx_refit.refit.inputs import InputChecker
from onnx_refit.tensors import TensorSpec

SPECS = (TensorSpec("a", "float32", ("N", 3)), TensorSpec("b", "int64", ("N",)))


def right(n: int = 2) -> dict[str, object]:
    return {"a": np.ones((n, 3), np.float32), "b": np.arange(n)}


@pytest.fixture
def check() -> InputChecker:
    """A checker that has just seen right inputs."""
    made = InputChecker(SPECS)
    made(right())
    return made


def test_inputs_like_the_last_ones_are_given_on_as_they_are(check: InputChecker) -> None:
    given = right()
    assert all(check(given)[name] is given[name] for name in given)
    assert list(check(dict(reversed(given.items())))) == ["a", "b"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": np.ones((2, 3))}, "float64"),
        ({"a": np.ones((2, 4), np.float32)}, "the engine takes"),
        ({"a": np.ones((5, 3), np.float32)}, "'N'"),
        ({"b": np.arange(3)}, "'N'"),
        ({"b": None}, "dtype"),
        ({"c": np.ones(1)}, "unknown: 'c'"),
    ],
)
def test_what_is_wrong_is_refused_after_right_inputs_too(
    check: InputChecker, changed: dict[str, object], message: str
) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            check({**right(), **changed})
    check(right())


def test_another_name_in_place_of_one_is_refused(check: InputChecker) -> None:
    given = right()
    given["d"] = given.pop("b")
    with pytest.raises(InputError, match=r"missing: 'b'; unknown: 'd'"):
        check(given)


def test_other_shapes_lists_and_views_are_right_as_they_were(check: InputChecker) -> None:
    assert check(right(7))["a"].shape == (7, 3)
    assert check(right(2))["a"].shape == (2, 3)
    view = np.ones((3, 2), np.float32).T
    checked = check({**right(), "a": view})["a"]
    assert checked.flags.c_contiguous
    np.testing.assert_array_equal(checked, view)
    assert check({"a": np.ones((2, 3), np.float32), "b": [4, 5]})["b"].tolist() == [4, 5]
