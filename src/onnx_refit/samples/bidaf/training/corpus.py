"""The prepared corpus: SQuAD as numbers, with its vocabularies, in one ``.npz`` without pickles.

A *type* is a case-sensitive surface form; texts are stored as types, and each type has a word (lower-cased) and
characters. Token arrays are flat: sequence ``i`` lies in ``[offsets[i], offsets[i + 1])``.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_refit.files import atomic_write

from .errors import DataError

__all__ = ["FORMAT", "Corpus", "DevTexts", "Split"]

FORMAT = "onnx-refit bidaf corpus 1"

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Split:
    """One side of the data set.

    Attributes:
        contexts: int32 [context tokens], types of all paragraphs, each paragraph once.
        context_offsets: int32 [paragraphs + 1].
        questions: int32 [question tokens], types of all questions.
        question_offsets: int32 [examples + 1].
        paragraph: int32 [examples], the paragraph of each question.
        start: int32 [examples], first token of the answer; -1 where the answer is no span of tokens.
        end: int32 [examples], last token of the answer (inclusive); -1 as above.
    """

    contexts: Ints
    context_offsets: Ints
    questions: Ints
    question_offsets: Ints
    paragraph: Ints
    start: Ints
    end: Ints

    def __len__(self) -> int:
        return len(self.paragraph)


@dataclass(frozen=True, slots=True)
class DevTexts:
    """What turns spans of tokens of the dev set into scores.

    Attributes:
        contexts: the paragraphs.
        token_start: int32 [context tokens], character offset in the paragraph.
        token_end: int32 [context tokens], the same, exclusive.
        questions: the id of each example.
        answers: question id -> accepted answers.
    """

    contexts: list[str]
    token_start: Ints
    token_end: Ints
    questions: list[str]
    answers: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Everything that training reads.

    Attributes:
        words: row order of the word table; 0 is ``''`` (padding), 1 the unknown word.
        chars: the same for characters.
        tuned: words ``[1, tuned)`` are trained, the rest keeps its GloVe vector.
        word_vectors: float16 [words, 50], the table before training.
        type_words: int32 [types], the word of each type.
        type_chars: uint8 [types, 16], its characters, padded with 0.
        notes: how the corpus was made (settings and counts), for logs.
    """

    words: list[str]
    chars: list[str]
    tuned: int
    word_vectors: npt.NDArray[np.float16]
    type_words: Ints
    type_chars: npt.NDArray[np.uint8]
    train: Split
    dev: Split
    dev_texts: DevTexts
    notes: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write the corpus to ``path``.

        Raises:
            WriteError: the file cannot be written.
        """
        header = {
            "format": FORMAT,
            "words": self.words,
            "chars": self.chars,
            "tuned": self.tuned,
            "notes": dict(self.notes),
            "dev_contexts": self.dev_texts.contexts,
            "dev_questions": self.dev_texts.questions,
            "dev_answers": self.dev_texts.answers,
        }
        arrays: dict[str, npt.NDArray[Any]] = {
            "header": np.frombuffer(json.dumps(header, ensure_ascii=False).encode(), np.uint8),
            "word_vectors": self.word_vectors,
            "type_words": self.type_words,
            "type_chars": self.type_chars,
            "dev_token_start": self.dev_texts.token_start,
            "dev_token_end": self.dev_texts.token_end,
        }
        for name, split in (("train", self.train), ("dev", self.dev)):
            arrays |= {f"{name}_{field}": getattr(split, field) for field in Split.__slots__}
        with atomic_write(path) as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Corpus":
        """Read a corpus.

        Raises:
            DataError: the file is missing, damaged or of another format.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            header = json.loads(arrays["header"].tobytes())
            if header["format"] != FORMAT:
                raise DataError(
                    f"holds the format {header['format']!r}, this version reads {FORMAT!r}",
                    where=path,
                    hint="Run samples/bidaf/preprocess.py again.",
                )
            return cls._assemble(header, arrays)
        except FileNotFoundError as error:
            raise DataError(
                "there is no prepared corpus here", where=path, hint="Make it with samples/bidaf/preprocess.py."
            ) from error
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"is no whole corpus ({error})", where=path, hint="Run samples/bidaf/preprocess.py again."
            ) from error

    @classmethod
    def _assemble(cls, header: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> "Corpus":
        def split(name: str) -> Split:
            return Split(**{field: arrays[f"{name}_{field}"] for field in Split.__slots__})

        texts = DevTexts(
            contexts=header["dev_contexts"],
            token_start=arrays["dev_token_start"],
            token_end=arrays["dev_token_end"],
            questions=header["dev_questions"],
            answers=header["dev_answers"],
        )
        return cls(
            words=header["words"],
            chars=header["chars"],
            tuned=header["tuned"],
            word_vectors=arrays["word_vectors"],
            type_words=arrays["type_words"],
            type_chars=arrays["type_chars"],
            train=split("train"),
            dev=split("dev"),
            dev_texts=texts,
            notes=header["notes"],
        )
