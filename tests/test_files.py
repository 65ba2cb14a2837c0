"""Files written whole or not at all, and whose fault an error is."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from onnx_refit.files import WriteError, atomic_write


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="no"), atomic_write(path) as file:
        file.write(b"new")
        raise ValueError("no")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_about_another_file_is_no_error_of_writing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "f") as file:
        file.write((tmp_path / "source").read_bytes())
    assert caught.value.filename == str(tmp_path / "source")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_writing_is_one(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"f: cannot be written: the disk is full"), atomic_write(tmp_path / "f"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(WriteError, match="no such directory"), atomic_write(tmp_path / "none" / "f"):
        pass
