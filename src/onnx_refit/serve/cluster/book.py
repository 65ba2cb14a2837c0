"""What the coordinator remembers: the versions, which one answers, at which epoch, and who the replicas are.

The version store's journal holds the decisions: a refit is decided the moment its line is durable there, and a crash
before that means it never was. Beside it lies one small file with what the store has no place for: the epoch, the
names of the replicas, and the transaction that was about to be decided. It is written before the decision, so that
after a crash both together say what was decided.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onnx_refit.errors import RefitError, StoreError, VersionError
from onnx_refit.files import write_text
from onnx_refit.plan.plan import Plan
from onnx_refit.refit.ledger import StoreLedger, source_of
from onnx_refit.serve.cluster.messages import Member, Target
from onnx_refit.tensors import Array
from onnx_refit.weights.store import StoredVersion, VersionRecord

_FORMAT = 1
_TRANSACTION = "transaction"
_REMEMBERED = 32  # rollbacks whose callers may still ask what became of them
FILE = "cluster.json"


@dataclass(frozen=True)
class _State:
    """The file beside the store.

    Attributes:
        epoch: the epoch of what the store calls current, or one that was about to be.
        transaction: the transaction that was last about to be decided.
        version: what it would make current, where the number is known before (a rollback); else None.
        rollbacks: the last rollbacks that were decided: transaction -> version.
        members: name -> replica.
    """

    epoch: int = 1
    transaction: str = ""
    version: int | None = None
    rollbacks: Mapping[str, int] = field(default_factory=dict)
    members: Mapping[str, Member] = field(default_factory=dict)

    def encode(self) -> str:
        return json.dumps(
            {
                "format": _FORMAT,
                "epoch": self.epoch,
                "transaction": self.transaction,
                "version": self.version,
                "rollbacks": dict(self.rollbacks),
                "members": {name: dict(member.address) for name, member in self.members.items()},
            }
        )

    @classmethod
    def decode(cls, text: str, where: Path) -> _State:
        try:
            value: dict[str, Any] = json.loads(text)
            if value["format"] != _FORMAT:
                raise StoreError(f"is of format {value['format']}, not {_FORMAT}", where=where)
            version = value["version"]
            members = {
                str(name): Member(str(name), {str(k): str(v) for k, v in address.items()})
                for name, address in value["members"].items()
            }
            rollbacks = {str(name): int(number) for name, number in value["rollbacks"].items()}
            last = None if version is None else int(version)
            return cls(int(value["epoch"]), str(value["transaction"]), last, rollbacks, members)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"is damaged: {error!r}", where=where, hint="Restore it from a backup; end all replicas before"
            ) from error


class Book:
    """A version store and the file beside it, open to one coordinator at a time.

    ``onnx_refit.load(plan, store=...)`` and ``onnx-refit serve --store`` take the same directory.

    Args:
        path: the store's directory; made if it does not exist.
        plan: the plan whose weights it holds.

    Raises:
        StoreLockedError: another coordinator, server or engine has it open.
        StoreError: it cannot be written, is damaged, or belongs to another plan.
    """

    def __init__(self, path: str | os.PathLike[str], plan: Plan) -> None:
        self._ledger = StoreLedger(path, plan.fingerprint)
        self._file = Path(path) / FILE
        try:
            self._state = _State.decode(self._file.read_text("utf-8"), self._file) if self._file.exists() else _State()
        except OSError as error:
            self._ledger.close()
            raise StoreError(f"cannot be read: {error.strerror}", where=self._file) from error
        except BaseException:
            self._ledger.close()
            raise

    @property
    def empty(self) -> bool:
        """Whether there is no version yet."""
        return self._ledger.current() is None

    @property
    def target(self) -> Target:
        """What the cluster answers with; StoreError while the book is empty."""
        record = self._ledger.store.current()
        if record is None:
            raise StoreError("there is no version yet", where=self._file.parent)
        return Target(record.number, self._state.epoch)

    @property
    def members(self) -> tuple[Member, ...]:
        """The replicas that were let in and have not ended as far as is known."""
        return tuple(self._state.members.values())

    @property
    def records(self) -> tuple[VersionRecord, ...]:
        """All versions, oldest first."""
        return self._ledger.records()

    def stored(self, version: int | None = None) -> StoredVersion:
        """The weights of a version (None: the current one); VersionError if there is none."""
        return self._ledger.load(self.target.version if version is None else version)

    def source(self, version: int) -> str:
        """Where the weights of a version came from, in words."""
        return next((source_of(record) for record in self.records if record.number == version), "")

    @property
    def transaction(self) -> str:
        """The transaction that made the target what answers; empty for the first version."""
        version = self.target.version
        if self._state.version == version:
            return self._state.transaction
        return next((r.metadata.get(_TRANSACTION, "") for r in self.records if r.number == version), "")

    def decided(self, transaction: str) -> int | None:
        """The version that a transaction made, or made current; None if it was never decided."""
        for record in reversed(self.records):
            if record.metadata.get(_TRANSACTION) == transaction:
                return record.number
        return self._rollbacks().get(transaction)

    def _rollbacks(self) -> Mapping[str, int]:
        state = self._state
        # Whether the last one came to be, only the store knows.
        if state.version is None or self.empty or state.version != self.target.version:
            return state.rollbacks
        return {**state.rollbacks, state.transaction: state.version}

    def previous(self) -> int:
        """The version that was current before; VersionError if there is none."""
        number = self._ledger.previous(self.target.version)
        if number is None:
            raise VersionError("there is no earlier version to roll back to")
        return number

    # ------------------------------------------------------------------ writing; each is durable when it returns

    def seed(self, weights: Mapping[str, Array], source: str) -> None:
        """Take the weights of the first version; RefitError if there is one."""
        if not self.empty:
            raise RefitError("the store has versions already")
        self._ledger.first(weights, source)

    def commit(self, changed: Mapping[str, Array], source: str, transaction: str, *, partial: bool) -> Target:
        """Decide a refit: when this returns, it is decided; when it raises, it is decided against.

        Args:
            changed: the weights, by the plan's names.
            source: where they came from.
            transaction: its name.
            partial: weights that are not given stay as in the current version.

        Raises:
            StoreError, WriteError: the disk refused.
        """
        parent = self.target.version if partial else None
        self._about_to(transaction, None)
        self._ledger.commit_arrays(changed, parent, source, {_TRANSACTION: transaction})
        return self.target

    def rollback(self, version: int, transaction: str) -> Target:
        """Decide a rollback; as ``commit``. VersionError if there is no such version."""
        self._ledger.load(version)
        self._about_to(transaction, version)
        self._ledger.rollback(version)
        return self.target

    def forget(self, version: int) -> None:
        """Delete a version that is not current; VersionError if there is none, or it is current."""
        self._ledger.forget(version)

    def raise_epoch(self, epoch: int) -> None:
        """Go on counting from an epoch; never backwards."""
        if epoch > self._state.epoch:
            self._write(replace(self._state, epoch=epoch))

    def add(self, member: Member) -> None:
        """Note a replica before it answers its first request."""
        self._write(replace(self._state, members={**self._state.members, member.name: member}))

    def remove(self, name: str) -> None:
        """Note that a replica has ended."""
        if name in self._state.members:
            self._write(replace(self._state, members={n: m for n, m in self._state.members.items() if n != name}))

    def close(self) -> None:
        """Give the store's lock back."""
        self._ledger.close()

    def _about_to(self, transaction: str, version: int | None) -> None:
        # An epoch that is not used after all leaves a gap, which does no harm: epochs only need to grow.
        decided = dict(list(self._rollbacks().items())[-_REMEMBERED:])
        epoch = self._state.epoch + 1
        self._write(replace(self._state, epoch=epoch, transaction=transaction, version=version, rollbacks=decided))

    def _write(self, state: _State) -> None:
        write_text(self._file, state.encode())
        self._state = state
