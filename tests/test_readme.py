"""The README's example runs as it stands."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import safetensors.numpy

from tests.support.models import mlp, mlp_weights


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n", 1)[1].split("```", 1)[0]
    onnx.save(mlp(), tmp_path / "model.onnx")
    for epoch in (7, 8):
        safetensors.numpy.save_file(mlp_weights(epoch), tmp_path / f"epoch{epoch}.safetensors")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "version 2 (was 1) from epoch7.safetensors" in capsys.readouterr().out
