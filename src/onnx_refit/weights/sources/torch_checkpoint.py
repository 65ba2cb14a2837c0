"""PyTorch checkpoints, read with ``weights_only=True`` so that nothing in them is executed."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnx_refit.errors import MissingExtraError, WeightsError, WeightsFormatError
from onnx_refit.tensors import Array, TensorSpec
from onnx_refit.weights.sources.arrays import ArraysSource, is_torch_tensor
from onnx_refit.weights.sources.mapped import unreadable

# Where trainers put the state dict inside what they save.
_NESTS = ("state_dict", "model_state_dict", "model", "module", "params", "net", "weights")
_LOAD_ERRORS = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    ImportError,
    NotImplementedError,
    UnicodeError,
    OverflowError,
    MemoryError,
    zipfile.BadZipFile,
)
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_GLOBAL = re.compile(r"\bGLOBAL ([\w.]+\w)")


class TorchCheckpointSource:
    """The state dict of one file that ``torch.save`` wrote.

    Args:
        path: the file.

    Raises:
        MissingExtraError: PyTorch is not installed.
        WeightsError: it cannot be opened.
        WeightsFormatError: it is damaged, holds no state dict, or needs code to be executed.
    """

    def __init__(self, path: Path) -> None:
        self._arrays = ArraysSource(_state_dict(_load(path), path), str(path))

    @property
    def description(self) -> str:
        """The path of the file."""
        return self._arrays.description

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Name -> spec of every tensor, in the order of the state dict."""
        return self._arrays.specs

    def read(self, name: str) -> Array:
        """One tensor, mapped from the file where its format allows; WeightsError if there is none of that name."""
        return self._arrays.read(name)

    def close(self) -> None:
        """Release the file; arrays already read stay valid."""
        self._arrays.close()


def _load(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "torch", "reading a PyTorch checkpoint") from error
    try:
        # Only the zip form (since PyTorch 1.6) can be mapped.
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped or None)
    except OSError as error:
        raise unreadable(path, error) from error
    except _LOAD_ERRORS as error:
        reason, hint = _reason(error)
        raise WeightsFormatError(f"no PyTorch checkpoint of plain tensors: {reason}", where=path, hint=hint) from error


def _reason(error: BaseException) -> tuple[str, str]:
    """What is wrong with a file, and what to do, without PyTorch's own advice, which is to run the file's code."""
    text = _ANSI.sub("", str(error)).strip()
    found = _GLOBAL.search(text)
    if found is not None:
        return (
            f"it holds {found[1]}, which is no tensor",
            "Reading it would run code of its author: save model.state_dict() alone, or better safetensors",
        )
    if "weights_only" in text or "WeightsUnpickler" in text:
        return (
            "its pickle is damaged, or holds more than tensors",
            "Write or copy it again: save model.state_dict() alone, or better safetensors",
        )
    sentence = (text.splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")
    return sentence, "The file is damaged: write or copy it again"


def _state_dict(value: Any, path: Path) -> dict[str, object]:
    """The tensors of a checkpoint: the whole of it, or the one part that is a state dict."""
    if not isinstance(value, Mapping):
        raise WeightsFormatError(
            f"holds a {type(value).__name__}, not a state dict", where=path, hint="Save model.state_dict()"
        )
    nested = [key for key in _NESTS if isinstance(value.get(key), Mapping)]
    tensors = {k: v for k, v in value.items() if isinstance(k, str) and is_torch_tensor(v)}
    if nested and not tensors:
        return _state_dict(value[nested[0]], path)
    if not tensors and value:
        keys = ", ".join(sorted(map(repr, value))[:8])
        raise WeightsFormatError(f"holds no tensors, only {keys}", where=path, hint="Save model.state_dict()")
    if not value:
        raise WeightsError("the state dict is empty", where=path)
    return dict(tensors)
