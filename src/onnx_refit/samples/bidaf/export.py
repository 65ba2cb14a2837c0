"""A trained checkpoint as the original model of the sample: one ONNX file with string inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from onnx_refit.files import atomic_write
from onnx_refit.samples.bidaf.convert import onnx_weights
from onnx_refit.samples.bidaf.network import build_network
from onnx_refit.samples.bidaf.vocabulary import Vocabulary
from onnx_refit.tensors import Array


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the ONNX file.
        nbytes: its size.
        weights: tensor name -> dtype and shape, in words.
    """

    path: Path
    nbytes: int
    weights: Mapping[str, str]


def export_model(
    checkpoint: Mapping[str, Array], vocabulary: Vocabulary, path: Path, *, scores: bool = True
) -> Exported:
    """Write the string-input ONNX model of a training checkpoint.

    Args:
        checkpoint: tensors under PyTorch's names, see ``convert.onnx_weights``.
        vocabulary: words and characters in the order of the checkpoint's tables.
        path: where to.
        scores: give the model the outputs ``start_scores`` and ``end_scores`` too.

    Raises:
        WeightsError: the checkpoint lacks a tensor or has one of another shape.
        WriteError: the file cannot be written.
    """
    weights = onnx_weights(checkpoint)
    return save_model(build_network(vocabulary, weights, scores=scores), path, weights)


def save_model(model: ModelProto, path: Path, weights: Mapping[str, Array] | None = None) -> Exported:
    """Write a model as one file, atomically; WriteError if that fails."""
    data = model.SerializeToString()
    with atomic_write(path) as file:
        file.write(data)
    listed = {name: f"{array.dtype}{list(array.shape)}" for name, array in (weights or {}).items()}
    return Exported(path, len(data), listed)
