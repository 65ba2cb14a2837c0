"""What a check found out about a checkpoint, as data."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, overload

from onnx_refit.errors import RefitRejectedError
from onnx_refit.tensors import TensorSpec
from onnx_refit.weights.nearest import Candidate
from onnx_refit.weights.scan import Measure

_SHOWN = 5


class RejectReason(Enum):
    """Why a tensor of the checkpoint cannot become a weight."""

    SHAPE = "shape"
    DTYPE = "dtype"
    LOSSY_CAST = "lossy-cast"
    OVERFLOW = "overflow"
    NON_FINITE = "non-finite"
    AMBIGUOUS = "ambiguous"
    DROPPED = "dropped"
    UNREADABLE = "unreadable"
    CONSTANT = "constant"


@dataclass(frozen=True, slots=True)
class Accepted:
    """A weight that the checkpoint has.

    Attributes:
        name: the weight, as the model names it.
        checkpoint_names: the tensors it is made of, as the checkpoint names them.
        dtype: dtype of the weight.
        stored_dtype: dtype in the checkpoint.
        nbytes: bytes of the weight.
        changed: whether its bits differ from the current ones; None where that was not looked at.
        measure: norm and change; None unless asked for.
    """

    name: str
    checkpoint_names: tuple[str, ...]
    dtype: str
    stored_dtype: str
    nbytes: int
    changed: bool | None = None
    measure: Measure | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A weight that the checkpoint has in a form that cannot be used.

    Attributes:
        name: the weight, as the model names it.
        checkpoint_names: the tensors it would be made of.
        reason: why not.
        text: why not, in words, without a final stop.
        spec: what the model declares.
        candidates: other tensors that could have been meant.
    """

    name: str
    checkpoint_names: tuple[str, ...]
    reason: RejectReason
    text: str
    spec: TensorSpec
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Missing:
    """A weight that the checkpoint lacks.

    Attributes:
        name: the weight, as the model names it.
        spec: what the model declares.
        candidates: unused tensors that could have been meant.
        expected: the tensors it would be made of that are not there, as the checkpoint names them; empty where the
            plan knows no other names.
        text: why no checkpoint gives it, in words; empty where it is merely not there.
    """

    name: str
    spec: TensorSpec
    candidates: tuple[Candidate, ...] = ()
    expected: tuple[TensorSpec, ...] = ()
    text: str = ""

    def __str__(self) -> str:
        if self.text:
            return f"{self.spec} is missing: {self.text}"
        if [spec.name for spec in self.expected] in ([], [self.name]):
            return f"{self.spec} is missing{_meant(self.candidates)}"
        names = ", ".join(map(str, self.expected))
        verb = "is" if len(self.expected) == 1 else "are"
        return f"{names} {verb} missing, for the weight {self.name}{_meant(self.candidates)}"


@dataclass(frozen=True, slots=True)
class Unused:
    """A tensor of the checkpoint that no weight is made of; ``refused`` where that stops the refit."""

    name: str
    spec: TensorSpec
    refused: bool
    candidates: tuple[Candidate, ...] = ()


