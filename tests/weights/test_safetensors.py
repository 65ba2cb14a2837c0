"""The safetensors reader: mapped, read-only, and strict about files that lie."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from onnx_refit.errors import WeightsError, WeightsFormatError
from onnx_refit.weights.open import open_weights
from onnx_refit.weights.sources.safetensors import SafetensorsSource
from tests.weights.source_support import ARRAYS, same


def raw_safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def test_safetensors_round_trip_is_mapped_and_read_only(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(ARRAYS, path, metadata={"format": "np"})
    source = open_weights(path)
    same(source, ARRAYS)
    assert isinstance(source, SafetensorsSource)
    assert source.metadata == {"format": "np"}
    array = source.read("w")
    assert not array.flags.writeable
    assert not array.flags.owndata
    source.close()
    assert array.sum() == 66  # arrays outlive the source
    with pytest.raises(WeightsError, match="closed"):
        source.read("w")


def test_safetensors_with_an_odd_header_length_gives_aligned_arrays(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2 + 1 - (len(text) % 2 == 1))
    path = tmp_path / "odd.safetensors"
    for pad in range(4):
        path.write_bytes(raw_safetensors(text + b" " * pad, np.array([1, 2], np.float32).tobytes()))
        array = open_weights(path).read("w")
        assert array.flags.aligned
        assert array.tolist() == [1, 2]


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


DATA = b"\0\0\x80?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"1234567", "too few"),
        (raw_safetensors({"w": F32}, DATA, length=1 << 60), "would take"),
        (raw_safetensors({"w": F32}, DATA, length=5000), "header takes"),
        (raw_safetensors(b"[1]", DATA), "no JSON object"),
        (raw_safetensors(b"{", DATA), "no valid JSON"),
        (raw_safetensors(b"{" + b'"a":{' * 100_000, DATA), "nests too deep"),
        (
            raw_safetensors(b'{"w":' + json.dumps(F32).encode() + b',"w":' + json.dumps(F32).encode() + b"}", DATA),
            "twice",
        ),
        (raw_safetensors({"w": {**F32, "dtype": "F99"}}, DATA), "F99"),
        (raw_safetensors({"w": {**F32, "dtype": ["F32"]}}, DATA), "not supported"),
        (raw_safetensors({"w": {**F32, "more": 1}}, DATA), "not described"),
        (raw_safetensors({"w": {**F32, "shape": [-1]}}, DATA), "no valid shape"),
        (raw_safetensors({"w": {**F32, "shape": [True]}}, DATA), "no valid shape"),
        (raw_safetensors({"w": {**F32, "shape": [1.0]}}, DATA), "no valid shape"),
        (raw_safetensors({"w": {**F32, "shape": [1] * 100}}, DATA), "no valid shape"),
        (raw_safetensors({"w": {**F32, "data_offsets": [0]}}, DATA), "no valid data_offsets"),
        (raw_safetensors({"w": {**F32, "data_offsets": [4, 0]}}, DATA), "does not take"),
        (raw_safetensors({"w": {**F32, "data_offsets": [4, 8]}}, DATA * 2), "hole"),
        (raw_safetensors({"w": F32, "v": F32}, DATA), "overlaps"),
        (raw_safetensors({"w": F32}, DATA * 2), "the file has 8"),
        (raw_safetensors({"w": F32}, DATA[:2]), "the file has 2"),
        (raw_safetensors({"__metadata__": {"a": 1}}), "__metadata__"),
        (
            raw_safetensors({"w": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}, DATA),
            "does not take",
        ),
    ],
)
def test_a_lying_safetensors_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsFormatError, match=message) as caught:
        open_weights(path)
    assert str(path) in str(caught.value)


def test_bool_bytes_other_than_0_and_1_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bool.safetensors"
    path.write_bytes(raw_safetensors({"m": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\x01\x02"))
    with pytest.raises(WeightsFormatError, match="other than 0 and 1"):
        open_weights(path).read("m")


def test_a_file_cut_short_after_opening_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_file({"w": np.zeros(100_000, np.float32)}, path)
    source = open_weights(path)
    os.truncate(path, 1000)
    with pytest.raises(WeightsFormatError, match="ends at byte 1000"):
        source.read("w")
