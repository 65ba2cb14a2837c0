"""The weights that come with the sample: the trained network, its vocabulary, and earlier checkpoints of its training.

``data/weights.safetensors`` holds the trained network in float16. An earlier checkpoint is its difference to the
trained network, each row of a tensor rounded to whole multiples of the row's own step and stored as int8: what
:func:`load_checkpoint` gives *is* the checkpoint, and the scores in ``data/checkpoints.json`` are those of that.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, load_file

from onnx_refit.errors import WeightsError, WeightsFormatError

__all__ = [
    "DATA",
    "FINAL",
    "SCALE",
    "Tensors",
    "checkpoint_names",
    "decode",
    "load_checkpoint",
    "load_vocabulary",
    "scores",
]

DATA = Path(__file__).parent / "data"
FINAL = "final"
SCALE = "/scale"
"""The tensor ``NAME/scale`` (float16 [rows, 1]) holds the steps of the rows of ``NAME`` (int8 [rows, columns])."""

Tensors = dict[str, npt.NDArray[np.float32]]


@cache
def _index() -> dict[str, dict[str, Any]]:
    path = DATA / "checkpoints.json"
    content = _read(path)
    try:
        entries = json.loads(content)
        for entry in entries:
            _ = Path(entry["file"]), float(entry["exact_match"]), float(entry["f1"])
        return {entry["name"]: entry for entry in entries}
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsFormatError(f"the list of checkpoints is damaged ({error})", where=path) from error


def checkpoint_names() -> tuple[str, ...]:
    """Return the names of all checkpoints in the order of training; the last one is the trained network."""
    return tuple(_index())


def scores(name: str = FINAL) -> tuple[float, float]:
    """Return exact match and F1 of a checkpoint on the whole SQuAD v1.1 dev set, in percent.

    Raises:
        WeightsError: there is no such checkpoint.
    """
    entry = _entry(name)
    return float(entry["exact_match"]), float(entry["f1"])


def load_checkpoint(name: str = FINAL) -> Tensors:
    """Read all weights of a checkpoint under PyTorch's names, float32.

    Raises:
        WeightsError: there is no such checkpoint, or its file is missing.
        WeightsFormatError: its file is damaged.
    """
    path = DATA / _entry(name)["file"]
    if name == FINAL:
        return _trained(path)
    try:
        encoded = load(lzma.decompress(_read(path)))
        return decode(encoded, _trained(DATA / _entry(FINAL)["file"]))
    except (lzma.LZMAError, EOFError, SafetensorError, KeyError, ValueError) as error:
        raise WeightsFormatError(f"the checkpoint is damaged ({error})", where=path) from error


def load_vocabulary() -> tuple[list[str], list[str]]:
    """Read words and characters in the order of the rows of ``word_emb`` and ``char_emb``.

    Row 0 is ``''`` (padding), row 1 stands for whatever is unknown; words are in lower case.

    Raises:
        WeightsError: a file is missing.
        WeightsFormatError: a file is damaged.
    """
    words, chars = DATA / "words.txt.xz", DATA / "chars.json"
    path = words
    try:
        listed = lzma.decompress(_read(words)).decode("utf8").split("\n")
        path = chars
        return listed, list(json.loads(_read(chars)))
    except (lzma.LZMAError, EOFError, ValueError) as error:
        raise WeightsFormatError(f"the vocabulary is damaged ({error})", where=path) from error


def decode(encoded: Mapping[str, npt.NDArray[Any]], base: Mapping[str, npt.NDArray[np.float32]]) -> Tensors:
    """Compute the weights that an encoded difference to ``base`` stands for.

    Rows that a difference lacks at its end (words that were never trained) are those of ``base``.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a tensor does not fit.
    """
    weights = {name: value.copy() for name, value in base.items()}
    for name, value in weights.items():
        difference = encoded[name].astype(np.float32) * encoded[name + SCALE].astype(np.float32)
        rows = value.reshape(-1, difference.shape[1])
        rows[: len(difference)] += difference
    return weights


def _entry(name: str) -> dict[str, Any]:
    index = _index()
    if name not in index:
        raise WeightsError(f"there is no checkpoint {name!r}", hint=f"There are {', '.join(index)}")
    return index[name]


def _trained(path: Path) -> Tensors:
    try:
        return {name: value.astype(np.float32) for name, value in load_file(path).items()}
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (OSError, SafetensorError) as error:
        raise WeightsFormatError(f"the weights are damaged ({error})", where=path) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _missing(path) from error


def _missing(path: Path) -> WeightsError:
    return WeightsError(
        "the bundled model is not whole: this file is missing", where=path, hint="Install the package again"
    )
