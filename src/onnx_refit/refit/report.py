"""What a refit did, as data."""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

from onnx_refit.engine.protocol import FullSpeed
from onnx_refit.refit.candidate import Candidate
from onnx_refit.refit.check_report import CheckReport
from onnx_refit.tensors import TensorSpec

GB = 1e9


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.2f} MB" if nbytes >= 1e5 else f"{nbytes} bytes"


class Others(Sequence[str]):
    """All names but some, listed when looked at: a partial refit takes less time than that would.

    Args:
        names: all names, in order.
        without: those to leave out.
    """

    def __init__(self, names: Sequence[str], without: Collection[str]) -> None:
        self._names = names
        self._without = without

    @cached_property
    def _listed(self) -> tuple[str, ...]:
        return tuple(name for name in self._names if name not in self._without)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._listed[index]

    def __len__(self) -> int:
        return len(self._names) - len(self._without)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._listed == tuple(other)

    def __hash__(self) -> int:
        return hash(self._listed)

    def __repr__(self) -> str:
        return repr(self._listed)


@dataclass(frozen=True)
class RefitReport:
    """The account of one committed refit or rollback.

    Attributes:
        version: the version that answers now.
        previous: the version that answered before.
        source: where the weights came from, in words.
        changed: names of the source weights that were replaced.
        unchanged: names of those that stayed as they were (not given in a partial refit, or found equal).
        nbytes: bytes of the source weights that were replaced.
        seconds: stage ("open", "check", "compare", "derive", "canary", "commit") -> seconds spent in it.
        full_speed: when the new version reaches its last tier of speed; ``report.full_speed.wait()``.
        check: the full check; None for a rollback.
    """

    version: int
    previous: int
    source: str
    changed: tuple[str, ...]
    unchanged: Sequence[str]
    nbytes: int
    seconds: Mapping[str, float]
    full_speed: FullSpeed
    check: CheckReport | None = field(default=None, repr=False)

    @property
    def total_seconds(self) -> float:
        """Seconds from the call to the published version."""
        return sum(self.seconds.values())

    @property
    def gigabytes_per_second(self) -> float:
        """Replaced bytes over total seconds, in GB/s (10^9 bytes)."""
        return self.nbytes / GB / self.total_seconds if self.total_seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return {
            "version": self.version,
            "previous": self.previous,
            "source": self.source,
            "changed": list(self.changed),
            "unchanged": list(self.unchanged),
            "bytes": self.nbytes,
            "seconds": dict(self.seconds),
            "total_seconds": self.total_seconds,
            "full_speed": self.full_speed.done(),
            "check": None if self.check is None else self.check.to_json(),
        }

    def __str__(self) -> str:
        if self.check is None:
            return f"version {self.version} (was {self.previous}): {self.source}, {self.total_seconds * 1e3:.2f} ms"
        stages = ", ".join(f"{stage} {seconds * 1e3:.2f} ms" for stage, seconds in self.seconds.items())
        return (
            f"version {self.version} (was {self.previous}) from {self.source}: "
            f"{len(self.changed)} of {len(self.changed) + len(self.unchanged)} weights changed, {_size(self.nbytes)} "
            f"in {self.total_seconds * 1e3:.2f} ms ({stages})"
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(stage)}</td><td style='text-align:right'>{seconds * 1e3:.3f} ms</td></tr>"
            for stage, seconds in self.seconds.items()
        )
        return (
            f"<b>version {self.version}</b> (was {self.previous}) from {html.escape(self.source)}<br>"
            f"{len(self.changed)} weights changed, {len(self.unchanged)} unchanged, {self.nbytes / 1e6:.2f} MB, "
            f"{self.gigabytes_per_second:.2f} GB/s<table>{rows}</table>"
        )


class Account:
    """Gives account of commits of one engine.

    Args:
        specs: every refittable weight.
    """

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self._specs = specs
        self._every = tuple(specs)
        self._places = {name: place for place, name in enumerate(self._every)}
        self._nbytes = sum(spec.nbytes for spec in specs.values())

    def fields(self, candidate: Candidate) -> dict[str, Any]:
        """The fields of the report of a candidate's commit, but the numbers of versions and the seconds."""
        specs, changed = self._specs, candidate.changed
        every = len(changed) == len(specs)
        return {
            "source": candidate.source,
            "changed": self._every if every else tuple(sorted(changed, key=self._places.__getitem__)),
            "unchanged": () if every else Others(self._every, changed),
            "nbytes": self._nbytes if every else sum(specs[name].nbytes for name in changed),
            "full_speed": candidate.weights.full_speed,
            "check": candidate.check,
        }
