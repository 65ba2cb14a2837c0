"""Versions in memory: immutable, numbered, kept as long as somebody may want them."""

from __future__ import annotations

import html
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeAlias

from onnx_refit.engine.protocol import WeightSet
from onnx_refit.errors import VersionError
from onnx_refit.refit.retain import Kept
from onnx_refit.refit.unchanged import Samples


@dataclass(frozen=True)
class VersionInfo:
    """What is known of one version.

    Attributes:
        number: counts up from 1; never reused within an engine (nor within a store on disk).
        source: where its weights came from, in words.
        parent: the version it was derived from; None for the first.
        changed: names of the source weights that differ from the parent; None for the first (all are new).
        committed: when it was published.
        nbytes: bytes of its engine weights.
        shared_nbytes: bytes of them shared with the parent.
        current: whether it answers requests that ask for no version.
        held: whether it can still be run or rolled back to.
    """

    number: int
    source: str
    parent: int | None
    changed: frozenset[str] | None
    committed: datetime
    nbytes: int
    shared_nbytes: int
    current: bool
    held: bool

    @classmethod
    def stored(cls, number: int, source: str, parent: int | None, committed: datetime) -> VersionInfo:
        """A version that is only in the store."""
        return cls(number, source, parent, None, committed, 0, 0, current=False, held=False)


class VersionList(tuple[VersionInfo, ...]):
    """Versions, oldest first; a table in notebooks."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{'<b>' * info.current}{info.number}{'</b>' * info.current}</td>"
            f"<td>{html.escape(info.source)}</td><td>{'' if info.parent is None else info.parent}</td>"
            f"<td>{'all' if info.changed is None else len(info.changed)}</td>"
            f"<td style='text-align:right'>{info.nbytes / 1e6:.2f}</td>"
            f"<td style='text-align:right'>{info.shared_nbytes / 1e6:.2f}</td>"
            f"<td>{info.committed:%Y-%m-%d %H:%M:%S}</td>"
            f"<td>{'current' if info.current else 'held' if info.held else ''}</td></tr>"
            for info in self
        )
        head = "".join(
            f"<th>{title}</th>"
            for title in ("version", "source", "parent", "changed", "MB", "shared MB", "committed (UTC)", "")
        )
        return f"<table><tr>{head}</tr>{rows}</table>"


@dataclass(frozen=True)
class Version:
    """One version as the engine holds it.

    Attributes:
        number: see VersionInfo.
        weights: its weight set, in the backend's memory.
        retained: source weights that cannot be read back from the weight set, kept for later partial refits.
        samples: a few elements of every source weight, to see quickly that a new one differs.
        source: see VersionInfo.
        parent: see VersionInfo.
        changed: see VersionInfo.
        committed: see VersionInfo.
    """

    number: int
    weights: WeightSet
    retained: Kept
    samples: Samples
    source: str
    parent: int | None
    changed: frozenset[str] | None
    committed: datetime


_Told: TypeAlias = tuple[str, int | None, frozenset[str] | None, datetime, int, int]
"""What is remembered of a version beside its number: the fields of ``VersionInfo`` from ``source`` on."""

_REMEMBERED = 1000
"""Versions whose description outlives them; an engine may see millions."""


@dataclass
class VersionTable:
    """The versions of one engine: the last ``keep`` are held, the last thousand are remembered by description.

    Not thread-safe: the transaction's lock guards it. Readers that run inferences take ``current`` by one reference
    read, which needs no lock.
    """

    keep: int
    current: Version
    _held: dict[int, Version] = field(default_factory=dict)
    _infos: OrderedDict[int, _Told] = field(default_factory=OrderedDict)  # whose oldest is found at once
    _order: list[int] = field(default_factory=list)
    _newest: int = 0

    def __post_init__(self) -> None:
        self._remember(self.current)

    def publish(self, version: Version) -> None:
        """Make a version current and forget the oldest beyond ``keep``."""
        self._remember(version)
        self.current = version
        while len(self._order) > self.keep:  # at least one, and this version is the last
            del self._held[self._order.pop(0)]

    def get(self, number: int) -> Version:
        """A version still held; VersionError for one that is not."""
        held = self._held.get(number)
        if held is not None:
            return held
        choices = ", ".join(str(n) for n in sorted(self._held))
        existed = 1 <= number <= self._newest
        reason = "is no longer held" if existed else "does not exist"
        raise VersionError(
            f"version {number} {reason}; held are {choices}",
            hint="Load the engine with a larger keep to hold more versions" if existed else None,
        )

    def holds(self, number: int) -> bool:
        """Whether a version can be run at once."""
        return number in self._held

    def require_earlier(self, number: int) -> None:
        """VersionError if a version is not held, or answers now."""
        self.get(number)
        if number == self.current.number:
            raise VersionError(f"version {number} is the current one", hint="Roll back to another one first")

    def forget(self, number: int) -> None:
        """Hold a version no longer; VersionError if it is not held or answers now."""
        self.require_earlier(number)
        self._order.remove(number)
        del self._held[number]

    def previous(self) -> Version:
        """The held version published last before the current one; VersionError if there is none."""
        earlier = [n for n in self._order if n != self.current.number]
        if not earlier:
            raise VersionError("there is no earlier version to roll back to")
        return self._held[earlier[-1]]

    def infos(self) -> Iterator[VersionInfo]:
        """Every version remembered, oldest first."""
        for number in sorted(self._infos):
            current, held = number == self.current.number, number in self._held
            yield VersionInfo(number, *self._infos[number], current=current, held=held)

    def _remember(self, version: Version) -> None:
        number = version.number
        if number > self._newest:
            self._newest = number
        self._held[number] = version
        if number in self._order:
            self._order.remove(number)
        self._order.append(number)
        weights = version.weights
        self._infos[number] = (
            version.source,
            version.parent,
            version.changed,
            version.committed,
            weights.nbytes,
            weights.shared_nbytes,
        )
        if len(self._infos) > _REMEMBERED + self.keep:
            del self._infos[next(number for number in self._infos if number not in self._held)]
