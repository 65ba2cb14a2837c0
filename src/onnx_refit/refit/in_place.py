"""Refits from tensors on the engine's own device: checked and derived there, without a copy on the host.

What can be looked at once is looked at once: the names, dtypes, shapes and places of tensors are remembered, so that a
trainer that gives the same tensors again and again pays for their values only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any, TypeAlias

from onnx_refit.engine.protocol import Backend, InPlace, Taken
from onnx_refit.errors import RefitError
from onnx_refit.plan.compiled import SourceWeight
from onnx_refit.refit.bound import BoundWeights
from onnx_refit.refit.candidate import Candidate
from onnx_refit.refit.check import Casting, CheckOptions, check
from onnx_refit.refit.check_report import CheckReport, RejectReason
from onnx_refit.refit.constants import Fixed, refuse_changed_constants
from onnx_refit.refit.quick import frozen
from onnx_refit.refit.retain import Retainer
from onnx_refit.refit.timing import timed
from onnx_refit.refit.unchanged import Elsewhere, Sampler
from onnx_refit.refit.versions import Version
from onnx_refit.tensors import Array, TensorSpec
from onnx_refit.weights.origin import origin_of
from onnx_refit.weights.provenance.expression import tensors_of
from onnx_refit.weights.scan import same_bits
from onnx_refit.weights.source import WeightSource

_RECENT = 4  # sets of tensors that are remembered: a trainer may have two that take turns
_ACCEPTED = (RejectReason.DTYPE, "")  # the reason is not looked at where there is no refusal


@dataclass(frozen=True)
class Known:
    """Tensors that were looked at, and what the check says of them whatever their values are.

    Attributes:
        keys: the names of all tensors given, in their order.
        pick: gives those that weights are made of, from a mapping of all.
        attached: what the backend knows of them.
        names: the weights they give.
        options: how strict the check was.
        report: what it says.
        source: where they came from, in words.
        steady: whether it says so of any values.
    """

    keys: Sequence[str]
    pick: Callable[[Mapping[str, object]], Sequence[object]]
    attached: Any
    names: frozenset[str]
    options: CheckOptions
    report: CheckReport
    source: str
    steady: bool


Pending: TypeAlias = tuple[Candidate, Callable[[], Candidate | None]]
"""A candidate that a device is making, and what waits for it, once, before another one is begun.

