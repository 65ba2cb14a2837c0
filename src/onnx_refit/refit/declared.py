"""The check of weights that are as the model declares them, which is what most refits give."""

from __future__ import annotations

from collections.abc import Iterable

from onnx_refit.moves.library import load
from onnx_refit.moves.roll import Roll
from onnx_refit.refit.check import CheckOptions
from onnx_refit.refit.check_report import AsDeclared, CheckReport, NotGiven
from onnx_refit.tensors import Array, TensorSpec
from onnx_refit.weights.source import WeightSource
from onnx_refit.weights.sources.arrays import MAPPING, ArraysSource, form_of


class Declared:
    """The refittable weights of a model, with what is looked up at each refit.

    Args:
        specs: their names, dtypes and static shapes, in the model's order.

    Attributes:
        roll: all of them; None where some take a closer look.
    """

    def __init__(self, specs: Iterable[TensorSpec]) -> None:
        self._specs = tuple(specs)
        forms = [form_of(spec) for spec in self._specs]
        known = [form for form in forms if form is not None]
        self.roll = Roll(known, load()) if len(known) == len(forms) else None
        self._named = {spec.name: spec for spec in self._specs}
        self._places = {spec.name: place for place, spec in enumerate(self._specs)}

    def report(self) -> CheckReport:
        """What the check says of a mapping that has all of them, as they are declared."""
        return CheckReport(MAPPING, False, AsDeclared(self._specs), (), (), ())

    def check(self, weights: WeightSource, options: CheckOptions) -> tuple[CheckReport, dict[str, Array]] | None:
        """What ``refit.check.check`` finds out, at the price of looking at the tensors given and at no others.

        Whether they are finite is left to the caller.

        Returns:
            The report and the arrays to apply, in the model's order; None where there is more to say than that these
            are arrays of the declared dtypes and shapes under the model's own names: all of them, or in a partial
            refit at least one.
        """
        if type(weights) is not ArraysSource or options.compare or options.measure:
            return None
        count = len(weights.values)
        if count == len(self._specs) or not options.partial:
            called = None if self.roll is None else weights.plain(self.roll)
            if called is None:
                return None
            return CheckReport(weights.description, options.partial, AsDeclared(self._specs), (), (), ()), called
        found = weights.plain_part(self._named) if count else None
        if found is None:
            return None
        arrays = {name: found[name] for name in sorted(found, key=self._places.__getitem__)}
        accepted = AsDeclared([self._named[name] for name in arrays])
        missing = NotGiven(self._specs, frozenset(arrays))
        return CheckReport(weights.description, options.partial, accepted, (), missing, ()), arrays
