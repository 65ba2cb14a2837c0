"""Versions that answered before: held in memory, or derived again from the store."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from onnx_refit.errors import VersionError
from onnx_refit.refit.derivation import Derivation
from onnx_refit.refit.ledger import Ledger
from onnx_refit.refit.versions import Version, VersionTable


class Earlier:
    """Finds earlier versions of one engine. Not thread-safe: the transaction's lock guards it.

    Args:
        versions: those in memory.
        ledger: knows those that were stored.
        derivation: makes versions.
        names: every refittable weight.
    """

    def __init__(self, versions: VersionTable, ledger: Ledger, derivation: Derivation, names: Collection[str]) -> None:
        self._versions = versions
        self._ledger = ledger
        self._derivation = derivation
        self._names = names

    def previous(self) -> Version:
        """The version that was current before; VersionError if there is none."""
        try:
            return self._versions.previous()
        except VersionError:
            number = self._ledger.previous(self._versions.current.number)
            if number is None:
                raise
            return self.version(number)

    def version(self, number: int) -> Version:
        """A version by its number; VersionError if it is neither held nor stored."""
        if not self._versions.holds(number):
            stored = self._ledger.load(number)
            if stored is not None:
                weights = stored.read_many(self._names)
                again = self._derivation.version(weights, stored.description)
                record = next(record for record in self._ledger.records() if record.number == number)
                return replace(again, number=number, parent=record.parent, committed=record.committed)
        return self._versions.get(number)