The candidate is what comes of it if all weights change, as is likely; it is good for nothing before it is waited for.
Waiting gives the candidate, the same object where all weights change; None where something about the weights has to be
said, or where the tensors are others.
"""


class InPlaceRefit:
    """Makes candidates of weights that lie on the backend's device; leaves all others alone.

    Args:
        backend: the backend.
        sources: every refittable weight.
        kept: those that the engine cannot give back.
        fixed: what checkpoints may repeat and cannot change.
        retainer: keeps the former.
        sampler: takes samples.
    """

    def __init__(
        self,
        backend: Backend,
        sources: Sequence[SourceWeight],
        kept: Collection[str],
        fixed: Fixed,
        retainer: Retainer,
        sampler: Sampler,
    ) -> None:
        self._device: InPlace | None = backend if isinstance(backend, InPlace) else None
        self._sources = sources
        self._specs = {source.spec.name: source.spec for source in sources}
        self._kept = kept
        self._fixed = fixed
        self._retainer = retainer
        self._positions = {name: sampler.positions(name, spec.size) for name, spec in self._specs.items()}
        self._sampler = sampler
        self._recent: list[Known] = []

    def again(
        self, source: object, options: CheckOptions | None, base: Version, seconds: dict[str, float]
    ) -> Pending | None:
        """The candidate of tensors that were looked at before, on its way; None where these are others.

        Args:
            source: what the caller gave.
            options: how strict the check is; None as when they were looked at, or as by default.
            base: the current version.
            seconds: takes the seconds of each stage.

        Raises:
            EngineError: the derivation failed.
        """
        if self._device is None:
            return None
        if type(source) is BoundWeights:
            known = source.known
            if source.owner is not self or not (options is None or options == known.options):
                return None
            return self._begin(known, source.tensors, base, seconds)
        started = time.perf_counter()
        found = self._recognised(source, options)
        seconds["open"] = time.perf_counter() - started
        return None if found is None else self._begin(*found, base, seconds)

    def _recognised(self, source: object, options: CheckOptions | None) -> tuple[Known, Sequence[object]] | None:
        if not isinstance(source, Mapping):
            return None
        keys: list[str] | None = None
        for turn, known in enumerate(self._recent):
            if not (options is known.options or (_DEFAULT if options is None else options) == known.options):
                continue
            keys = list(source) if keys is None else keys
            if keys != known.keys:
                continue
            tensors = known.pick(source)
            if len(self._recent) == 1 or known.attached.begins(tensors):
                if turn:
                    self._recent.insert(0, self._recent.pop(turn))
                return known, tensors
        return None

    def _remember(self, known: Known, tensors: Sequence[object]) -> None:
        """These tensors first, instead of what was known of the place they lie at, and a few others."""
        others = [one for one in self._recent if one.keys != known.keys or not one.attached.begins(tensors)]
        self._recent = [known, *others[: _RECENT - 1]]

    def bind(self, given: WeightSource, options: CheckOptions, source: Any) -> BoundWeights:
        """Weights looked at once, for refits again and again.

        Args:
            given: the weights, in the plan's names.
            options: how strict the check is.
            source: what the caller gave.

        Raises:
            RefitError: that cannot be done on the device.
        """
        known = self._look(given, options)
        origin = origin_of(given)
        if known is None or origin is None or not known.steady:
            raise RefitError(
                "these weights cannot be bound to the engine's device",
                hint="Bind tensors that lie on it and that the check accepts; refit says what it does not accept",
            )
        tensors = known.pick(origin.tensors)
        known.attached.hold(tensors)
        return BoundWeights(origin.tensors, source, known, tensors, self)

    def candidate(
        self, base: Version, given: WeightSource, options: CheckOptions, seconds: dict[str, float]
    ) -> Candidate | None:
        """The candidate; None where the weights do not lie there, or where something about them has to be said.

        Args:
            base: the current version.
            given: the weights, in the plan's names.
            options: how strict the check is; one that compares or measures reads weights on the host.
            seconds: takes the seconds of each stage.

        Raises:
            EngineError: the derivation failed.
        """
        with timed(seconds, "check"):
            known = self._look(given, options)
            origin = None if known is None else origin_of(given)
        if known is None or origin is None:
            return None
        tensors = known.pick(origin.tensors)
        pending = self._begin(known, tensors, base, seconds)
        found = None if pending is None else pending[1]()
        if found is not None and known.steady:
            self._remember(known, tensors)
        return found

    def _look(self, given: WeightSource, options: CheckOptions) -> Known | None:
        """Look at tensors without their values; None where the host has to."""
        device, origin = self._device, origin_of(given)
        if device is None or origin is None or options.compare or options.measure:
            return None
        parts = {name: part for name, part in origin.parts.items() if name in self._specs}
        used = list(dict.fromkeys(n for name in self._specs if name in parts for n in tensors_of(parts[name])))
        if not used:
            return None
        ordered = {name: parts[name] for name in self._specs if name in parts}
        attached = device.attach(ordered, origin.tensors, rounding=options.casting is Casting.ROUND)
        if attached is None:
            return None
        # The check reads nothing: what it would find in values, the device finds.
        report, _ = check(self._sources, given, options=options, finite_later=True, load=_as_declared)
        if not report.ok or len(report.accepted) < len(parts):
            return None
        told = any(
            unused.name in self._fixed.constants or unused.name in self._fixed.derived for unused in report.unused
        )
        report = refuse_changed_constants(report, given, self._fixed)
        if not report.ok:
            return None
        pick = itemgetter(*used) if len(used) > 1 else _only(used[0])
        return Known(
            keys=list(origin.tensors),
            pick=pick,
            attached=attached,
            names=frozenset(parts),
            options=options,
            report=report,
            source=given.description,
            steady=origin.steady and not told,
        )

    def _begin(
        self, known: Known, tensors: Sequence[object], base: Version, seconds: dict[str, float]
    ) -> Pending | None:
        assert self._device is not None
        started, samples = time.perf_counter(), base.samples
        marks = samples.marks if type(samples) is Elsewhere else self._sampler.elements(samples)
        look = not known.options.allow_nonfinite
        taken = self._device.take(
            known.attached, tensors, base.weights, base.retained.holder, self._positions, marks, look
        )
        if taken is None:
            return None
        # All that does not depend on what the device finds is done while it works; that all weights change is likely.
        fields = {
            "weights": taken.weights,
            "retained": self._retainer.adopt(taken.kept, base.retained) if self._kept else base.retained,
            "samples": Elsewhere(taken.marks, self._sampler),
            "base": base.number,
            "full": len(known.names) == len(self._specs),
            "changed": known.names,
            "source": known.source,
            "check": known.report,
        }
        candidate = frozen(Candidate, fields)
        return candidate, partial(self._settle, candidate, taken, base, started, seconds)

    def _settle(
        self, candidate: Candidate, taken: Taken, base: Version, started: float, seconds: dict[str, float]
    ) -> Candidate | None:
        alike = taken.settle()
        seconds["derive"] = time.perf_counter() - started
        if not alike:
            return None if alike is None else candidate
        changed = candidate.changed - self._equal(taken, alike, base)
        return replace(candidate, changed=changed, full=len(changed) == len(self._specs))

    def _equal(self, taken: Taken, alike: Sequence[str], base: Version) -> frozenset[str]:
        """The weights that have the very bits they have now, among those that may."""
        assert self._device is not None
        kept: Mapping[str, Array] = taken.kept
        # What lies elsewhere by now (on disk) is compared here, and brought nowhere.
        holder = base.retained.holder
        here = {name for name in alike if name in self._kept and type(holder(name)) is not type(kept)}
        there = [name for name in alike if name not in here] if here else alike
        equal = self._device.equal(there, (taken.weights, lambda name: kept), (base.weights, holder))
        return equal | {name for name in here if same_bits(kept[name], base.retained[name])}


_DEFAULT = CheckOptions()


def _as_declared(spec: TensorSpec, stored: TensorSpec) -> tuple[Any, tuple[RejectReason, str]]:
    return spec, _ACCEPTED


def _only(name: str) -> Callable[[Mapping[str, object]], Sequence[object]]:
    return lambda tensors: (tensors[name],)
