"""Weights from ONNX models: initializers, constants, external data, and models that contradict themselves."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from onnx_refit.errors import WeightsError, WeightsFormatError
from onnx_refit.weights.open import open_weights
from tests.weights.source_support import ONNX_ARRAYS, external_model, onnx_model, same


def test_onnx_initializers_constants_and_branches(tmp_path: Path) -> None:
    onnx.save(onnx_model(), tmp_path / "m.onnx")
    for source in (open_weights(tmp_path / "m.onnx"), open_weights(onnx_model())):
        same(source, ONNX_ARRAYS)


def test_onnx_external_data_is_mapped(tmp_path: Path) -> None:
    source = open_weights(external_model(tmp_path))
    same(source, ONNX_ARRAYS)
    assert not source.read("w").flags.owndata


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "../m.data", "leads out"),
        ("location", "/etc/passwd", "leads out"),
        ("location", "absent", "no such file"),
        ("offset", "99999", "ends at byte"),
        ("offset", "-8", "are no"),
        ("offset", "abc", "cannot be read"),
        ("length", "1", "are no"),
    ],
)
def test_onnx_external_data_that_lies_is_refused(tmp_path: Path, key: str, value: str, message: str) -> None:
    path = external_model(tmp_path)
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "w")
    kept = {e.key: e.value for e in tensor.external_data} | {key: value}
    del tensor.external_data[:]
    for k, v in kept.items():
        tensor.external_data.add(key=k, value=v)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(WeightsError, match=message):
        open_weights(path).read("w")


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x08", b"\xff" * 100, b"\x0a" * 1000, onnx.ModelProto().SerializeToString()]
)
def test_what_is_no_onnx_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(WeightsFormatError):
        open_weights(path)


def test_onnx_tensors_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    for change in ("dims", "type", "raw"):
        model = onnx_model()
        tensor = model.graph.initializer[0]
        if change == "dims":
            tensor.dims[0] = 1 << 50
        elif change == "type":
            tensor.data_type = 77
        else:
            tensor.raw_data = tensor.raw_data[:-1]
        with pytest.raises(WeightsFormatError, match="'w' cannot be read"):
            open_weights(model).read("w")