class AsDeclared(Sequence[Accepted]):
    """Weights that the checkpoint has under their own names and as the model declares them, made when looked at.

    Args:
        specs: the weights.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = specs

    @overload
    def __getitem__(self, index: int) -> Accepted: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Accepted]: ...

    def __getitem__(self, index: int | slice) -> Accepted | Sequence[Accepted]:
        if isinstance(index, slice):
            return AsDeclared(self._specs[index])
        spec = self._specs[index]
        return Accepted(spec.name, (spec.name,), spec.dtype, spec.dtype, spec.nbytes)

    def __len__(self) -> int:
        return len(self._specs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))


class NotGiven(Sequence[Missing]):
    """Weights that a partial checkpoint lacks, made when looked at.

    Args:
        specs: every weight of the model.
        given: the names of those that the checkpoint has: no others.
    """

    def __init__(self, specs: Sequence[TensorSpec], given: Collection[str]) -> None:
        self._specs = specs
        self._given = given
        self._count = len(specs) - len(given)

    @cached_property
    def _missing(self) -> tuple[Missing, ...]:
        return tuple(Missing(spec.name, spec) for spec in self._specs if spec.name not in self._given)

    @overload
    def __getitem__(self, index: int) -> Missing: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Missing]: ...

    def __getitem__(self, index: int | slice) -> Missing | Sequence[Missing]:
        return self._missing[index]

    def __len__(self) -> int:
        return self._count

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._missing == tuple(other)

    def __hash__(self) -> int:
        return hash(self._missing)


@dataclass(frozen=True)
class CheckReport:
    """What a checkpoint would do to the weights of a model.

    Attributes:
        checkpoint: where the tensors come from.
        partial: whether missing weights may stay as they are.
        accepted: what can be applied, in the order of the model.
        rejected: what cannot be applied.
        missing: what the checkpoint lacks.
        unused: what the checkpoint has too much.
    """

    checkpoint: str
    partial: bool
    accepted: Sequence[Accepted]
    rejected: tuple[Rejected, ...]
    missing: Sequence[Missing]
    unused: tuple[Unused, ...]

    @property
    def ok(self) -> bool:
        """Whether the checkpoint can be applied."""
        if self.rejected or (self.missing and not self.partial) or any(u.refused for u in self.unused):
            return False
        return bool(self.accepted) or not self.missing

    @property
    def changed(self) -> frozenset[str]:
        """The accepted weights that are not known to be unchanged."""
        return frozenset(a.name for a in self.accepted if a.changed is not False)

    @property
    def unchanged(self) -> tuple[str, ...]:
        """The accepted weights whose bits are the current ones."""
        return tuple(a.name for a in self.accepted if a.changed is False)

    @property
    def nbytes(self) -> int:
        """Bytes of all accepted weights."""
        return sum(a.nbytes for a in self.accepted)

    def problems(self) -> list[str]:
        """Everything that stops the refit, a line each, without a final stop."""
        lines = [
            f"{r.name}: {r.text}{_meant(r.candidates)}"
            if not r.checkpoint_names or r.checkpoint_names == (r.name,)
            else f"{r.name} (from {', '.join(r.checkpoint_names)}): {r.text}{_meant(r.candidates)}"
            for r in self.rejected
        ]
        if not self.partial:
            lines += [str(m) for m in self.missing]
        elif not self.accepted and not self.rejected and self.missing:
            lines.append("no tensor of the checkpoint is a weight of the model")
        lines += [f"{u.spec} is no weight of the model{_meant(u.candidates)}" for u in self.unused if u.refused]
        return lines

    def raise_if_rejected(self) -> None:
        """RefitRejectedError with the first few problems and the whole report, unless the checkpoint is ok."""
        if self.ok:
            return
        lines = self.problems()
        more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        kind = "problem" if len(lines) == 1 else "problems"
        raise RefitRejectedError(
            f"{len(lines)} {kind}: {'; '.join(lines[:_SHOWN])}{more}",
            report=self,
            where=self.checkpoint,
            hint=self._hint(),
        )

    def _hint(self) -> str | None:
        reasons = {r.reason for r in self.rejected}
        if RejectReason.NON_FINITE in reasons:
            return "Allow values that are not finite only if the model is meant to have them"
        if RejectReason.LOSSY_CAST in reasons:
            return "Allow rounding if a loss of precision is wanted"
        if self.missing and not self.partial and not self.rejected:
            if all(m.text for m in self.missing):
                return "Build the plan again with the very checkpoint that the model was exported from"
            if any(m.expected for m in self.missing):
                return "For other names give rules; for only some weights ask for partial"
            return "For other names give the checkpoint at build time, or rules; for only some weights ask for partial"
        return None

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-able values; numbers that JSON lacks become null."""
        return {
            "checkpoint": self.checkpoint,
            "ok": self.ok,
            "partial": self.partial,
            "accepted": [_accepted_json(a) for a in self.accepted],
            "rejected": [
                {
                    "name": r.name,
                    "checkpoint_names": list(r.checkpoint_names),
                    "reason": r.reason.value,
                    "text": r.text,
                    "wanted": _spec_json(r.spec),
                    "candidates": _candidates_json(r.candidates),
                }
                for r in self.rejected
            ],
            "missing": [
                {
                    "name": m.name,
                    "wanted": _spec_json(m.spec),
                    "checkpoint_names": [spec.name for spec in m.expected],
                    "text": m.text,
                    "candidates": _candidates_json(m.candidates),
                }
                for m in self.missing
            ],
            "unused": [
                {
                    "name": u.name,
                    "has": _spec_json(u.spec),
                    "refused": u.refused,
                    "candidates": _candidates_json(u.candidates),
                }
                for u in self.unused
            ],
            "unchanged": list(self.unchanged),
        }


def _meant(candidates: tuple[Candidate, ...]) -> str:
    return f" (meant: {' or '.join(str(c) for c in candidates)}?)" if candidates else ""


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < float("inf") else None


def _spec_json(spec: TensorSpec) -> dict[str, Any]:
    return {"dtype": spec.dtype, "shape": None if spec.shape is None else list(spec.shape)}


def _candidates_json(candidates: tuple[Candidate, ...]) -> list[dict[str, Any]]:
    return [{"name": c.spec.name, **_spec_json(c.spec), "score": round(c.score, 3)} for c in candidates]


def _accepted_json(accepted: Accepted) -> dict[str, Any]:
    result: dict[str, Any] = {
        "name": accepted.name,
        "checkpoint_names": list(accepted.checkpoint_names),
        "dtype": accepted.dtype,
        "stored_dtype": accepted.stored_dtype,
        "bytes": accepted.nbytes,
        "changed": accepted.changed,
    }
    if accepted.measure is not None:
        result["norm"] = _finite(accepted.measure.norm)
        result["changed_bytes"] = accepted.measure.changed_bytes
        result["largest_relative_change"] = _finite(accepted.measure.largest_relative_change)
    return result
