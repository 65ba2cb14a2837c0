"""What a commit publishes: made whole before anything is published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onnx_refit.engine.protocol import WeightSet
from onnx_refit.refit.check_report import CheckReport
from onnx_refit.refit.retain import Kept
from onnx_refit.refit.unchanged import Samples


@dataclass(frozen=True)
class Candidate:
    """Everything a commit needs, made before anything is published.

    Attributes:
        weights: the new weight set.
        retained: source weights to keep for later partial refits (what the engine cannot give back).
        samples: a few elements of every source weight (see ``unchanged``).
        base: the version it was derived from.
        full: whether it replaces every weight, so that it does not depend on ``base``.
        changed: names of the source weights that differ from ``base``.
        source: where the weights came from, in words.
        check: the report of the check.
    """

    weights: WeightSet
    retained: Kept
    samples: Samples
    base: int
    full: bool
    changed: frozenset[str]
    source: str
    check: CheckReport

    def fields(self) -> dict[str, Any]:
        """The fields of the version that this becomes, but its number and its time."""
        return {
            "weights": self.weights,
            "retained": self.retained,
            "samples": self.samples,
            "source": self.source,
            "parent": self.base,
            "changed": self.changed,
        }
