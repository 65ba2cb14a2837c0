"""Files that are either whole or absent: written beside their place, flushed to the disk, then renamed."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from .errors import StorageError

__all__ = ["write_bytes", "write_json", "write_tensors", "write_through"]


def write_through(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write ``path`` through ``write(file)``; a failure leaves what was there before and no temporary file.

    Raises:
        StorageError: the file cannot be written (no space left, no permission, no such folder).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot be written: {error.strerror or error}",
            where=path,
            hint="Free some space or choose another folder; an earlier version of the file is untouched.",
        ) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all."""
    write_through(path, lambda file: file.write(content))


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON to ``path``, whole or not at all."""
    write_bytes(path, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    write_bytes(path, save(contiguous, metadata=dict(metadata)))
