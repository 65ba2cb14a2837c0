"""The check accounts for every weight and says why it refuses."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from onnx_refit.errors import RefitRejectedError
from onnx_refit.plan.compiled import SourceWeight
from onnx_refit.refit.check import (
    Casting,
    CheckOptions,
    CheckReport,
    RejectReason,
    UnusedTensors,
    check,
)
from onnx_refit.tensors import Array, TensorSpec, spec_of
from onnx_refit.weights.open import open_weights

MODEL: dict[str, Any] = {
    "layer.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "layer.0.bias": np.ones(3, np.float32),
    "table": np.arange(4, dtype=np.int32),
}
SOURCES = [SourceWeight(spec_of(name, array), ()) for name, array in MODEL.items()]


def run(arrays: Mapping[str, object], **options) -> tuple[CheckReport, dict[str, Array]]:
    current = options.pop("current", None)
    return check(SOURCES, open_weights(arrays), current=current, options=CheckOptions(**options))


def test_a_complete_checkpoint_is_ok_and_shares_memory() -> None:
    report, arrays = run(MODEL)
    assert report.ok
    report.raise_if_rejected()
    assert list(arrays) == list(MODEL)
    assert all(np.shares_memory(arrays[n], MODEL[n]) for n in MODEL)
    assert report.nbytes == 24 + 12 + 16
    assert report.changed == set(MODEL)
    json.dumps(report.to_json(), allow_nan=False)


def test_arrays_are_contiguous_and_of_the_declared_dtype() -> None:
    wide = {
        "layer.0.weight": np.asfortranarray(MODEL["layer.0.weight"].astype(np.float64)),
        "table": MODEL["table"].astype(np.int64),
    }
    report, arrays = run({**MODEL, **wide})
    assert report.ok
    for name, array in arrays.items():
        assert array.flags.c_contiguous
        assert array.dtype == MODEL[name].dtype
        assert array.tobytes() == MODEL[name].tobytes()
    assert [a.stored_dtype for a in report.accepted] == ["float64", "float32", "int64"]


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"layer.0.weight": np.zeros((3, 2), np.float32)}, RejectReason.SHAPE, "looks transposed"),
        ({"layer.0.weight": np.zeros((2, 4), np.float32)}, RejectReason.SHAPE, r"\[2, 4\], the model has \[2, 3\]"),
        ({"table": np.zeros(4, np.float32)}, RejectReason.DTYPE, "float32, the model has int32"),
        (
            {"layer.0.bias": np.array([1, np.nan, np.inf], np.float32)},
            RejectReason.NON_FINITE,
            "2 of 3 .* nan at \\[1\\]",
        ),
        ({"layer.0.bias": np.array([1, 0.1, 2])}, RejectReason.LOSSY_CAST, "worst is 0.1 at \\[1\\]"),
        ({"layer.0.bias": np.array([1, 1e300, 2])}, RejectReason.OVERFLOW, "1e.300 at \\[1\\], which would become inf"),
        ({"table": np.array([1, 2, 3, 1 << 40])}, RejectReason.OVERFLOW, "1099511627776"),
    ],
)
def test_each_refusal_has_its_reason(change: dict[str, Any], reason: RejectReason, words: str) -> None:
    report, arrays = run({**MODEL, **change})
    assert not report.ok
    assert arrays == {}
    assert [(r.name, r.reason) for r in report.rejected] == [(next(iter(change)), reason)]
    with pytest.raises(RefitRejectedError, match=words) as caught:
        report.raise_if_rejected()
    assert caught.value.report is report
    json.dumps(report.to_json(), allow_nan=False)


def test_a_tensor_of_the_wrong_shape_comes_with_candidates_of_the_right_one() -> None:
    right = MODEL["layer.0.weight"]
    report, _ = run({**MODEL, "layer.0.weight": np.zeros((9, 9), np.float32), "ema.layer.0.weight": right})
    assert [c.spec.name for c in report.rejected[0].candidates] == ["ema.layer.0.weight"]
    with pytest.raises(RefitRejectedError, match=r"meant: ema.layer.0.weight: float32\[2, 3\]\?"):
        report.raise_if_rejected()


def test_rounding_and_non_finite_values_when_allowed() -> None:
    report, arrays = run({**MODEL, "layer.0.bias": np.array([1, 0.1, 2])}, casting=Casting.ROUND)
    assert report.ok
    assert arrays["layer.0.bias"][1] == np.float32(0.1)
    bad = {**MODEL, "layer.0.bias": np.array([1, np.nan, np.inf])}
    assert run(bad, allow_nonfinite=True)[0].ok
    overflow = {**MODEL, "layer.0.bias": np.array([1, 1e300, 2])}
    assert not run(overflow, allow_nonfinite=True, casting=Casting.ROUND)[0].ok


def test_missing_weights_come_with_the_nearest_candidates() -> None:
    arrays = {**MODEL, "model.layer.0.bias": MODEL["layer.0.bias"], "other": np.zeros(9, np.float32)}
    del arrays["layer.0.bias"]
    report, _ = run(arrays)
    assert [m.name for m in report.missing] == ["layer.0.bias"]
    assert report.missing[0].candidates[0].spec.name == "model.layer.0.bias"
    unused = {u.name: u for u in report.unused}
    assert unused["model.layer.0.bias"].candidates[0].spec.name == "layer.0.bias"
    with pytest.raises(RefitRejectedError, match=r"layer.0.bias: float32\[3\] is missing \(meant: model.layer.0.bias"):
        report.raise_if_rejected()


def test_partial_takes_some_weights_but_no_misspelt_ones() -> None:
    report, arrays = run({"layer.0.bias": MODEL["layer.0.bias"]}, partial=True)
    assert report.ok
    assert list(arrays) == ["layer.0.bias"]
    report, _ = run({"layer.0.bias": MODEL["layer.0.bias"], "layer.0.wieght": MODEL["layer.0.weight"]}, partial=True)
    assert not report.ok
    with pytest.raises(RefitRejectedError, match=r"wieght.*meant: layer.0.weight"):
        report.raise_if_rejected()
    report, arrays = run({"x": np.zeros(3, np.float32)}, partial=True, unused=UnusedTensors.REPORT)
    assert not report.ok  # nothing at all would change
    assert report.problems() == ["no tensor of the checkpoint is a weight of the model"]


def test_what_is_left_over_is_reported_and_refused_on_request() -> None:
    more = {**MODEL, "extra": np.zeros(3, np.float32), "num_batches_tracked": np.array(3)}
    report, _ = run(more)
    assert report.ok
    assert [u.name for u in report.unused] == ["extra", "num_batches_tracked"]
    assert not run(more, unused=UnusedTensors.REFUSE)[0].ok
    assert run({"layer.0.bias": MODEL["layer.0.bias"], "num_batches_tracked": np.array(3)}, partial=True)[0].ok


def test_unchanged_weights_are_left_out_bit_exactly() -> None:
    current = {**MODEL, "layer.0.bias": np.array([1, 1, np.nan], np.float32)}
    new = {**current, "layer.0.weight": MODEL["layer.0.weight"] * np.float32(-1)}
    report, arrays = run(new, current=current.__getitem__, compare=True, allow_nonfinite=True)
    assert list(arrays) == ["layer.0.weight"]
    assert report.unchanged == ("layer.0.bias", "table")
    zero = {**MODEL, "layer.0.weight": np.copysign(MODEL["layer.0.weight"], -1)}
    assert "layer.0.weight" in run(zero, current=MODEL.__getitem__, compare=True)[1]
    report, arrays = run(MODEL, current=lambda name: None, compare=True)
    assert len(arrays) == 3  # not at hand, so not known to be unchanged


def test_measures_are_taken_only_on_request() -> None:
    assert run(MODEL)[0].accepted[0].measure is None
    new = {**MODEL, "layer.0.bias": np.array([1, 1, 3], np.float32)}
    report, _ = run(new, current=MODEL.__getitem__, measure=True)
    measure = report.accepted[1].measure
    assert measure is not None
    assert measure.norm == pytest.approx(11**0.5)
    assert measure.largest_relative_change == 2.0
    json.dumps(report.to_json(), allow_nan=False)


def test_an_unreadable_tensor_is_a_refusal(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(MODEL, path)
    source = open_weights(path)
    source.close()
    report, _ = check(SOURCES, source)
    assert {r.reason for r in report.rejected} == {RejectReason.UNREADABLE}


def test_only_the_first_problems_are_told() -> None:
    sources = [SourceWeight(TensorSpec(f"w{i}", "float32", (1,)), ()) for i in range(100)]
    report, _ = check(sources, open_weights({}))
    with pytest.raises(RefitRejectedError, match=r"100 problems: .*; and 95 more"):
        report.raise_if_rejected()


def test_five_thousand_small_tensors_are_checked_quickly() -> None:
    arrays = {f"layer.{i}.weight": np.ones((4, 4), np.float32) for i in range(5000)}
    sources = [SourceWeight(spec_of(name, array), ()) for name, array in arrays.items()]
    source = open_weights(arrays)
    best = min(_timed(lambda: check(sources, source)) for _ in range(3))
    assert best < 0.5  # measured: 0.026 s


def _timed(work) -> float:
    started = time.thread_time()  # of this thread, whoever else is at work on the machine
    work()
    return time.thread_time() - started
