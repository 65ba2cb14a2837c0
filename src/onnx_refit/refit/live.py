"""The engine as users hold it: a backend, its versions, and the transaction that changes them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType

from onnx_refit.engine.protocol import Backend, FullSpeed, WeightSet
from onnx_refit.errors import EngineError, InputError, RefitError
from onnx_refit.model.vocabulary import apply_maps
from onnx_refit.plan.compiled import Decision
from onnx_refit.plan.plan import Plan
from onnx_refit.refit.bound import BoundWeights, unbound
from onnx_refit.refit.canary import Canary
from onnx_refit.refit.candidate import Candidate
from onnx_refit.refit.check import CheckOptions
from onnx_refit.refit.derivation import Derivation
from onnx_refit.refit.earlier import Earlier
from onnx_refit.refit.inputs import InputChecker
from onnx_refit.refit.ledger import Ledger, MemoryLedger, source_of
from onnx_refit.refit.publishing import Publisher, Ready
from onnx_refit.refit.report import Account, RefitReport
from onnx_refit.refit.timing import timed
from onnx_refit.refit.transaction import Staged
from onnx_refit.refit.versions import VersionInfo, VersionList, VersionTable
from onnx_refit.refit.view import VersionWeights
from onnx_refit.tensors import Array, TensorSpec
from onnx_refit.weights.fingerprint import fingerprint
from onnx_refit.weights.mapped_view import MappedView
from onnx_refit.weights.open import WeightsLike, open_weights
from onnx_refit.weights.source import WeightSource

NOTHING_TO_REFIT = "Name the tensors to refit at build time (refittable=...)"


class Outputs(dict[str, Array]):
    """Output name -> array, and which version of the weights answered."""

    version: int


class Engine:
    """A loaded plan: runs inferences, and takes new weights while it does.

    Any number of threads may call ``run`` while others refit; each inference uses exactly one version. Refits are
    serialised. Use as a context manager, or call ``close``.

    Args:
        plan: the plan.
        backend: a backend made for it.
        weights: the weights of the first version (source name -> array).
        source: where these came from, in words.
        keep: how many versions to hold for rollback and ``run(version=…)``, the current one included; at least 1.
        ledger: who numbers versions and remembers them; None is the engine's own memory.
        cold: whether source weights that only a later partial refit, diff or adapter wants move to disk once refits
            pause.
    """

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        weights: Mapping[str, Array],
        *,
        source: str = "plan",
        keep: int = 2,
        ledger: Ledger | None = None,
        cold: bool = True,
    ) -> None:
        if keep < 1:
            raise EngineError(f"keep must be at least 1, not {keep}")
        self._plan = plan
        self._backend = backend
        self._derivation = Derivation(backend, plan.compiled, cold=cold, renamed=plan.names is not None)
        self._check_inputs = InputChecker(backend.inputs, plan.preprocessors)
        # One guards what is published; the other lets one refit at a time be staged, which may take long: a rollback
        # does not wait for it. Taken in this order: staging, lock.
        self._lock = threading.RLock()
        self._staging = threading.RLock()
        self._closed = False
        self._ledger = ledger if ledger is not None else MemoryLedger()
        first = self._derivation.version(weights, source)
        self._versions = VersionTable(keep, replace(first, number=self._ledger.first(weights, source)))
        self._earlier = Earlier(self._versions, self._ledger, self._derivation, plan.refittable)
        self._publisher = Publisher(self._versions, self._ledger, self._derivation, Account(plan.refittable))

    # ------------------------------------------------------------------ what it is

    @property
    def plan(self) -> Plan:
        """The plan it was loaded from."""
        return self._plan

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The engine's inputs, after preprocessing."""
        return tuple(self._backend.inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The engine's outputs."""
        return tuple(self._backend.outputs)

    @property
    def refittable(self) -> Mapping[str, TensorSpec]:
        """Name -> spec of every refittable weight."""
        return self._plan.refittable

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What the compiler and the backend decided, with reasons."""
        return (*self._plan.compiled.decisions, *self._backend.decisions, *self._derivation.decisions)

    @property
    def version(self) -> int:
        """The version that answers now."""
        return self._versions.current.number

    @property
    def versions(self) -> VersionList:
        """The last thousand versions and all stored ones, oldest first.

        Those ``held`` can be run and rolled back to at once; stored ones can be rolled back to.
        """
        with self._lock:
            infos = {info.number: info for info in self._versions.infos()}
            for record in self._ledger.records():
                number, committed = record.number, record.committed  # not when this engine read it
                held = infos.get(number) or VersionInfo.stored(number, source_of(record), record.parent, committed)
                infos[number] = replace(held, committed=committed)
            return VersionList(infos[number] for number in sorted(infos))

    def fingerprint(self, version: int | None = None) -> str:
        """Sha256 (hex) over names, dtypes, shapes and bytes of a version's source weights, at about 1 GB/s.

        Raises:
            VersionError: the version is neither held nor stored.
        """
        return fingerprint(self.weights(version)).value

    @property
    def full_speed(self) -> FullSpeed:
        """When the current version reaches its last tier of speed."""
        return self._versions.current.weights.full_speed

    def weights(self, version: int | None = None) -> WeightSource:
        """The source weights of a version, read back from the engine (or the store) bit for bit.

        Raises:
            VersionError: the version is neither held nor stored.
        """
        if version is not None and not self._versions.holds(version):
            stored = self._ledger.load(version)
            if stored is not None:
                return stored
        held = self._versions.current if version is None else self._versions.get(version)
        return VersionWeights(
            held.weights, held.retained, self._plan.refittable, self._backend, f"version {held.number}"
        )

    # ------------------------------------------------------------------ inference

    def run(
        self, inputs: Mapping[str, object], outputs: Sequence[str] | None = None, *, version: int | None = None
    ) -> Outputs:
        """Run one inference.

        Args:
            inputs: input name -> array of the declared dtype and a fitting shape.
            outputs: names of the outputs wanted; None means all.
            version: which held version answers; None means the current one.

        Returns:
            Output name -> array; its attribute ``version`` says which version answered.

        Raises:
            InputError: an input is missing, unknown, or of another dtype or shape; or an output is unknown.
            VersionError: the version is not held.
            EngineError: the backend failed, or the engine is closed.
        """
        held = self._versions.current if version is None else self._versions.get(version)
        results = Outputs(self.run_on(held.weights, inputs, outputs))
        results.version = held.number
        return results

    def run_on(
        self, weights: WeightSet, inputs: Mapping[str, object], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run one inference with a weight set of this engine's backend (a staged one, say); raises as ``run``."""
        if self._closed:
            raise EngineError("the engine is closed")
        wanted = None if outputs is None else self._wanted(outputs)
        results = self._backend.run(weights, self._check_inputs(inputs), wanted)
        return apply_maps(self._plan.postprocessors, results) if self._plan.postprocessors else results

    def _wanted(self, outputs: Sequence[str]) -> Sequence[str]:
        known = [spec.name for spec in self._backend.outputs]
        for name in outputs:
            if name not in known:
                raise InputError(f"there is no output {name!r}", hint=f"The outputs are {', '.join(known)}")
        return outputs

    # ------------------------------------------------------------------ refit

    def stage(self, source: WeightsLike, options: CheckOptions | None = None, *, partial: bool = False) -> Staged:
        """Check new weights and derive their engine weights; nothing is published.

        Args:
            source: a checkpoint path or URL, a mapping of names to arrays, an ONNX model, or an open WeightSource.
            options: how strict the check is.
            partial: weights that are not given stay as they are (instead of being reported missing); a shorthand for
                ``CheckOptions(partial=True)``.

        Raises:
            WeightsError: the checkpoint cannot be read.
            RefitRejectedError: the check refused; it carries the whole report.
            EngineError: the derivation failed.
            In every case the engine keeps serving the weights it had.
        """
        seconds: dict[str, float] = {}
        return Staged(self, self._candidate(source, options, partial, seconds), seconds)

    def _candidate(
        self, source: WeightsLike, options: CheckOptions | None, partial: bool, seconds: dict[str, float]
    ) -> Candidate:
        options = _partly(options, partial)
        with self._staging:
            self._require_open()
            current = self._versions.current
            if (usual := self._derivation.usual(current, source, options, seconds)) is not None:
                return usual
            pending = self._derivation.in_place.again(source, options, current, seconds)
            found = None if pending is None else pending[1]()
            return self._looked_at(source, options, seconds) if found is None else found

    def _looked_at(self, source: WeightsLike, options: CheckOptions | None, seconds: dict[str, float]) -> Candidate:
        """The candidate of weights that are not those of a refit before; under the lock of staging."""
        plain, options = unbound(source, options)
        with timed(seconds, "open"):
            opened, view = self._open(plain)
        try:
            return self._derivation.candidate(self._versions.current, view, options, seconds)
        finally:
            if opened is not plain:
                opened.close()

    def _open(self, source: WeightsLike) -> tuple[WeightSource, WeightSource]:
        """The weights as they are and in the plan's names; RefitError if the plan has none."""
        if not self._plan.refittable:
            raise RefitError("the plan has no refittable weights", hint=NOTHING_TO_REFIT)
        opened = open_weights(source)
        return opened, opened if self._plan.names is None else MappedView(opened, self._plan.names)

    def bind(self, source: WeightsLike, options: CheckOptions | None = None, *, partial: bool = False) -> BoundWeights:
        """Look once at tensors on the engine's own device, for ``refit`` or ``stage`` from them again and again.

        Tensors that come again in a mapping are recognised anyway; those bound are not given back to the device's
        allocator meanwhile, and a refit starts before they are looked at. Arguments as for ``stage``.

        Raises:
            RefitError: they do not all lie there, or the check refuses them or depends on more than their values.
        """
        chosen = options or CheckOptions()
        with self._staging:
            self._require_open()
            _, view = self._open(source)
            return self._derivation.in_place.bind(view, replace(chosen, partial=chosen.partial or partial), source)

    def refit(
        self,
        source: WeightsLike,
        options: CheckOptions | None = None,
        *,
        partial: bool = False,
        canary: Canary | Mapping[str, object] | None = None,
    ) -> RefitReport:
        """Replace the weights: stage, check, derive, canary (if given), commit.

        Args:
            source: see ``stage``.
            options: see ``stage``.
            partial: see ``stage``.
            canary: golden inputs to run on the staged weights before they are published.

        Raises:
            WeightsError, RefitRejectedError, CanaryError, EngineError: nothing was published; the engine keeps
                serving the weights it had.
        """
        if canary is None:  # then nobody sees it staged
            return self._refit(source, _partly(options, partial) if partial else options)
        with self.stage(source, options, partial=partial) as staged:
            staged.canary(canary)
            return staged.commit()

    def publish(self, staged: Staged) -> RefitReport:
        """Publish a staged refit of this engine; called by ``Staged.commit``, which documents it."""
        return self._publish(staged.candidate, staged.seconds)

    def _refit(self, source: WeightsLike, options: CheckOptions | None) -> RefitReport:
        """Stage and publish at once. Where a device makes the candidate, all else is made while it works."""
        seconds: dict[str, float] = {}
        with self._staging:
            if self._closed:
                self._require_open()
            current = self._versions.current
            if (usual := self._derivation.usual(current, source, options, seconds)) is not None:
                return self._publish(usual, seconds)
            pending = self._derivation.in_place.again(source, options, current, seconds)
            if pending is not None:
                likely, settle = pending
                ready = self._publisher.ready(likely)
                candidate = settle()
                if candidate is not None:
                    return self._publish(candidate, seconds, ready if candidate is likely else None)
            return self._publish(self._looked_at(source, options, seconds), seconds)

    def _publish(self, candidate: Candidate, seconds: dict[str, float], ready: Ready | None = None) -> RefitReport:
        with self._lock:
            if self._closed:
                self._require_open()
            return self._publisher.publish(candidate, seconds, ready)

    def rollback(self, to: int | None = None) -> RefitReport:
        """Publish an earlier version again, with its own number: bit for bit the weights it had.

        Args:
            to: which; None means the one that was current before. A version that is no longer held is derived again
                from the store, if the engine has one.

        Raises:
            VersionError: there is none, or it is neither held nor stored.
            StoreError: the durable store could not take note; the version before still answers.
        """
        seconds: dict[str, float] = {}
        with self._lock:
            self._require_open()
            before = self._versions.current
            with timed(seconds, "derive"):
                target = self._earlier.previous() if to is None else self._earlier.version(to)
            with timed(seconds, "store"):
                self._ledger.rollback(target.number)
            with timed(seconds, "commit"):
                self._versions.publish(target)
        return RefitReport(
            version=target.number,
            previous=before.number,
            source=f"rollback to version {target.number}",
            changed=(),
            unchanged=(),
            nbytes=0,
            seconds=seconds,
            full_speed=target.weights.full_speed,
        )

    def forget(self, version: int) -> None:
        """Free an earlier version, in the store too; inferences that run with it finish.

        Raises:
            VersionError: it is neither held nor stored, or it is the current one.
            StoreError: the durable store could not take note.
        """
        with self._lock:
            self._require_open()
            if self._versions.holds(version) or self._ledger.load(version) is None:
                self._versions.require_earlier(version)
            self._ledger.forget(version)
            if self._versions.holds(version):
                self._versions.forget(version)

    # ------------------------------------------------------------------ end

    def close(self) -> None:
        """Free the engine; running afterwards raises EngineError. Calling it again does nothing."""
        with self._staging, self._lock:
            if not self._closed:
                self._closed = True
                self._derivation.close()
                self._backend.close()
                self._ledger.close()

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed")

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"version {self.version}"
        return f"<Engine on {self._backend.name}, {len(self._plan.refittable)} refittable weights, {state}>"

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _partly(options: CheckOptions | None, partial: bool) -> CheckOptions | None:
    return replace(options or CheckOptions(), partial=True) if partial else options
