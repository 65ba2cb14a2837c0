"""The tensors a name was probably meant for, by name, shape and dtype: for messages, never for matching."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher

from onnx_refit.tensors import TensorSpec

_TOKEN = re.compile(r"[A-Za-z]+|\d+")
_POOL = 60  # candidates that are compared letter by letter
_COMMON = 400  # words and shapes in more tensors than this single out nothing


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tensor that could have been meant.

    Attributes:
        spec: its name, dtype and shape.
        score: 0 to 1, larger is likelier.
    """

    spec: TensorSpec
    score: float

    def __str__(self) -> str:
        return str(self.spec)


def tokens(name: str) -> tuple[str, ...]:
    """The words and numbers of a name in lower case: ``h.0.attn/W`` -> ``h 0 attn w``."""
    return tuple(token.lower() for token in _TOKEN.findall(name))


def name_similarity(left: str, right: str) -> float:
    """How alike two names are, 0 to 1: by words in order, and by letters."""
    if left == right:
        return 1.0
    words = SequenceMatcher(None, tokens(left), tokens(right), autojunk=False).ratio()
    letters = SequenceMatcher(None, left.lower(), right.lower(), autojunk=False).ratio()
    return 0.7 * words + 0.3 * letters


class Nearest:
    """An index of tensors to look up near misses in.

    Args:
        specs: the tensors to choose from.
    """

    def __init__(self, specs: Iterable[TensorSpec]) -> None:
        self._specs = list(specs)
        self._by_word: dict[str, list[int]] = defaultdict(list)
        self._by_shape: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for i, spec in enumerate(self._specs):
            for word in set(tokens(spec.name)):
                self._by_word[word].append(i)
            self._by_shape[_shape_key(spec)].append(i)

    def find(self, wanted: TensorSpec, limit: int = 3) -> tuple[Candidate, ...]:
        """The best candidates for a tensor, best first; empty where nothing resembles it."""
        votes: dict[int, float] = defaultdict(float)
        total = len(self._specs)
        for word in set(tokens(wanted.name)):
            holders = self._by_word.get(word, [])
            if len(holders) <= _COMMON:
                for i in holders:
                    votes[i] += math.log(1 + total / len(holders))
        same_shape = self._by_shape.get(_shape_key(wanted), [])
        for i in same_shape[:_COMMON]:
            votes[i] += math.log(1 + total / len(same_shape))
        pool = sorted(votes, key=lambda i: -votes[i])[:_POOL]
        scored = [Candidate(self._specs[i], _score(wanted, self._specs[i])) for i in pool]
        scored.sort(key=lambda c: (-c.score, c.spec.name))
        return tuple(c for c in scored[:limit] if c.score >= 0.3)


def _shape_key(spec: TensorSpec) -> tuple[object, ...]:
    return tuple(sorted(map(str, spec.shape or ())))


def _score(wanted: TensorSpec, other: TensorSpec) -> float:
    if wanted.shape == other.shape:
        shape = 1.0
    else:
        shape = 0.7 if _shape_key(wanted) == _shape_key(other) else 0.0
    return 0.6 * name_similarity(wanted.name, other.name) + 0.3 * shape + 0.1 * (wanted.dtype == other.dtype)
