"""A map of names applied to later checkpoints: nothing mixed, nothing missed in silence."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from onnx_refit.errors import RefitRejectedError, WeightsFormatError
from onnx_refit.refit.check import CheckOptions, RejectReason, check
from onnx_refit.weights.mapped_view import MappedView
from onnx_refit.weights.name_map import NameMap
from onnx_refit.weights.open import open_weights
from tests.weights.names_support import A, B, C, find, outcome, r, sources_of


def test_a_new_checkpoint_goes_through_the_map() -> None:
    weights = {"12": A.T.copy(), "13": B}
    names = find(weights, {"a": A, "b": B, "steps": np.array(3)}).names
    new = {"a": C, "b": A.astype(np.float64), "steps": np.array(9)}
    report, arrays = check(sources_of(weights), MappedView(open_weights(new), names))
    assert report.ok
    assert report.unused == ()
    assert report.accepted[0].checkpoint_names == ("a",)
    np.testing.assert_array_equal(arrays["12"], C.T)
    assert arrays["12"].flags.c_contiguous


def test_the_models_own_names_still_work_but_are_never_mixed_in() -> None:
    weights = {"fc.weight": A.T.copy(), "fc.bias": B}
    names = find(weights, {"fc.weight": A, "bias": B}).names
    report, arrays = check(
        sources_of(weights), MappedView(open_weights({"fc.weight": C.T.copy(), "fc.bias": A}), names)
    )
    assert report.ok
    np.testing.assert_array_equal(arrays["fc.weight"], C.T)
    report, _ = check(sources_of(weights), MappedView(open_weights({"fc.weight": C, "other": B}), names))
    assert [m.name for m in report.missing] == ["fc.bias"]


def test_an_unexplained_weight_never_takes_the_tensor_of_its_name() -> None:
    weights = {"w": A * np.float32(1.5) + 1, "v": B}
    names = find(weights, {"w": A, "v": B}).names
    report, _ = check(sources_of(weights), MappedView(open_weights({"w": A, "v": B}), names))
    assert [m.name for m in report.missing] == ["w"]


def test_a_checkpoint_of_other_shapes_is_refused() -> None:
    weights = {"q": A[:2], "k": A[2:]}
    names = find(weights, {"qk": A}).names
    report, _ = check(sources_of(weights), MappedView(open_weights({"qk": r(8, 6)}), names))
    assert {x.reason for x in report.rejected} == {RejectReason.SHAPE}
    assert "had the shape [4, 6] when the plan was built" in report.rejected[0].text


def test_a_bias_that_was_zero_and_dropped_by_the_exporter_cannot_return_unnoticed() -> None:
    weights = {"w": A}
    checkpoint = {
        "fc.weight": A,
        "fc.bias": np.zeros(4, np.float32),
        "dead.weight": B,
        "dead.bias": np.zeros(4, np.float32),
    }
    names = find(weights, checkpoint).names
    assert names.neutral == {"fc.bias": 0.0}
    assert check(sources_of(weights), MappedView(open_weights(checkpoint), names))[0].ok
    trained = {**checkpoint, "fc.bias": np.ones(4, np.float32), "dead.bias": np.ones(4, np.float32)}
    report, _ = check(sources_of(weights), MappedView(open_weights(trained), names))
    assert [(x.name, x.reason) for x in report.rejected] == [("fc.bias", RejectReason.DROPPED)]


def test_a_cast_of_the_exporter_is_repeated_but_overflow_is_refused() -> None:
    weights = {"w": A.astype(np.float16)}
    names = find(weights, {"a": A}).names
    assert check(sources_of(weights), MappedView(open_weights({"a": B}), names))[0].ok
    report, _ = check(sources_of(weights), MappedView(open_weights({"a": B * 1e9}), names))
    assert report.rejected[0].reason is RejectReason.UNREADABLE
    assert "does not fit into float16" in report.rejected[0].text


def test_partial_refits_through_a_map() -> None:
    weights = {"12": A.T.copy(), "13": B}
    names = find(weights, {"a": A, "b": B}).names
    report, arrays = check(
        sources_of(weights), MappedView(open_weights({"a": C}), names), options=CheckOptions(partial=True)
    )
    assert report.ok
    assert list(arrays) == ["12"]


GOOD = find({"12": A.T.copy()}, {"a": A}).names.to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"entries": 3},
        {"entries": {"12": {"op": "run", "of": "a"}}},
        {"entries": {"12": {"op": "transpose", "of": "a", "perm": [0, 0]}}},
        {"entries": {"12": {"op": "transpose", "of": "a"}}},
        {"entries": {"12": {"op": "reshape", "of": "a", "shape": [-1]}}},
        {"entries": {"12": {"op": "reshape", "of": None, "shape": [1]}}},
        {"entries": {"12": {"op": "scale", "of": "a", "by": float("nan"), "how": "multiply"}}},
        {"entries": {"12": {"op": "scale", "of": "a", "by": 1.0, "how": "eval"}}},
        {"entries": {"12": {"op": "convert", "of": "a", "dtype": "object"}}},
        {"entries": {"12": {"op": "convert", "of": "a", "dtype": "int8"}}},
        {"entries": {"12": {"op": "concat", "parts": [], "axis": 0}}},
        {"entries": {"12": "unknown tensor"}},
        {"entries": {"other weight": "a"}},
        {"shapes": {"a": [1.5]}},
        {"neutral": {"a": 2}},
        {"fixed": ["unknown"]},
        {"ignored": 3},
        {"weights": {"12": ["float32"]}},
    ],
)
def test_a_map_that_lies_is_refused(change: dict[str, Any]) -> None:
    assert NameMap.from_json(GOOD).entries
    with pytest.raises(WeightsFormatError):
        NameMap.from_json({**GOOD, **change})
    deep: Any = "a"
    for _ in range(100):
        deep = {"op": "reshape", "of": deep, "shape": [1]}
    with pytest.raises(WeightsFormatError):
        NameMap.from_json({**GOOD, "entries": {"12": deep}})


def test_a_map_whose_shapes_lie_gives_nothing() -> None:
    for entry in (
        {"op": "reshape", "of": "a", "shape": [24]},
        {"op": "transpose", "of": "a", "perm": [0, 1, 2]},
        {"op": "take", "of": "a", "axis": 0, "indices": [99]},
        {"op": "slice", "of": "a", "axis": 7, "start": 0, "stop": 1},
        {"op": "concat", "parts": ["a", {"op": "transpose", "of": "a", "perm": [1, 0]}], "axis": 0},
        {"op": "reshape", "of": "a", "shape": [1 << 40]},
    ):
        names = NameMap.from_json({**GOOD, "entries": {"12": entry}})
        report, arrays = check(sources_of({"12": A.T.copy()}), MappedView(open_weights({"a": A}), names))
        assert [x.reason for x in report.rejected] == [RejectReason.UNREADABLE], entry
        assert arrays == {}


def test_a_missing_tensor_is_called_by_the_checkpoints_name() -> None:
    weights = {"onnx::MatMul_411": A.T.copy(), "onnx::Gemm_412": B, "other": C}
    names = find(weights, {"h.weight": A, "h.bias": B, "norm": C}).names
    report, _ = outcome(names, weights, {"module.h.weight": A, "norm": C})
    first, second = report.problems()
    assert first == (
        "h.weight: float32[4, 6] is missing, for the weight onnx::MatMul_411 (meant: module.h.weight: float32[4, 6]?)"
    )
    assert second.startswith("h.bias: float32[4, 6] is missing, for the weight onnx::Gemm_412")
    with pytest.raises(RefitRejectedError, match="For other names give rules"):
        report.raise_if_rejected()
    assert report.to_json()["missing"][0]["checkpoint_names"] == ["h.weight"]
    json.dumps(report.to_json(), allow_nan=False)


def test_a_plan_of_a_wrong_checkpoint_still_takes_the_models_own_names() -> None:
    weights = {"embedding": A, "fc.weight": B, "fc.bias": C}
    # Another epoch's checkpoint, of which only the frozen part is the model's; all names are of both kinds.
    names = find(weights, {"embedding": A, "fc.weight": r(4, 6), "fc.bias": r(4, 6)}).names
    new = {"embedding": C, "fc.weight": A, "fc.bias": B}
    report, arrays = outcome(names, weights, new)
    assert report.ok
    for name, array in new.items():
        np.testing.assert_array_equal(arrays[name], array)
    report, _ = check(
        sources_of(weights), MappedView(open_weights({"fc.bias": B}), names), options=CheckOptions(partial=True)
    )
    assert report.ok


def test_a_weight_that_no_checkpoint_gives_says_so() -> None:
    weights = {"w": A * np.float32(1.5) + 1, "v": B, "u": C}
    names = find(weights, {"a": A, "v": B, "u": C}).names
    report, _ = outcome(names, weights, {"a": A, "v": B, "u": C})
    assert report.problems() == [
        "w: float32[4, 6] is missing: no tensor of the checkpoint that the plan was built with gives it"
    ]
    with pytest.raises(RefitRejectedError, match="the very checkpoint that the model was exported from"):
        report.raise_if_rejected()
