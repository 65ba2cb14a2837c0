"""The npz reader: plain numbers only, checksums verified, never unpickled."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from onnx_refit.errors import WeightsFormatError
from onnx_refit.weights.open import open_weights
from tests.weights.source_support import ARRAYS, same

NPZ = {k: v for k, v in ARRAYS.items() if k not in ("bf", "f8")}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_round_trip(tmp_path: Path, save) -> None:
    path = tmp_path / "a.npz"
    extra = {"fortran": np.asfortranarray(ARRAYS["w"]), "big": ARRAYS["w"].astype(">f4")}
    save(path, **NPZ, **extra)
    source = open_weights(path)
    same(source, {**NPZ, "fortran": ARRAYS["w"], "big": ARRAYS["w"]})
    assert source.read("w").flags.owndata is False or save is np.savez_compressed


def test_npz_with_objects_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    path = tmp_path / "bomb.npz"
    np.savez(path, w=np.array([Bomb()], dtype=object))
    with pytest.raises(WeightsFormatError, match="objects"):
        open_weights(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("array", [np.array(["a"]), np.zeros(2, [("x", "f4")]), np.zeros(2, ml_dtypes.bfloat16)])
def test_npz_of_something_else_than_numbers_is_refused(tmp_path: Path, array) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, w=array)
    with pytest.raises(WeightsFormatError, match="not numeric"):
        open_weights(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_npz_checksums_are_verified(tmp_path: Path, compression: int) -> None:
    path = tmp_path / "a.npz"
    payload = io.BytesIO()
    np.save(payload, np.random.default_rng(0).random(1000))
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("w.npy", payload.getvalue())
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsFormatError, match=r"checksum|CRC|cannot be read"):
        open_weights(path).read("w")


def test_npz_whose_header_promises_too_much_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    payload = io.BytesIO()
    np.lib.format.write_array_header_1_0(payload, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 40)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", payload.getvalue() + b"1234")
    with pytest.raises(WeightsFormatError, match="does not fill"):
        open_weights(path)


def test_npz_with_foreign_members_or_repeats_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(WeightsFormatError, match=r"no \.npy"):
        open_weights(path)
    payload = io.BytesIO()
    np.save(payload, np.zeros(1))
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("w.npy", payload.getvalue())
        archive.writestr("w.npy", payload.getvalue())
    with pytest.raises(WeightsFormatError, match="twice"):
        open_weights(path)
