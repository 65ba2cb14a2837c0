"""PyTorch checkpoints: read without running what they hold."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from onnx_refit.errors import WeightsError, WeightsFormatError
from onnx_refit.weights.open import open_weights
from tests.weights.source_support import ARRAYS, same


@pytest.mark.torch
def test_torch_checkpoints(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    state = {
        "w": torch.arange(12, dtype=torch.float32).reshape(3, 4).t(),
        "bf": torch.linspace(-2, 2, 6).to(torch.bfloat16),
        "f8": torch.tensor([0.5]).to(torch.float8_e4m3fn),
        "n": torch.tensor(3),
    }
    expected = {
        "w": ARRAYS["w"].T,
        "bf": np.linspace(-2, 2, 6).astype(np.float32).astype(ml_dtypes.bfloat16),
        "f8": np.array([0.5], ml_dtypes.float8_e4m3fn),
        "n": np.array(3),
    }
    same(open_weights(state), expected)
    torch.save(state, tmp_path / "a.pt")
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, tmp_path / "b.ckpt")
    for name in ("a.pt", "b.ckpt"):
        same(open_weights(tmp_path / name), expected)
    torch.save({"w": state["w"]}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    same(open_weights(tmp_path / "old.pth"), {"w": expected["w"]})
    (tmp_path / "a.pt").rename(tmp_path / "a")
    same(open_weights(tmp_path / "a"), expected)


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.torch
def test_torch_checkpoints_that_would_run_code_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"w": Evil(str(tmp_path / "exploded"))}, tmp_path / "evil.pt")
    with pytest.raises(WeightsFormatError, match=r"it holds [\w.]+, which is no tensor\. .* would run code"):
        open_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "exploded").exists()
    torch.save({"w": torch.zeros(2), "args": argparse.Namespace(x=1)}, tmp_path / "args.pt")
    with pytest.raises(WeightsFormatError, match=r"it holds argparse.Namespace, which is no tensor"):
        open_weights(tmp_path / "args.pt")
    for content in (b"PK\x03\x04 not really", b"\x80\x02garbage", b"hello", (tmp_path / "args.pt").read_bytes()[:-40]):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(WeightsFormatError) as caught:
            open_weights(tmp_path / "bad.pt")
        text = str(caught.value)
        assert "weights_only" not in text
        assert "\x1b" not in text
        assert ".." not in text
        assert len(text) < 250 + len(str(tmp_path))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightsFormatError, match="not a state dict"):
        open_weights(tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="not dense"):
        open_weights({"s": torch.zeros(2, 2).to_sparse()}).read("s")
