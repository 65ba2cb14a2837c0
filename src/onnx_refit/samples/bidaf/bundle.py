"""The model that comes with this library: trained weights, vocabulary, and earlier checkpoints of the same run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from onnx import ModelProto

from onnx_refit.errors import InputError
from onnx_refit.samples.bidaf import checkpoints
from onnx_refit.samples.bidaf.convert import onnx_weights
from onnx_refit.samples.bidaf.network import build_network
from onnx_refit.samples.bidaf.vocabulary import Vocabulary
from onnx_refit.tensors import Array
from onnx_refit.weights.open import open_weights
from onnx_refit.weights.source import read_all


def bundled_vocabulary() -> Vocabulary:
    """Words and characters of the bundled model."""
    words, chars = checkpoints.load_vocabulary()
    return Vocabulary(tuple(words), tuple(chars))


def checkpoint_names() -> tuple[str, ...]:
    """The bundled checkpoints in the order of training; the last one is the trained model."""
    return tuple(checkpoints.checkpoint_names())


def checkpoint(name: str | None = None) -> Mapping[str, Array]:
    """The tensors of a checkpoint under PyTorch's names.

    Args:
        name: a bundled checkpoint, or a file of one that you trained; None is the trained model.

    Raises:
        InputError: there is neither such a bundled checkpoint nor such a file.
        WeightsError: the file cannot be read.
    """
    known = checkpoint_names()
    if name is None or name in known:
        return dict(checkpoints.load_checkpoint(name or known[-1]))
    if not Path(name).is_file():
        raise InputError(f"there is no checkpoint {name}", hint=f"Name a file, or one of {', '.join(known)}")
    source = open_weights(name)
    try:
        return dict(read_all(source))
    finally:
        source.close()


def checkpoint_weights(name: str | None = None) -> dict[str, Array]:
    """The ONNX network's tensors of a checkpoint; raises as ``checkpoint``."""
    return onnx_weights(checkpoint(name))


def bundled_model(*, scores: bool = True) -> ModelProto:
    """The original model with string inputs, made from the bundled weights; see ``network.build_network``."""
    return build_network(bundled_vocabulary(), checkpoint_weights(), scores=scores)
