"""Checkpoints of several files: an index, a directory, the layout of the hub's cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from onnx_refit.errors import WeightsFormatError
from onnx_refit.weights.open import open_weights
from tests.weights.source_support import ARRAYS, same, write_shards


def test_sharded_by_index_and_by_directory(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    for where in (index, tmp_path, str(tmp_path)):
        same(open_weights(where), {"a": ARRAYS["w"], "b": ARRAYS["half"]})


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "sub/../../evil.safetensors", "", "a\\b", "link"]
)
def test_an_index_cannot_lead_out_of_its_directory(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    save_file({"a": ARRAYS["w"]}, tmp_path / "evil.safetensors")
    (inside / "link").symlink_to(tmp_path / "evil.safetensors")
    index = inside / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsFormatError, match=r"leads out|no file name"):
        open_weights(index)


def test_the_cache_layout_of_the_hub_opens(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_shards(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    same(open_weights(snapshot), {"a": ARRAYS["w"], "b": ARRAYS["half"]})


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "z": "model-2.safetensors"}}))
    with pytest.raises(WeightsFormatError, match="different checkpoints"):
        open_weights(index)


def test_a_directory_with_nothing_or_too_much_says_so(tmp_path: Path) -> None:
    with pytest.raises(WeightsFormatError, match="no checkpoint"):
        open_weights(tmp_path)
    save_file({"a": ARRAYS["w"]}, tmp_path / "x.safetensors")
    same(open_weights(tmp_path), {"a": ARRAYS["w"]})
    save_file({"a": ARRAYS["w"]}, tmp_path / "y.safetensors")
    with pytest.raises(WeightsFormatError, match=r"2 files \*\.safetensors"):
        open_weights(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(WeightsFormatError, match="LoRA"):
        open_weights(tmp_path)
