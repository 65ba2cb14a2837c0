"""Words and characters the network knows, and texts as the string tensors it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnx_refit.errors import InputError, ModelError
from onnx_refit.samples.bidaf.text import WORD_LENGTH, Token, tokenize
from onnx_refit.tensors import Array

UNKNOWN = 1
"""The number of a word or character that is not in the vocabulary; 0 is ``''``, the padding."""

CONTEXT_WORD, CONTEXT_CHAR = "context_word", "context_char"
QUERY_WORD, QUERY_CHAR = "query_word", "query_char"
INPUTS = (CONTEXT_WORD, CONTEXT_CHAR, QUERY_WORD, QUERY_CHAR)


@dataclass(frozen=True)
class Vocabulary:
    """Words (lower case) and characters (as they are) in the order of the rows of the network's tables.

    Attributes:
        words: row 0 is ``''``, row 1 stands for every unknown word; all different.
        chars: the same for characters.
    """

    words: tuple[str, ...]
    chars: tuple[str, ...]

    def __post_init__(self) -> None:
        for what, entries in (("words", self.words), ("characters", self.chars)):
            if len(entries) < 2 or entries[0] != "" or len(set(entries)) != len(entries):
                raise ModelError(f"the vocabulary of {what} does not begin with '' or lists one twice")

    @cached_property
    def word_table(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The known words and their numbers, without the place holder of the unknown word."""
        return _table(self.words)

    @cached_property
    def char_table(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The known characters and their numbers, without the place holder of the unknown character."""
        return _table(self.chars)


def _table(entries: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    known = [number for number in range(len(entries)) if number != UNKNOWN]
    return tuple(entries[number] for number in known), tuple(known)


@dataclass(frozen=True)
class Passage:
    """A context, cut into words.

    Attributes:
        text: the text.
        tokens: its words with their places.
    """

    text: str
    tokens: tuple[Token, ...]

    @classmethod
    def of(cls, text: str, *, what: str = "context", limit: int | None = None) -> Passage:
        """Cut a text into words.

        Args:
            text: any text.
            what: what it is, for messages.
            limit: the largest number of words accepted.

        Raises:
            InputError: the text holds no word, or more than ``limit``.
        """
        tokens = tuple(tokenize(text))
        if not tokens:
            raise InputError(f"the {what} holds no words", hint=f"Give the {what} some text")
        if limit is not None and len(tokens) > limit:
            raise InputError(f"the {what} has {len(tokens)} words, more than the {limit} this sample takes")
        return cls(text, tokens)

    def span(self, first: int, last: int) -> str:
        """The text from word ``first`` to word ``last`` (inclusive); empty if the words are in the wrong order."""
        if not 0 <= first <= last < len(self.tokens):
            return ""
        return self.text[self.tokens[first].start : self.tokens[last].end]

    @cached_property
    def words(self) -> Array:
        """The words in lower case, strings [n, 1]."""
        out = np.empty((len(self.tokens), 1), object)
        out[:, 0] = [token.text.lower() for token in self.tokens]
        return out

    @cached_property
    def chars(self) -> Array:
        """The first 16 characters of each word, strings [n, 1, 1, 16], padded with ``''``."""
        out = np.full((len(self.tokens), 1, 1, WORD_LENGTH), "", object)
        for row, token in zip(out[:, 0, 0], self.tokens, strict=True):
            letters = list(token.text[:WORD_LENGTH])
            row[: len(letters)] = letters
        return out


def feeds(context: Passage, question: Passage) -> dict[str, Array]:
    """The four string inputs of the network."""
    return {
        CONTEXT_WORD: context.words,
        CONTEXT_CHAR: context.chars,
        QUERY_WORD: question.words,
        QUERY_CHAR: question.chars,
    }
