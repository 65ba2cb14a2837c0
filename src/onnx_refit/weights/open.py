"""One way in for every kind of checkpoint: look at what it is, and open it."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import onnx

from onnx_refit.errors import WeightsError, WeightsFormatError
from onnx_refit.weights.source import WeightSource
from onnx_refit.weights.sources.arrays import ArraysSource
from onnx_refit.weights.sources.directory import weights_file
from onnx_refit.weights.sources.mapped import unreadable
from onnx_refit.weights.sources.npz import NpzSource
from onnx_refit.weights.sources.onnx_model import OnnxModelSource
from onnx_refit.weights.sources.remote import RemoteSource, is_url
from onnx_refit.weights.sources.safetensors import SafetensorsSource
from onnx_refit.weights.sources.sharded import ShardedSource
from onnx_refit.weights.sources.torch_checkpoint import TorchCheckpointSource

WeightsLike: TypeAlias = "str | os.PathLike[str] | Mapping[str, object] | onnx.ModelProto | WeightSource"
"""What the public functions take as weights."""

_BY_SUFFIX: dict[str, Callable[[Path], WeightSource]] = {
    ".safetensors": SafetensorsSource,
    ".npz": NpzSource,
    ".onnx": OnnxModelSource,
    ".pt": TorchCheckpointSource,
    ".pth": TorchCheckpointSource,
    ".ckpt": TorchCheckpointSource,
    ".bin": TorchCheckpointSource,
}
_KINDS = (
    "Known are ONNX (.onnx), safetensors (.safetensors, .safetensors.index.json), NumPy (.npz), "
    "PyTorch (.pt, .pth, .ckpt, .bin) and Hugging Face directories"
)
# Safetensors files of this library that are no checkpoints, by the format that their metadata name.
_OTHERS = {
    "onnx-refit-delta": (
        "this is a delta, not a checkpoint",
        "Apply it to the checkpoint that it was made from: onnx_refit.delta(BASE, DELTA), or BASE --delta DELTA",
    ),
    "onnx-refit plan": (
        "this is a plan, not a checkpoint",
        "Take the weights it holds: onnx_refit.Plan.load(PLAN).require_weights()",
    ),
}


def open_weights(source: WeightsLike, *, progress: Callable[[int, str], None] | None = None) -> WeightSource:
    """Open a checkpoint of any kind; headers are read, tensors are not.

    Args:
        source: a path or URL of a file or Hugging Face directory, a mapping of names to arrays, an ONNX model in
            memory, or an open source (given back as it is).
        progress: called with (bytes so far, file name) while a URL is fetched.

    Raises:
        MissingExtraError: the kind needs a package that is not installed.
        WeightsError: it cannot be opened.
        WeightsFormatError: it is damaged or of no known kind.
    """
    if isinstance(source, onnx.ModelProto):
        return OnnxModelSource(source)
    if isinstance(source, Mapping):
        return ArraysSource(source)
    if isinstance(source, WeightSource):
        return source
    if not isinstance(source, str | os.PathLike):
        raise WeightsError(f"a value of type {type(source).__name__} is no checkpoint", hint=_KINDS)
    text = os.fspath(source)
    if not text:
        raise WeightsError("the path is empty", hint=_KINDS)
    if is_url(text):
        return RemoteSource(text, open_path, progress)
    return open_path(Path(text))


def open_path(path: Path) -> WeightSource:
    """Open a checkpoint on disk; errors as for ``open_weights``."""
    try:
        if path.is_dir():
            path = weights_file(path)
        if not path.exists():
            raise unreadable(path, FileNotFoundError())
        if not path.is_file():
            raise WeightsError("it is no regular file", where=path, hint="Name a file")
        if path.stat().st_size == 0:
            raise WeightsFormatError("the file is empty", where=path, hint="Write the checkpoint again")
    except (OSError, ValueError) as error:
        reason = error if isinstance(error, OSError) else OSError(str(error))
        raise unreadable(path, reason) from error
    if path.name.endswith(".index.json"):
        return ShardedSource(path, open_path)
    opener = _BY_SUFFIX.get(path.suffix.lower()) or _by_content(path)
    if opener is None:
        raise WeightsFormatError("it is no checkpoint of a known kind", where=path, hint=_KINDS)
    opened = opener(path)
    if isinstance(opened, SafetensorsSource) and (other := _OTHERS.get(opened.metadata.get("format", ""))):
        opened.close()
        raise WeightsFormatError(other[0], where=path, hint=other[1])
    return opened


def _by_content(path: Path) -> Callable[[Path], WeightSource] | None:
    """The reader of a file whose name says nothing, by its first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
        if head.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
            if any(name.endswith("/data.pkl") for name in members):
                return TorchCheckpointSource
            return NpzSource if members and all(name.endswith(".npy") for name in members) else None
    except OSError as error:
        raise unreadable(path, error) from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        return None
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size:
        return SafetensorsSource
    if head.startswith(b"\x80"):
        return TorchCheckpointSource
    # An ONNX model begins with ir_version (field 1, a varint) unless its writer shuffled the fields.
    return OnnxModelSource if head.startswith(b"\x08") else None
