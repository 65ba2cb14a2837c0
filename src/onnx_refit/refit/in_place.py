"""Refits from tensors on the engine's own device: checked and derived there, without a copy on the host."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from onnx_refit.engine.protocol import Backend, InPlace
from onnx_refit.refit.check import CheckOptions
from onnx_refit.refit.check_report import AsDeclared, CheckReport
from onnx_refit.refit.retain import Retainer
from onnx_refit.refit.timing import timed
from onnx_refit.refit.transaction import Candidate
from onnx_refit.refit.unchanged import Sampler, Samples
from onnx_refit.refit.versions import Version
from onnx_refit.tensors import Array, TensorSpec
from onnx_refit.weights.scan import same_bits
from onnx_refit.weights.source import WeightSource
from onnx_refit.weights.sources.arrays import ArraysSource, to_array


class InPlaceRefit:
    """Makes candidates of whole sets of weights that lie on the backend's device; leaves all others alone.

    Args:
        backend: the backend.
        specs: every refittable weight.
        kept: those that the engine cannot give back.
        retainer: keeps these.
        sampler: takes samples.
    """

    def __init__(
        self,
        backend: Backend,
        specs: Mapping[str, TensorSpec],
        kept: Collection[str],
        retainer: Retainer,
        sampler: Sampler,
    ) -> None:
        self._backend = backend
        self._in_place: InPlace | None = backend if isinstance(backend, InPlace) else None
        self._specs = specs
        self._kept = kept
        self._retainer = retainer
        self._positions = {name: sampler.positions(name, spec.size) for name, spec in specs.items()}
        self._sampler = sampler

    def candidate(
        self,
        base: Version,
        current: Callable[[str], Array],
        given: WeightSource,
        options: CheckOptions,
        seconds: dict[str, float],
    ) -> Candidate | None:
        """The candidate; None where the weights do not lie there, or where something about them has to be said.

        Args:
            base: the current version.
            current: reads a weight of it.
            given: the weights.
            options: how strict the check is; one that compares or measures reads weights on the host.
            seconds: takes the seconds of each stage.

        Raises:
            EngineError: the derivation failed.
        """
        device = self._in_place
        if device is None or type(given) is not ArraysSource or options.compare or options.measure:
            return None
        with timed(seconds, "check"):
            values = given.values
            if not device.holds(values):
                return None
            seen = device.look(values, self._positions)
            if not options.allow_nonfinite and not all(one.finite for one in seen.values()):
                return None
        with timed(seconds, "compare"):
            samples = self._sampler.assemble({name: one.elements for name, one in seen.items()})
            equal = self._equal(device, base, values, samples, current)
        changed = frozenset(values) - equal
        with timed(seconds, "derive"):
            weights = self._backend.derive(values)  # type: ignore[arg-type]
            retained = self._retainer.adopt(device.put_aside(values, self._kept))
        return Candidate(
            weights=weights,
            retained=retained,
            samples=samples,
            base=base.number,
            full=not equal,
            changed=changed,
            source=given.description,
            check=CheckReport(given.description, options.partial, AsDeclared(list(self._specs.values())), (), (), ()),
        )

    def _equal(
        self,
        device: InPlace,
        base: Version,
        values: Mapping[str, object],
        samples: Samples,
        current: Callable[[str], Array],
    ) -> frozenset[str]:
        """The weights that have the very bits they have now."""
        found = []
        for name in self._sampler.alike(values, samples, base.samples):
            if name in self._kept:
                equal = same_bits(to_array(values[name], where=name), current(name))
            else:
                equal = device.equals(base.weights, name, values[name])
            if equal:
                found.append(name)
        return frozenset(found)
