"""What ships: the trained weights, earlier checkpoints as small differences to them, and the vocabularies."""

import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from onnx_refit.files import write_bytes

from ..checkpoints import SCALE, Tensors
from .corpus import Corpus
from .errors import StateError
from .files import write_tensors

__all__ = ["encode", "write_checkpoint", "write_trained", "write_vocabulary"]

_LEVELS = 63
_WORD_LEVELS = 15
_SMALLEST_STEP = 6.2e-5


def encode(weights: Mapping[str, npt.NDArray[Any]], base: Tensors) -> dict[str, npt.NDArray[Any]]:
    """Round the difference of ``weights`` to ``base`` as :func:`..checkpoints.decode` reads it.

    Args:
        weights: as :meth:`.model.Bidaf.export` names them; ``word_emb`` may lack its last rows.
        base: the trained weights.

    Raises:
        StateError: the two are no checkpoints of one network.
    """
    if weights.keys() != base.keys():
        raise StateError(f"checkpoints of different networks: {sorted(weights.keys() ^ base.keys())}")
    encoded: dict[str, npt.NDArray[Any]] = {}
    for name, value in weights.items():
        if value.shape[1:] != base[name].shape[1:] or len(value) > len(base[name]):
            raise StateError(f"the weight {name!r} has shape {value.shape}, not {base[name].shape}")
        difference = value.astype(np.float32) - base[name][: len(value)]
        rows = difference.reshape(len(value) if value.ndim > 1 else 1, -1)
        levels = _WORD_LEVELS if name == "word_emb" else _LEVELS
        step = np.maximum(np.abs(rows).max(1, keepdims=True) / levels, _SMALLEST_STEP).astype(np.float16)
        encoded[name] = np.clip(np.rint(rows / step.astype(np.float32)), -127, 127).astype(np.int8)
        encoded[name + SCALE] = step
    return encoded


def write_checkpoint(path: Path, weights: Mapping[str, npt.NDArray[Any]], base: Tensors) -> None:
    """Write an earlier checkpoint, encoded and compressed."""
    write_bytes(path, lzma.compress(save(encode(weights, base)), preset=9 | lzma.PRESET_EXTREME))


def write_trained(path: Path, weights: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write the trained weights in float16."""
    write_tensors(path, {name: value.astype(np.float16) for name, value in weights.items()}, metadata)


def write_vocabulary(folder: Path, corpus: Corpus) -> None:
    """Write ``words.txt.xz`` (one a line) and ``chars.json``.

    Raises:
        StateError: a word holds a line break.
    """
    if any("\n" in word for word in corpus.words):
        raise StateError("a word of the vocabulary holds a line break")
    words = "\n".join(corpus.words).encode()
    write_bytes(folder / "words.txt.xz", lzma.compress(words, preset=9 | lzma.PRESET_EXTREME))
    write_bytes(folder / "chars.json", json.dumps(corpus.chars, ensure_ascii=False).encode() + b"\n")
