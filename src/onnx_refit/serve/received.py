"""Opening an upload as a weight source, whatever a client may have sent."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

from onnx_refit.errors import OnnxRefitError
from onnx_refit.serve.errors import ServeError
from onnx_refit.serve.spool import Upload
from onnx_refit.tensors import Array, TensorSpec
from onnx_refit.weights.open import open_path
from onnx_refit.weights.source import WeightSource

_UNKNOWN = "no checkpoint of a known kind"


class NamedSource:
    """A weight source under another description: clients and logs see what was uploaded, not where it lies."""

    def __init__(self, source: WeightSource, description: str) -> None:
        self._source, self._description = source, description

    @property
    def description(self) -> str:
        """Where the tensors come from, in words."""
        return self._description

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> spec of every tensor."""
        return self._source.specs

    def read(self, name: str) -> Array:
        """One tensor."""
        return self._source.read(name)

    def close(self) -> None:
        """Release the files."""
        self._source.close()


def open_upload(upload: Upload, label: str) -> WeightSource:
    """Open an upload: safetensors, npz or ONNX, told apart by content.

    The file lies alone in its directory, so that an ONNX model which names external data finds none.

    Raises:
        ServeError: it is a PyTorch checkpoint; these hold a program, which is not even looked at here.
        WeightsError: it cannot be read.
    """
    try:
        if _is_pickled(upload.path):
            raise ServeError(415, "PyTorch checkpoints are not taken over the network", hint="Save it as safetensors")
        return NamedSource(open_path(upload.path), label)
    except OnnxRefitError as error:
        # Where the server keeps its uploads is nobody's business.
        error.where = label
        if error.message.endswith(_UNKNOWN):
            # The library knows more kinds, which are not taken over the network.
            error.hint = "Send safetensors, npz or ONNX"
        raise


def _is_pickled(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(2)
    if head[:1] == b"\x80":
        return True
    if head != b"PK":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError):
        return False
