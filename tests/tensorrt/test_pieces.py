from __future__ import annotations

import pytest

from onnx_refit.engine.tensorrt.bindings import find_bindings
from onnx_refit.engine.tensorrt.profiles import Range, ShapeRange, plan_profile
from onnx_refit.errors import EngineError, MissingExtraError
from onnx_refit.tensors import TensorSpec

X = TensorSpec("x", "float32", ("N", 3, None))
Y = TensorSpec("y", "int64", ("N", 1))
FIXED = TensorSpec("z", "float32", (2, 2))
FALLBACK = Range(1, 8, 16)


def test_given_sizes_come_before_the_fallback_which_is_reported() -> None:
    profile = plan_profile((X, Y, FIXED), {}, {"N": Range(1, 50, 400)}, FALLBACK)
    assert profile.shapes == {
        "x": ShapeRange((1, 3, 1), (50, 3, 8), (400, 3, 16)),
        "y": ShapeRange((1, 1), (50, 1), (400, 1)),
    }
    assert profile.inferred == ("x[2]",)


def test_a_shape_given_by_input_wins() -> None:
    given = ShapeRange.parse("1x1:2x1:3x1")
    profile = plan_profile((X, Y), {"y": given}, {}, FALLBACK)
    assert profile.shapes["y"] == given
    assert profile.inferred == ("x[0]", "x[2]")


@pytest.mark.parametrize(
    ("shapes", "dimensions", "match"),
    [
        ({"nope": ShapeRange.parse("1")}, {}, "no input 'nope'"),
        ({"y": ShapeRange.parse("1x2")}, {}, "does not fit"),
        ({"y": ShapeRange.parse("1")}, {}, "does not fit"),
        ({}, {"M": Range(1, 1, 1)}, "dimension 'M'"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: dict[str, ShapeRange], dimensions: dict[str, Range], match: str) -> None:
    with pytest.raises(EngineError, match=match):
        plan_profile((X, Y), shapes, dimensions, FALLBACK)


@pytest.mark.parametrize("text", ["", "1:2", "3:2:1", "a", "1:2:3:4", "-1:2:3"])
def test_ranges_that_are_none(text: str) -> None:
    with pytest.raises(EngineError):
        Range.parse(text)


def test_no_tensorrt_names_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"onnx-refit\[tensorrt\]"):
        find_bindings("no_such_tensorrt")
