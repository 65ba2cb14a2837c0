"""The refit verbs of one served model: stage, canary, commit, rollback, delete, diff. All of it may block."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from onnx_refit.errors import CanaryError, OnnxRefitError, RefitError, RefitRejectedError, VersionError
from onnx_refit.files import WriteError
from onnx_refit.refit.canary import Canary, CanaryResult
from onnx_refit.refit.live import Engine
from onnx_refit.refit.report import RefitReport
from onnx_refit.refit.transaction import State
from onnx_refit.refit.versions import VersionInfo
from onnx_refit.serve.errors import ServeError
from onnx_refit.serve.events import EventHub
from onnx_refit.serve.memory import DeskMemory
from onnx_refit.serve.metrics import Metrics
from onnx_refit.serve.received import open_upload
from onnx_refit.serve.settings import Limits
from onnx_refit.serve.spool import Upload
from onnx_refit.serve.staging import Entry, StageOptions, StagingTable, make_entry
from onnx_refit.serve.tracing import SetAttribute, work_span
from onnx_refit.weights.scan import measure

_LISTED = 200


class RefitDesk:
    """Changes the weights of one engine on behalf of clients.

    Its calls are idempotent: staging the same content again finds what is staged already, and committing again
    gives the first commit's account.

    Args:
        model: the model's name.
        engine: its engine.
        events: where to tell what happens.
        metrics: where to count it.
        limits: how many weight sets may be staged, and for how long.
        memory: what is remembered across restarts; None where nothing is.

    Raises:
        WriteError: the memory cannot be written.
    """

    def __init__(
        self,
        model: str,
        engine: Engine,
        events: EventHub,
        metrics: Metrics,
        limits: Limits,
        memory: DeskMemory | None = None,
    ) -> None:
        self._model, self._engine, self._events, self._metrics = model, engine, events, metrics
        self._lifetime = limits.staged_seconds
        self._table = StagingTable(limits.staged)
        self._memory = memory
        if memory is not None:
            memory.settle(self._account_of)
            self._table.restore(memory.known)
        # One guards the table and the counts; the other lets one set at a time be staged, which may take long: nobody
        # else waits for it. Taken in this order: staging, lock.
        self._lock = threading.RLock()
        self._staging = threading.Lock()
        self._version_changed()

    # ------------------------------------------------------------------ staging

    def stage(self, upload: Upload, options: StageOptions, label: str) -> tuple[dict[str, Any], bool]:
        """Check an upload and derive its engine weights.

        Returns:
            The account of the staged set, and whether it is new.

        Raises:
            ServeError: too many are staged.
            WeightsError, RefitRejectedError, EngineError: it cannot be staged; nothing changed.
        """
        with self._staging, work_span("refit.stage", model=self._model, bytes=upload.nbytes) as trace:
            with self._lock:
                self.expire()
                identifier = options.identity(upload.sha256, self._engine.version)
                trace("id", identifier)
                known = self._table.find(identifier)
                if known is not None and self._stands(known):
                    trace("result", "known")
                    return known.to_json(), False
                self._table.require_room()
            self._events.publish("staging", id=identifier, sha256=upload.sha256, bytes=upload.nbytes, label=label)
            with self._told("rejected", trace, id=identifier, label=label):
                source = open_upload(upload, label)
                try:
                    staged = self._engine.stage(source, options.check_options())
                finally:
                    source.close()
            entry = make_entry(
                identifier,
                staged,
                sha256=upload.sha256,
                nbytes=upload.nbytes,
                label=label,
                options=options,
                lifetime=self._lifetime,
            )
            with self._lock:
                if self._memory is not None:
                    self._memory.staged(identifier, entry.summary)
                self._table.add(entry)
                trace("result", "staged")
                trace("changed", len(entry.summary["changed"]))
                self._time(staged.seconds)
                self._count()
                self._events.publish("staged", **_short(entry))
                return entry.to_json(), True

    def _stands(self, entry: Entry) -> bool:
        """Whether staging the same again would be in vain: it is staged still, or it is what answers now."""
        if entry.state is State.STAGED:
            return True
        return entry.committed is not None and entry.committed["version"] == self._engine.version

    def staged(self, identifier: str) -> dict[str, Any]:
        """One staged set; VersionError if it is not known."""
        with self._lock:
            self.expire()
            return self._table.get(identifier).to_json()

    def canary(self, identifier: str, canary: Canary) -> dict[str, Any]:
        """Run golden inputs on a staged set.

        Raises:
            CanaryError: the outputs are not what was expected, or not finite; the set stays staged.
            VersionError, RefitError: there is no such set, or it is no longer staged.
        """
        with self._lock:
            entry = self._table.get(identifier)
            staged = self._require_staged(entry, "try a canary on")
        with work_span("refit.canary", model=self._model, id=identifier) as trace:
            try:
                result = staged.canary(canary)
            except CanaryError as error:
                trace("result", "refused")
                self._metrics.canaries.labels(self._model, "refused").inc()
                entry.canaries.append({"ok": False, "error": str(error)})
                self._events.publish("canary", id=identifier, ok=False, error=str(error))
                raise
            trace("result", "passed")
        self._metrics.canaries.labels(self._model, "passed").inc()
        self._metrics.canary_seconds.labels(self._model).observe(result.seconds)
        account = _canary_json(result)
        entry.canaries.append(account)
        self._events.publish("canary", id=identifier, **account)
        return account

    def commit(self, identifier: str, *, require_canary: bool = False) -> dict[str, Any]:
        """Publish a staged set; again, the same account.

        Raises:
            RefitError: it was discarded, it is partial and its base was replaced, or no canary passed where one is
                required.
            StoreError: the durable store could not take it; nothing was published.
        """
        with self._lock, work_span("refit.commit", model=self._model, id=identifier) as trace:
            self.expire()
            entry = self._table.get(identifier)
            if entry.committed is not None:
                trace("result", "repeated")
                return {**entry.committed, "repeated": True, "current": self._engine.version}
            staged = self._require_staged(entry, "commit")
            if require_canary and not any(canary["ok"] for canary in entry.canaries):
                raise RefitError("no canary has passed on it", hint="Run one, or commit without asking for it")
            with self._told("failed", trace, id=identifier), self._remembered(identifier):
                report = staged.commit()
            entry.staged = None
            entry.committed = _report_json(report)
            if self._memory is not None:
                # It is committed, whatever the disk says now; the next start finds out from the version.
                with contextlib.suppress(WriteError):
                    self._memory.committed(identifier, entry.committed)
            trace("result", "committed")
            trace("version", report.version)
            trace("previous", report.previous)
            self._time({"commit": report.seconds.get("commit", 0.0)})
            self._done("committed")
            self._events.publish("committed", id=identifier, **entry.committed)
            return {**entry.committed, "repeated": False, "current": report.version}

    @contextlib.contextmanager
    def _remembered(self, identifier: str) -> Iterator[None]:
        """Write down that a commit begins, and that it failed if it does."""
        if self._memory is None:
            yield
            return
        newest = max((info.number for info in self._engine.versions), default=0)
        self._memory.committing(identifier, newest)
        try:
            yield
        except OnnxRefitError:
            with contextlib.suppress(WriteError):
                self._memory.not_committed(identifier)
            raise

    def _account_of(self, version: int) -> dict[str, Any] | None:
        """What can still be said of the commit that made a version."""
        for info in self._engine.versions:
            if info.number == version:
                return {"version": version, "previous": info.parent, "source": info.source, "seconds": {}}
        return None

    def discard(self, identifier: str) -> dict[str, Any]:
        """Drop a staged set; again, nothing. RefitError if it was committed."""
        with self._lock:
            entry = self._table.get(identifier)
            if entry.committed is not None:
                raise RefitError(f"it was committed as version {entry.committed['version']}", hint="Roll back instead")
            if entry.staged is not None:
                self._discard(entry, "discarded")
            return entry.to_json(report=False)

    def expire(self) -> None:
        """Discard what was staged and forgotten."""
        with self._lock:
            for entry in self._table.expired():
                self._discard(entry, "expired")

    def close(self) -> None:
        """Discard everything staged."""
        with self._lock:
            for entry in self._table.staged:
                self._discard(entry, "discarded")

    def _discard(self, entry: Entry, why: str) -> None:
        if entry.staged is not None:
            entry.staged.discard()
            entry.staged = None
        self._done(why)
        self._events.publish(why, id=entry.id)

    def _require_staged(self, entry: Entry, verb: str) -> Any:
        if entry.staged is None:
            raise RefitError(f"cannot {verb} a refit that was {entry.state.value}", hint="Stage the weights again")
        return entry.staged

    # ------------------------------------------------------------------ versions

    def rollback(self, to: int | None) -> dict[str, Any]:
        """Publish an earlier version again; asking for the one that answers already does nothing.

        Raises:
            VersionError: there is none, or it is no longer held.
        """
        with self._lock, work_span("refit.rollback", model=self._model) as trace:
            before = self._engine.version
            if to == before:
                trace("result", "repeated")
                return {"version": before, "previous": before, "repeated": True}
            with self._told("failed", trace):
                report = self._engine.rollback(to)
            trace("result", "rolled_back")
            trace("version", report.version)
            trace("previous", report.previous)
            self._done("rolled_back")
            self._events.publish("rolled_back", version=report.version, previous=report.previous)
            return {"version": report.version, "previous": report.previous, "repeated": False}

    def delete(self, version: int) -> None:
        """Free a held version that does not answer.

        Raises:
            VersionError: it is not held.
            ServeError: it answers requests.
        """
        with self._lock:
            if version == self._engine.version:
                raise ServeError(409, f"version {version} answers requests", hint="Roll back to another one first")
            self._engine.forget(version)
            self._version_changed()
            self._events.publish("deleted", version=version)

    def version(self, number: int) -> dict[str, Any]:
        """One version; VersionError if there never was one."""
        for info in self._engine.versions:
            if info.number == number:
                return {**_version_json(info), "changed": None if info.changed is None else sorted(info.changed)}
        raise VersionError(f"version {number} does not exist")

    def diff(self, before: int, after: int) -> dict[str, Any]:
        """How far each weight moved between two held versions; VersionError if one is not held."""
        old, new = self._engine.weights(before), self._engine.weights(after)
        weights = []
        for name, spec in self._engine.refittable.items():
            moved = measure(new.read(name), old.read(name))
            change = moved.largest_relative_change
            weights.append(
                {
                    "name": name,
                    "shape": list(spec.shape or ()),
                    "dtype": spec.dtype,
                    "bytes": spec.nbytes,
                    "changed_bytes": moved.changed_bytes,
                    "norm": moved.norm if abs(moved.norm) < float("inf") else None,
                    # Infinite where the old tensor was all zeros, which JSON cannot say.
                    "largest_relative_change": change if change is not None and change < float("inf") else None,
                }
            )
        return {"from": before, "to": after, "weights": weights}

    def status(self) -> dict[str, Any]:
        """The versions (the newest ones) and what is staged."""
        with self._lock:
            self.expire()
            staged = [entry.to_json(report=False) for entry in self._table.staged]
        versions = self._engine.versions
        return {
            "model": self._model,
            "version": self._engine.version,
            "versions": [_version_json(info) for info in versions[-_LISTED:]],
            "staged": staged,
            "weights": len(self._engine.refittable),
            "weight_bytes": self._engine.plan.weight_bytes,
            "plan": self._engine.plan.fingerprint,
        }

    # ------------------------------------------------------------------ telling

    @contextlib.contextmanager
    def _told(self, kind: str, trace: SetAttribute, **data: Any) -> Iterator[None]:
        """Count a failure, publish it as an event and as the span's result, then let it pass."""
        try:
            yield
        except OnnxRefitError as error:
            result = "rejected" if isinstance(error, RefitRejectedError) else "failed"
            trace("result", result)
            self._metrics.refits.labels(self._model, result).inc()
            self._events.publish(kind, **data, error=str(error))
            raise

    def _time(self, seconds: Mapping[str, float]) -> None:
        for stage, duration in seconds.items():
            self._metrics.refit_seconds.labels(self._model, stage).observe(duration)

    def _done(self, result: str) -> None:
        self._metrics.refits.labels(self._model, result).inc()
        self._count()
        self._version_changed()

    def _count(self) -> None:
        self._metrics.staged.labels(self._model).set(len(self._table.staged))

    def _version_changed(self) -> None:
        self._metrics.version.labels(self._model).set(self._engine.version)
        held = {str(info.number) for info in self._engine.versions if info.held}
        self._metrics.forget_versions(self._model, held)


def _short(entry: Entry) -> dict[str, Any]:
    account = entry.to_json(report=False)
    account["changed"] = len(account["changed"])
    return account


def _canary_json(result: CanaryResult) -> dict[str, Any]:
    return {"ok": True, "seconds": result.seconds, "worst": dict(result.worst)}


def _report_json(report: RefitReport) -> dict[str, Any]:
    return {
        "version": report.version,
        "previous": report.previous,
        "source": report.source,
        "changed": len(report.changed),
        "unchanged": len(report.unchanged),
        "bytes": report.nbytes,
        "seconds": dict(report.seconds),
    }


def _version_json(info: VersionInfo) -> dict[str, Any]:
    return {
        "number": info.number,
        # A file of the server's is shown without where it lies.
        "source": Path(info.source).name if info.source.startswith("/") else info.source,
        "parent": info.parent,
        "changed": None if info.changed is None else len(info.changed),
        "committed": info.committed.isoformat(),
        "bytes": info.nbytes,
        "shared_bytes": info.shared_nbytes,
        "current": info.current,
        "held": info.held,
    }
