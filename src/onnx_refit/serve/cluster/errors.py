"""Errors of a cluster, and how a refusal travels: as data, because exceptions do not survive every transport."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from onnx_refit.errors import (
    CanaryError,
    EngineError,
    InputError,
    OnnxRefitError,
    PlanMismatchError,
    RefitError,
    RefitRejectedError,
    StoreError,
    VersionError,
    WeightsError,
)
from onnx_refit.refit.check_report import CheckReport


class ClusterError(OnnxRefitError):
    """Replicas could not be changed together, or cannot be reached; the message says what answers now."""


class ReplicaLostError(ClusterError):
    """A replica has ended: it answers nobody any more."""


class StaleReplicaError(ClusterError):
    """A replica did not reach the state that the request had seen elsewhere in time."""


class OutcomeUnknownError(ClusterError):
    """Nobody is there to say whether a refit or rollback was decided.

    Args:
        message: what was wrong.
        transaction: its name; whoever has the store can say what became of it.
        where: the deployment.
        hint: what to do about it.
    """

    def __init__(self, message: str, *, transaction: str, where: object = None, hint: str | None = None) -> None:
        super().__init__(message, where=where, hint=hint)
        self.transaction = transaction


class RefusalKind(Enum):
    """What kind of error a refusal was."""

    REJECTED = "rejected"
    CANARY = "canary"
    ABSENT = "absent"
    VERSION = "version"
    WEIGHTS = "weights"
    STORE = "store"
    PLAN = "plan"
    INPUT = "input"
    ENGINE = "engine"
    STALE = "stale"
    REFIT = "refit"
    CLUSTER = "cluster"


# The first class that fits decides, so the special ones stand before the general ones.
_KINDS: tuple[tuple[type[OnnxRefitError], RefusalKind], ...] = (
    (RefitRejectedError, RefusalKind.REJECTED),
    (CanaryError, RefusalKind.CANARY),
    (VersionError, RefusalKind.VERSION),
    (RefitError, RefusalKind.REFIT),
    (WeightsError, RefusalKind.WEIGHTS),
    (StoreError, RefusalKind.STORE),
    (PlanMismatchError, RefusalKind.PLAN),
    (InputError, RefusalKind.INPUT),
    (EngineError, RefusalKind.ENGINE),
    (StaleReplicaError, RefusalKind.STALE),
)
_ERRORS: dict[RefusalKind, type[OnnxRefitError]] = {kind: error for error, kind in _KINDS}


@dataclass(frozen=True)
class Refusal:
    """An error as data.

    Attributes:
        kind: what kind of error it was.
        message: what was wrong.
        where: the file, tensor or replica.
        hint: what to do about it.
        report: the whole check, where weights were rejected.
    """

    kind: RefusalKind
    message: str
    where: str | None = None
    hint: str | None = None
    report: CheckReport | None = None

    @classmethod
    def of(cls, error: OnnxRefitError) -> Refusal:
        """An error of this library as data."""
        kind = next((kind for known, kind in _KINDS if isinstance(error, known)), RefusalKind.CLUSTER)
        report = error.report if isinstance(error, RefitRejectedError) else None
        return cls(kind, error.message, error.where, error.hint, report if isinstance(report, CheckReport) else None)

    def error(self, where: str | None = None) -> OnnxRefitError:
        """The error again.

        Args:
            where: who refused; goes before the refusal's own place.
        """
        place = ", ".join(part for part in (where, self.where) if part) or None
        if self.kind is RefusalKind.REJECTED:
            return RefitRejectedError(self.message, report=self.report, where=place, hint=self.hint)
        return _ERRORS.get(self.kind, ClusterError)(self.message, where=place, hint=self.hint)
