"""The example of docs/serving.md runs as it stands."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray")

from safetensors.numpy import save_file

from tests.serve.models import affine_weights

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[3]


def test_the_example(ray_cluster, affine_plan, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "serving.md").read_text("utf-8").partition("## Across machines")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    affine_plan.save(tmp_path / "model.plan")
    save_file(affine_weights(2.0), tmp_path / "epoch7.safetensors")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"x": np.ones((1, 4), np.float32)}
    exec(compile("\n".join(blocks), "docs/serving.md", "exec"), names)
    assert names["answer"].version == 1
    assert names["report"].version == 2
