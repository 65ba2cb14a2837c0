"""The last step of a refit: a candidate becomes the version that answers."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any, TypeAlias

from onnx_refit.errors import RefitError
from onnx_refit.refit.candidate import Candidate
from onnx_refit.refit.derivation import Derivation
from onnx_refit.refit.ledger import Ledger
from onnx_refit.refit.quick import frozen
from onnx_refit.refit.report import Account, RefitReport
from onnx_refit.refit.versions import Version, VersionTable
from onnx_refit.refit.view import VersionWeights

Ready: TypeAlias = tuple[VersionWeights, dict[str, Any], dict[str, Any]]
"""What a commit needs of a candidate, whenever it comes.

The candidate's source weights, read back from the staged set, because the caller's arrays may have changed since they
were checked; the fields of the version, but its number and its time; those of the report, but the versions' numbers and
the seconds.
"""


class Publisher:
    """Publishes candidates of one engine. Not thread-safe: the transaction's lock guards it.

    Args:
        versions: those in memory.
        ledger: numbers versions and remembers them.
        derivation: reads candidates back.
        account: gives account.
    """

    def __init__(self, versions: VersionTable, ledger: Ledger, derivation: Derivation, account: Account) -> None:
        self._versions = versions
        self._ledger = ledger
        self._derivation = derivation
        self._account = account

    def ready(self, candidate: Candidate) -> Ready:
        """Everything that can be made before the commit; it publishes nothing and needs no lock."""
        return self._derivation.weights_of(candidate), candidate.fields(), self._account.fields(candidate)

    def publish(self, candidate: Candidate, seconds: dict[str, float], ready: Ready | None = None) -> RefitReport:
        """Write a candidate down and make it the version that answers.

        Args:
            candidate: what to publish.
            seconds: takes the seconds of each stage.
            ready: what was made of the candidate before.

        Raises:
            RefitError: it replaces a part of another version than the current one.
            StoreError: the ledger refused; nothing was published.
        """
        before = self._versions.current
        if candidate.base != before.number and not candidate.full:
            raise RefitError(
                f"the weights were staged on version {candidate.base}, but version {before.number} was committed "
                "since, and they replace only a part",
                hint="Stage them again",
            )
        started = time.perf_counter()
        weights, version, report = ready or self.ready(candidate)
        number = self._ledger.commit(candidate.changed, weights, None if candidate.full else candidate.base)
        stored = time.perf_counter()
        version["number"], version["committed"] = number, datetime.now(UTC)
        try:
            self._versions.publish(frozen(Version, version))
        except BaseException:
            # Interrupted between the two: what is written down must be what answers.
            if self._versions.current is before:
                self._ledger.rollback(before.number)
            raise
        seconds["store"], seconds["commit"] = stored - started, time.perf_counter() - stored
        report["version"], report["previous"], report["seconds"] = number, before.number, seconds
        return frozen(RefitReport, report)
