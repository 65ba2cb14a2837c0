"""Splitting the requests that name no version between several versions."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass

from onnx_refit.errors import InputError
from onnx_refit.serve.request import parse_version

_MAX_VERSIONS = 16


@dataclass(frozen=True)
class TrafficSplit:
    """Weights of versions; a commit or a rollback ends the split.

    Attributes:
        shares: (version, cumulated share), ascending; the last share is 1.
    """

    shares: tuple[tuple[int, float], ...]

    def choose(self, key: str | None) -> int:
        """The version for a request; requests with the same key get the same one."""
        if key is None:
            point = random.random()
        else:
            point = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / (1 << 56)
        return next((version for version, bound in self.shares if point < bound), self.shares[-1][0])

    def to_json(self) -> dict[str, float]:
        """Version -> share."""
        shares, before = {}, 0.0
        for version, bound in self.shares:
            shares[str(version)] = round(bound - before, 9)
            before = bound
        return shares


def make_split(weights: object) -> TrafficSplit | None:
    """A split from ``{"3": 90, "4": 10}``; None for an empty one.

    Raises:
        InputError: it is no mapping of versions to positive weights.
        VersionError: a key is no version.
    """
    if not isinstance(weights, Mapping) or len(weights) > _MAX_VERSIONS:
        raise InputError(f"the split must be an object of at most {_MAX_VERSIONS} versions and their weights")
    pairs: list[tuple[int, float]] = []
    for text, weight in weights.items():
        version = parse_version(text)
        if version is None or isinstance(weight, bool) or not isinstance(weight, int | float):
            raise InputError("the split must map versions to numbers")
        if not 0 < weight < 1e9:
            raise InputError("a weight of the split must be positive")
        pairs.append((version, float(weight)))
    if not pairs:
        return None
    total, so_far, shares = sum(weight for _, weight in pairs), 0.0, []
    for version, weight in pairs:
        so_far += weight
        shares.append((version, so_far / total))
    return TrafficSplit(tuple(shares))
