"""Renaming rules do what they say, and say what they cannot do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnx_refit.errors import WeightsError
from onnx_refit.plan.compiled import SourceWeight
from onnx_refit.refit.check import CheckOptions, RejectReason, check
from onnx_refit.tensors import TensorSpec
from onnx_refit.weights.open import open_weights
from onnx_refit.weights.rules import Rules

TEXT = r"""
[[rename]]
prefix = "module."
to = ""

[[rename]]
regex = '^h\.(\d+)\.'
to = 'blocks.\1.'

[[drop]]
regex = "^optimizer"
"""


def test_rules_apply_in_order_and_keep_the_checkpoint_names(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(TEXT)
    a, b = np.zeros(2, np.float32), np.ones(3, np.float32)
    view = Rules.load(path).apply(open_weights({"module.h.12.w": a, "b": b, "optimizer.m": a}))
    assert list(view.specs) == ["blocks.12.w", "b"]
    assert view.specs["blocks.12.w"].name == "blocks.12.w"
    assert view.read("blocks.12.w") is a
    assert view.checkpoint_names("blocks.12.w") == ("module.h.12.w",)
    sources = [SourceWeight(TensorSpec("blocks.12.w", "float32", (2,)), ())]
    report, _ = check(sources, view)
    assert report.ok
    assert report.accepted[0].checkpoint_names == ("module.h.12.w",)
    assert [u.name for u in report.unused] == ["b"]  # what was dropped is not reported


def test_two_tensors_of_one_name_are_ambiguous() -> None:
    rules = Rules.parse("[[rename]]\nregex = '\\d'\nto = 'x'")
    view = rules.apply(open_weights({"a1": np.zeros(1), "a2": np.zeros(1), "b": np.zeros(1)}))
    assert list(view.specs) == ["b"]
    sources = [SourceWeight(TensorSpec("ax", "float64", (1,)), ())]
    report, _ = check(sources, view, options=CheckOptions(partial=True))
    assert report.rejected[0].reason is RejectReason.AMBIGUOUS
    assert report.rejected[0].checkpoint_names == ("a1", "a2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not toml", "no TOML"),
        ("[[other]]\nx = 1", "unknown key 'other'"),
        ("rename = 3", "no list of rules"),
        ("[[rename]]\nprefix = 'a'", "no rule"),
        ("[[rename]]\nprefix = 'a'\nregex = 'b'\nto = ''", "no rule"),
        ("[[rename]]\nprefix = 1\nto = ''", "no rule"),
        ("[[rename]]\nregex = '('\nto = ''", "no regular expression"),
        ("[[drop]]\nregex = 'a'\nto = ''", "no rule"),
    ],
)
def test_what_is_no_rule_is_refused(text: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        Rules.parse(text)


def test_files_that_are_no_rules(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        Rules.load(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(WeightsError, match="UTF-8"):
        Rules.load(tmp_path / "binary.toml")
    rules = Rules.parse("[[rename]]\nregex = 'a'\nto = '\\7'")
    with pytest.raises(WeightsError, match="does not fit"):
        rules.apply(open_weights({"a": np.zeros(1)}))
