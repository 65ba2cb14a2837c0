"""Staged weight sets of a served model: what each was made from, and where it stands."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from onnx_refit.errors import VersionError
from onnx_refit.refit.check import Casting, CheckOptions
from onnx_refit.refit.transaction import Staged, State
from onnx_refit.serve.errors import ServeError
from onnx_refit.serve.memory import Memory

_REMEMBERED = 256


@dataclass(frozen=True)
class StageOptions:
    """How strict the check of an upload is, and what it looks at.

    Attributes:
        partial: weights that are not given stay as they are.
        allow_nonfinite: NaN and infinities are accepted.
        allow_rounding: a cast may round.
        measure: norms and changes go into the report (costs several passes).
    """

    partial: bool = False
    allow_nonfinite: bool = False
    allow_rounding: bool = False
    measure: bool = False

    def check_options(self) -> CheckOptions:
        """The same, for the check."""
        return CheckOptions(
            partial=self.partial,
            allow_nonfinite=self.allow_nonfinite,
            casting=Casting.ROUND if self.allow_rounding else Casting.LOSSLESS,
            compare=self.measure,
            measure=self.measure,
        )

    def identity(self, sha256: str, base: int) -> str:
        """The id of what staging this content makes; a partial refit depends on the version it builds on."""
        text = f"{sha256} {self.partial} {self.allow_nonfinite} {self.allow_rounding} {base if self.partial else ''}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class Entry:
    """One staged weight set on the desk.

    Attributes:
        id: follows from content and options, so that staging the same again finds it.
        staged: the engine's own; None once it was committed or discarded.
        summary: JSON-able account of it.
        deadline: when it is discarded, on the monotonic clock.
        committed: the account of the commit, once there is one.
        lost: whether it was staged before the server was restarted, and not committed.
    """

    id: str
    staged: Staged | None
    summary: dict[str, Any]
    deadline: float
    committed: dict[str, Any] | None = None
    canaries: list[dict[str, Any]] = field(default_factory=list)
    lost: bool = False

    @property
    def state(self) -> State:
        """Where it stands."""
        if self.committed is not None:
            return State.COMMITTED
        return State.STAGED if self.staged is not None else State.DISCARDED

    def to_json(self, *, report: bool = True) -> dict[str, Any]:
        """What a client sees of it."""
        shown = {"id": self.id, "state": self.state.value, **self.summary, "canaries": self.canaries}
        if self.committed is not None:
            shown["version"] = self.committed["version"]
        if not report:
            shown.pop("report", None)
        return shown


def make_entry(
    identifier: str, staged: Staged, *, sha256: str, nbytes: int, label: str, options: StageOptions, lifetime: float
) -> Entry:
    """An entry for what was just staged."""
    candidate = staged.candidate
    summary = {
        "sha256": sha256,
        "bytes": nbytes,
        "label": label,
        "options": asdict(options),
        "base": candidate.base,
        "changed": sorted(candidate.changed),
        "seconds": dict(staged.seconds),
        "staged_at": datetime.now(UTC).isoformat(),
        "report": staged.check.to_json(),
    }
    return Entry(identifier, staged, summary, time.monotonic() + lifetime)


class StagingTable:
    """The entries of one model, those staged and the last of those that no longer are. Guarded by the desk's lock."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: dict[str, Entry] = {}

    def __iter__(self) -> Any:
        return iter(list(self._entries.values()))

    @property
    def staged(self) -> list[Entry]:
        """The entries that can be committed."""
        return [entry for entry in self._entries.values() if entry.state is State.STAGED]

    def find(self, identifier: str) -> Entry | None:
        """An entry, whatever its state; None if it is not known."""
        return self._entries.get(identifier)

    def get(self, identifier: str) -> Entry:
        """An entry, whatever its state; VersionError if it is not known."""
        entry = self._entries.get(identifier)
        if entry is None:
            raise VersionError(
                f"nothing is staged as {identifier[:40]!r}",
                hint="List what is staged; what only was staged does not outlive the server",
            )
        if entry.lost:
            raise ServeError(
                410,
                f"{identifier!r} was staged before the server was restarted, and is gone",
                hint="Send the weights again: they get the same id",
            )
        return entry

    def restore(self, known: Mapping[str, Memory]) -> None:
        """Take in what an earlier run of the server knew."""
        for identifier, memory in known.items():
            self._entries[identifier] = Entry(
                identifier,
                staged=None,
                summary=memory.summary,
                deadline=0.0,
                committed=memory.committed,
                lost=memory.committed is None,
            )

    def require_room(self) -> None:
        """ServeError unless one more may be staged."""
        if len(self.staged) >= self._limit:
            raise ServeError(
                409, f"{self._limit} weight sets are staged already", hint="Commit or discard one of them first"
            )

    def add(self, entry: Entry) -> None:
        """Take an entry in; the oldest of those that are over are forgotten."""
        self._entries.pop(entry.id, None)
        self._entries[entry.id] = entry
        over = [old.id for old in self._entries.values() if old.state is not State.STAGED]
        for identifier in over[: max(0, len(over) - _REMEMBERED)]:
            del self._entries[identifier]

    def expired(self) -> list[Entry]:
        """Staged entries whose time is up."""
        now = time.monotonic()
        return [entry for entry in self.staged if entry.deadline <= now]
