"""What a run writes: JSON and tensors, whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from onnx_refit.files import write_bytes

__all__ = ["write_json", "write_tensors"]


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON to ``path``; WriteError if it cannot be written."""
    write_bytes(path, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; WriteError if it cannot be written."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    write_bytes(path, save(contiguous, metadata=dict(metadata)))
