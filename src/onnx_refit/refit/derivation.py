"""From a checkpoint to a weight set: check, leave out what does not change, derive the rest."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime

import numpy as np

from onnx_refit.engine.protocol import Backend, InPlace
from onnx_refit.plan.compiled import CompiledModel, Decision, Verdict
from onnx_refit.refit.candidate import Candidate
from onnx_refit.refit.check import CheckOptions, check
from onnx_refit.refit.check_report import CheckReport
from onnx_refit.refit.constants import floating_constants, refuse_changed_constants
from onnx_refit.refit.declared import Declared
from onnx_refit.refit.in_place import InPlaceRefit
from onnx_refit.refit.inspection import Inspection
from onnx_refit.refit.packet import Packet
from onnx_refit.refit.quick import frozen
from onnx_refit.refit.retain import Retainer
from onnx_refit.refit.routine import Routine
from onnx_refit.refit.timing import timed
from onnx_refit.refit.unchanged import Sampler, unchanged
from onnx_refit.refit.versions import Version
from onnx_refit.refit.view import VersionWeights
from onnx_refit.tensors import Array
from onnx_refit.weights.finite import not_finite
from onnx_refit.weights.source import WeightSource

_FEW = 64  # of a model's bytes as many times as these: not worth being shared with the version before


class Derivation:
    """Makes versions and candidates of one backend; publishes nothing.

    Args:
        backend: the backend.
        compiled: the model it runs.
        cold: whether what is seldom wanted moves to disk once refits pause.
        renamed: whether what users give has other names than the plan: then no refit is a usual one.
    """

    def __init__(self, backend: Backend, compiled: CompiledModel, *, cold: bool = True, renamed: bool = False) -> None:
        self._backend = backend
        self._sources = compiled.sources
        self._specs = {source.spec.name: source.spec for source in compiled.sources}
        self._every = frozenset(self._specs)
        self._nbytes = sum(spec.nbytes for spec in self._specs.values())
        self._declared = Declared(self._specs.values())
        self._constants = floating_constants(compiled)
        self._kept_names = frozenset(self._specs) - backend.recoverable
        # What is kept comes first, here and there, so that it is copied in one go.
        places = {name: place for place, name in enumerate(backend.neighbours)}
        last = len(places)
        ordered = sorted(
            self._specs.values(), key=lambda spec: (spec.name not in self._kept_names, places.get(spec.name, last))
        )
        self._packet = Packet(ordered, self._declared.roll)
        self._small = frozenset(self._packet.names)
        kept = [spec for spec in ordered if spec.name in self._kept_names]
        kept.sort(key=lambda spec: spec.name not in self._small)
        # Whoever reads the packet meanwhile holds its array, and finds the views of another one or none.
        together = len(self._small & self._kept_names)
        self._retainer = Retainer(kept, disk=cold, together=together, rest=self._packet.clear)
        self._sampler = Sampler(self._packet, self._specs)
        self._on_device = isinstance(backend, InPlace)
        roll = self._declared.roll
        self._routine: Routine | None = None
        if roll is not None and roll.native is not None and not self._on_device and not renamed:
            self._routine = Routine(roll, self._declared.report(), self._packet, self._sampler)
        self.in_place = InPlaceRefit(
            backend, compiled.sources, self._kept_names, self._constants, self._retainer, self._sampler
        )

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Where the source weights are that the engine cannot give back, if not where they should be."""
        reason = self._retainer.warm_because
        if reason is None:
            return ()
        subject = f"{len(self._kept_names)} source weights that engine weights do not hold"
        return (Decision(subject, "move to disk once refits pause", Verdict.REJECTED, reason),)

    def close(self) -> None:
        """Move nothing to disk any more."""
        self._retainer.close()

    def weights_of(self, held: Version | Candidate) -> VersionWeights:
        """The source weights of a version or candidate, read back bit for bit."""
        text = f"version {held.number}" if isinstance(held, Version) else held.source
        return VersionWeights(held.weights, held.retained, self._specs, self._backend, text)

    def version(self, weights: Mapping[str, Array], source: str) -> Version:
        """A whole new version, not yet numbered, from complete weights; EngineError if it cannot be derived."""
        return Version(
            number=0,
            weights=self._backend.derive(weights),
            retained=self._retainer.retain(weights, None),
            samples=self._sampler.take({n: np.ascontiguousarray(weights[n]) for n in self._specs}, None, None),
            source=source,
            parent=None,
            changed=None,
            committed=datetime.now(UTC),
        )

    def _check(
        self, given: WeightSource, current: VersionWeights, options: CheckOptions, *, finite_later: bool
    ) -> tuple[CheckReport, dict[str, Array]]:
        """The report and the arrays; RefitRejectedError with everything that is wrong if anything is."""
        plain = self._declared.check(given, options) if finite_later else None
        if plain is not None:
            return plain
        report, arrays = check(self._sources, given, current=current.read, options=options, finite_later=finite_later)
        report = refuse_changed_constants(report, given, self._constants)
        if finite_later and not report.ok:
            return self._check(given, current, options, finite_later=False)  # the report names what is not finite too
        report.raise_if_rejected()
        return report, arrays

    def usual(
        self, base: Version, source: object, options: CheckOptions | None, seconds: dict[str, float]
    ) -> Candidate | None:
        """The candidate of a refit that gives everything as declared; None where ``candidate`` has to look closer.

        Args:
            base: the current version.
            source: what the caller gave, in the plan's names.
            options: how strict the check is.
            seconds: takes the seconds of each stage.

        Raises:
            EngineError: the derivation failed.
        """
        if self._routine is None:
            return None
        began = time.perf_counter()
        seen = self._routine.see(source, options, base.samples)
        if seen is None:
            return None
        checked = time.perf_counter()
        keeping = self._retainer.keep(self._every, None)
        if keeping.together is not None:
            np.copyto(keeping.together, seen.joined[: keeping.together.size])
        inspection = Inspection(seen.arrays, keeping.targets, look=True, lasting=seen.views)
        seen.arrays.update(seen.views)
        weights = self._backend.derive(seen.arrays, inspector=inspection)
        if not inspection.finish():
            return None  # what is not finite is said by those who look closer
        fields = {"weights": weights, "retained": keeping.finish(), "samples": seen.samples, "base": base.number}
        fields |= {"full": True, "changed": self._every, "source": seen.check.checkpoint, "check": seen.check}
        seconds["check"], seconds["derive"] = checked - began, time.perf_counter() - checked
        return frozen(Candidate, fields)

    def candidate(
        self, base: Version, given: WeightSource, options: CheckOptions, seconds: dict[str, float]
    ) -> Candidate:
        """Check weights against the plan and derive a weight set from them.

        Args:
            base: the version that keeps what is not given.
            given: the weights, in the plan's names.
            options: how strict the check is.
            seconds: takes the seconds of each stage.

        Raises:
            RefitRejectedError: the check refused.
            EngineError: the derivation failed.
        """
        current = self.weights_of(base)
        found = self.in_place.candidate(base, given, options, seconds) if self._on_device else None
        if found is not None:
            return found
        look = not options.allow_nonfinite
        began = time.perf_counter()
        report, arrays = self._check(given, current, options, finite_later=True)
        checked = time.perf_counter()
        every = len(arrays) == len(self._specs)
        finite, joined = True, None
        if every or self._small <= arrays.keys():
            joined, finite = self._packet.join(arrays)
        equal, samples = unchanged(self._sampler, arrays, joined, base.samples, current.read)
        full = every and not equal
        changed = self._every if full else frozenset(arrays) - equal
        # A few bytes that stay as they are take less time to write again than to leave out.
        whole = full or (every and sum(self._specs[name].nbytes for name in equal) * _FEW <= self._nbytes)
        if equal and not whole:
            finite = not (look and not_finite([arrays[name] for name in equal]))
            arrays = {name: array for name, array in arrays.items() if name not in equal}
        compared = time.perf_counter()
        keeping = self._retainer.keep(changed, None if whole else base.retained)
        if whole and joined is not None:
            if keeping.together is not None:
                np.copyto(keeping.together, joined[: keeping.together.size])
            lasting = self._packet.views
            inspection = Inspection(arrays, keeping.targets, look=look, lasting=lasting)
            arrays.update(lasting)
            weights = self._backend.derive(arrays, inspector=inspection)
        else:
            inspection = Inspection(arrays, keeping.targets, look=look)
            required = self._backend.required(changed)
            needed = {name: arrays[name] if name in arrays else current.read(name) for name in required}
            weights = self._backend.derive(needed, base.weights, changed, inspection)
        finite = inspection.finish() and (finite or not look)
        retained = keeping.finish()
        seconds["check"], seconds["compare"] = checked - began, compared - checked
        seconds["derive"] = time.perf_counter() - compared
        if not finite:
            del weights, retained, keeping, inspection  # an error keeps what its frames hold
            with timed(seconds, "check"):
                self._check(given, current, options, finite_later=False)
            return self.candidate(base, given, options, seconds)  # somebody wrote to the arrays meanwhile
        return Candidate(
            weights=weights,
            retained=retained,
            samples=samples,
            base=base.number,
            full=full,
            changed=changed,
            source=given.description,
            check=report,
        )
