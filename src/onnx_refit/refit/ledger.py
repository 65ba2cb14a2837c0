"""Who numbers versions and remembers them: the engine's own memory, or a store on disk that survives a crash."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Protocol

from onnx_refit.errors import StoreError
from onnx_refit.tensors import Array
from onnx_refit.weights.source import WeightSource
from onnx_refit.weights.store import Store, StoredVersion, VersionRecord

_PLAN = "plan"
_SOURCE = "source"


class Ledger(Protocol):
    """The book of versions. A number it has given is never given again."""

    def first(self, weights: Mapping[str, Array], source: str) -> int:
        """The number of the version an engine starts with."""
        ...

    def commit(self, changed: Iterable[str], weights: WeightSource, parent: int | None) -> int:
        """Write a version down before it is published; its number. What it raises stops the commit.

        Args:
            changed: names of the weights that differ from the parent; all of them without one.
            weights: the version's weights.
            parent: the version it was derived from.
        """
        ...

    def rollback(self, number: int) -> None:
        """Write down that an earlier version is current again."""
        ...

    def forget(self, number: int) -> None:
        """Write down that a version is not wanted any more."""
        ...

    def previous(self, number: int) -> int | None:
        """The version, other than a given one, that was current last; None if there is none, or nothing is kept."""
        ...

    def load(self, number: int) -> StoredVersion | None:
        """The source weights of a version that the engine does not hold any more; None if they are not kept."""
        ...

    def records(self) -> Iterable[VersionRecord]:
        """What is written down of versions, oldest first."""
        ...

    def close(self) -> None:
        """Let go of files and locks."""
        ...


class MemoryLedger:
    """Counts from 1 and keeps nothing."""

    def __init__(self) -> None:
        self._last = 0

    def first(self, weights: Mapping[str, Array], source: str) -> int:
        """1, or the next number."""
        self._last += 1
        return self._last

    def commit(self, changed: Iterable[str], weights: WeightSource, parent: int | None) -> int:
        """The next number."""
        self._last = number = self._last + 1
        return number

    def rollback(self, number: int) -> None:
        """Do nothing."""

    def forget(self, number: int) -> None:
        """Do nothing."""

    def previous(self, number: int) -> None:
        """None: nothing is kept."""
        return

    def load(self, number: int) -> None:
        """None: nothing is kept."""
        return

    def records(self) -> tuple[VersionRecord, ...]:
        """Nothing is kept."""
        return ()

    def close(self) -> None:
        """Do nothing."""


class StoreLedger:
    """A ledger in a version store on disk: a commit returns when it would survive a power cut.

    Args:
        path: the store's directory; made if it does not exist.
        plan: fingerprint of the plan whose weights it holds.

    Raises:
        StoreLockedError: another process, or another engine of this one, writes to it.
        StoreError: it cannot be written, is damaged, or holds versions of another plan.
    """

    def __init__(self, path: str | os.PathLike[str], plan: str) -> None:
        self._store = Store.open(path)
        self._plan = plan
        self._path = path
        record = self._store.current()
        if record is not None and record.metadata.get(_PLAN) != plan:
            self._store.close()
            raise StoreError(
                f"the store holds versions of another plan ({record.metadata.get(_PLAN, 'unknown')[:12]}, "
                f"this one is {plan[:12]})",
                where=path,
                hint="Choose another directory for this plan",
            )

    @property
    def store(self) -> Store:
        """The store."""
        return self._store

    def current(self) -> StoredVersion | None:
        """The weights of the version that was current when the last process ended; None in an empty store.

        They are by the model's own names, and hashed as they are read.
        """
        record = self._store.current()
        return None if record is None else self._store.load(record.number)

    def first(self, weights: Mapping[str, Array], source: str) -> int:
        """The current version's number; an empty store takes the weights as version 1."""
        record = self._store.current()
        if record is None:
            record = self._store.commit(weights, metadata=self._metadata(source))
        return record.number

    def commit(self, changed: Iterable[str], weights: WeightSource, parent: int | None) -> int:
        """Write the changed tensors durably; StoreError if the disk refuses."""
        arrays = {name: weights.read(name) for name in changed}
        return self.commit_arrays(arrays, parent, weights.description)

    def commit_arrays(
        self,
        arrays: Mapping[str, Array],
        parent: int | None,
        source: str,
        notes: Mapping[str, str] = MappingProxyType({}),
    ) -> int:
        """Write a version durably: all weights, or with a parent those that differ; StoreError if the disk refuses.

        Args:
            arrays: weights by name.
            parent: the version to take the other weights from.
            source: where they came from, in words.
            notes: what else to write down with it.
        """
        return self._store.commit(arrays, parent, {**notes, **self._metadata(source)}).number

    def rollback(self, number: int) -> None:
        """Make a version the current one, durably."""
        self._store.rollback(number)

    def forget(self, number: int) -> None:
        """Delete a version and free what no other needs; what cannot be freed now is the next time."""
        self._store.delete(number)
        # The version is gone, durably. A disk that refuses to free its bytes must not make it look held.
        with contextlib.suppress(StoreError):
            self._store.gc()

    def previous(self, number: int) -> int | None:
        """The stored version that was current last before a given one."""
        return self._store.previous(number)

    def load(self, number: int) -> StoredVersion:
        """A stored version, hashed as it is read; VersionError if there is none."""
        return self._store.load(number)

    def records(self) -> tuple[VersionRecord, ...]:
        """All stored versions, oldest first."""
        return self._store.versions()

    def close(self) -> None:
        """Give the store's lock back."""
        self._store.close()

    def _metadata(self, source: str) -> dict[str, str]:
        return {_PLAN: self._plan, _SOURCE: source}


def source_of(record: VersionRecord) -> str:
    """Where the weights of a stored version came from, in words."""
    return record.metadata.get(_SOURCE, "")
