"""Differences are counted right, and shown without letting a checkpoint speak HTML."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_refit.weights.diff import diff
from onnx_refit.weights.diff_report import to_html, write_plot
from onnx_refit.weights.open import open_weights

BEFORE: dict[str, Any] = {
    "same": np.array([np.nan, 1], np.float32),
    "<script>alert(1)</script>": np.array([1, 2, 4], np.float32),
    "zero": np.zeros(2, np.float32),
    "shape": np.zeros((2, 3), np.float32),
    "layer.old.weight": np.ones(3, np.float32),
    "count": np.array([1, 2]),
}
AFTER: dict[str, Any] = {
    **{k: v for k, v in BEFORE.items() if k != "layer.old.weight"},
    "<script>alert(1)</script>": np.array([1, 2, 4.4], np.float32),
    "zero": np.array([0, 1e-3], np.float32),
    "shape": np.zeros((3, 2), np.float32),
    "layer.new.weight": np.ones(3, np.float32),
}


def both() -> Any:
    return diff(open_weights(BEFORE), open_weights(AFTER))


def test_numbers() -> None:
    found = both()
    by_name = {t.spec.name: t for t in found.tensors}
    assert [t.spec.name for t in found.changed] == ["<script>alert(1)</script>", "zero"]
    assert by_name["same"].not_finite == 1
    changed = by_name["<script>alert(1)</script>"]
    assert changed.changed_elements == 1
    assert changed.changed_bytes == 4 - sum(
        a == b for a, b in zip(np.float32(4).tobytes(), np.float32(4.4).tobytes(), strict=True)
    )
    assert changed.largest_relative_change == pytest.approx(0.1)
    assert changed.relative_change == pytest.approx(0.4 / 21**0.5)
    assert changed.norm_before == pytest.approx(21**0.5)
    assert sum(changed.histogram) == 1
    assert changed.histogram[(12 - 1) * 2] == 1  # a tenth: from 1e-1 up to 1e-0.5
    assert by_name["zero"].relative_change == float("inf")
    assert by_name["zero"].histogram[-1] == 1
    assert [(a.name, b.name) for a, b in found.reshaped] == [("shape", "shape")]
    assert found.meant == {"layer.old.weight": ("layer.new.weight",)}
    assert not found.identical
    json.dumps(found.to_json(), allow_nan=False)


def test_identical() -> None:
    found = diff(open_weights(BEFORE), open_weights({k: v.copy() for k, v in BEFORE.items()}))
    assert found.identical
    assert found.changed == ()
    assert "identical" in to_html(found)
    assert diff(open_weights({}), open_weights({})).histogram == (0,) * 28


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.all: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.all.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_well_formed_and_escaped() -> None:
    page = to_html(both())
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "script" not in tags.all
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "layer.new.weight?" in page


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plot(tmp_path: Path, suffix: str, start: bytes) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"d.{suffix}"
    write_plot(both(), path)
    assert path.read_bytes().startswith(start)
