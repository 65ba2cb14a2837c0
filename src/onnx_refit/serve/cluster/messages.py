"""What the coordinator and the replicas say to each other: plain data, for any transport."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from onnx_refit.refit.canary import Canary
from onnx_refit.refit.check import CheckOptions
from onnx_refit.serve.cluster.errors import Refusal


@dataclass(frozen=True)
class Target:
    """What the whole cluster is to answer with.

    Attributes:
        version: the version of the weights; its number is the store's.
        epoch: counts publications, rollbacks too, and so only ever grows.
    """

    version: int
    epoch: int


@dataclass(frozen=True)
class Member:
    """A replica that the coordinator has let in.

    Attributes:
        name: unique for ever; a restarted replica has another.
        address: how the transport finds it, in its own words.
    """

    name: str
    address: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepare:
    """First phase: get ready to publish, and say whether that went well. Nothing is published.

    Attributes:
        transaction: its name.
        base: the version that answers now.
        version: the version to get ready, where its number is known already (a rollback, a replica that lags).
        weights: the weights as the transport ships them; None asks for a version that the replica still holds.
        partial: weights that are not given stay as in ``base``.
        source: where they came from, in words.
        canary: golden inputs to run on them.
    """

    transaction: str
    base: int
    version: int | None = None
    weights: object = None
    partial: bool = False
    source: str = ""
    canary: Canary | None = None


@dataclass(frozen=True)
class Publish:
    """Second phase: it is decided, publish."""

    transaction: str
    target: Target


@dataclass(frozen=True)
class Discard:
    """It was decided against: drop what was prepared."""

    transaction: str


@dataclass(frozen=True)
class Forget:
    """Free an earlier version."""

    version: int


@dataclass(frozen=True)
class Report:
    """Say where you stand."""


Command: TypeAlias = Prepare | Publish | Discard | Forget | Report


@dataclass(frozen=True)
class ReplicaState:
    """Where a replica stands.

    Attributes:
        target: what it answers with.
        held: the versions it can answer with.
        prepared: the transaction that it is ready to publish, if any.
    """

    target: Target
    held: tuple[int, ...]
    prepared: str | None = None


@dataclass(frozen=True)
class Reply:
    """A replica's answer to a command.

    Attributes:
        state: where it stands afterwards.
        refusal: why it did not do as told.
        changed: weights that a prepared version changes.
        seconds: stage -> seconds spent in it.
    """

    state: ReplicaState
    refusal: Refusal | None = None
    changed: frozenset[str] = frozenset()
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RefitOrder:
    """What a client asks the coordinator for.

    Attributes:
        transaction: a name of the client's making, unique for ever; asking again with the same name does it once.
        weights: the weights by the checkpoint's names, as the transport ships them.
        source: where they came from, in words.
        options: how strict the check is.
        canary: golden inputs that every replica runs on the staged weights.
    """

    transaction: str
    weights: object
    source: str
    options: CheckOptions = field(default_factory=CheckOptions)
    canary: Canary | None = None


@dataclass(frozen=True)
class ClusterReport:
    """The account of one refit or rollback of the whole cluster.

    Attributes:
        target: what every replica answers with now.
        previous: the version that answered before.
        transaction: its name.
        source: where the weights came from, in words.
        changed: names of the weights that changed; empty for a rollback, and where a coordinator that took over only
            knows that it was committed.
        replicas: the replicas that have published it, and the seconds each spent on it.
        lost: replicas that ended, or were ended, after it was decided; those that replace them start with it.
        seconds: phase -> seconds.
    """

    target: Target
    previous: int | None
    transaction: str
    source: str
    changed: tuple[str, ...] = ()
    replicas: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """The version that answers now."""
        return self.target.version

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return {
            "version": self.target.version,
            "epoch": self.target.epoch,
            "previous": self.previous,
            "transaction": self.transaction,
            "source": self.source,
            "changed": list(self.changed),
            "replicas": {name: dict(seconds) for name, seconds in self.replicas.items()},
            "lost": list(self.lost),
            "seconds": dict(self.seconds),
        }
