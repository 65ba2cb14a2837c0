"""The script that a user with a GPU runs, here with the fake in place of TensorRT: that it works, and that it fails."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from onnx_refit.engine.tensorrt import backend as trt_backend

from .bidaf import random_bidaf
from .fake import Control, FakeDevice, fake_bindings

SCRIPT = Path(__file__).parents[2] / "samples/bidaf/verify_tensorrt.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("verify_tensorrt", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "verify_tensorrt", module)
    spec.loader.exec_module(module)
    control, device = Control(), FakeDevice()
    module.control = control  # type: ignore[attr-defined]
    for user in (trt_backend, module):
        monkeypatch.setattr(user, "find_bindings", lambda package=None: fake_bindings(control))
        monkeypatch.setattr(user, "open_device", lambda ordinal=0: device)
    monkeypatch.setattr(module, "original_model", random_bidaf)
    return module


def verdicts(path: Path) -> dict[str, str]:
    return {step["name"]: step["verdict"] for step in json.loads(path.read_text())["steps"]}


def test_every_step_goes_well_where_tensorrt_does_what_it_promises(script: ModuleType, tmp_path: Path) -> None:
    code = script.main(["--json", str(tmp_path / "report.json")], trained=False)
    found = verdicts(tmp_path / "report.json")
    assert set(found.values()) == {"ok"}, (tmp_path / "report.json").read_text()
    assert len(found) == 9
    assert code == 0


def test_a_refit_that_fails_is_reported(script: ModuleType, tmp_path: Path) -> None:
    script.control.hidden = {"W_0"}
    assert script.main(["--json", str(tmp_path / "report.json")], trained=False) == 1
    found = verdicts(tmp_path / "report.json")
    assert found["find"] == "ok"
    assert found["build"] == "failed"
    assert found["refit sample"] == "skipped"
