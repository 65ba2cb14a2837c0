"""The check before anything moves: every refittable weight accounted for, each refusal with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeAlias

import numpy as np

from onnx_refit.errors import OnnxRefitError
from onnx_refit.plan.compiled import SourceWeight
from onnx_refit.refit.check_report import Accepted, CheckReport, Missing, Rejected, RejectReason, Unused
from onnx_refit.tensors import Array, TensorSpec, is_floating
from onnx_refit.weights.finite import Reader
from onnx_refit.weights.nearest import Nearest
from onnx_refit.weights.scan import CastProblem, Measure, Worst, all_finite, cast, first_non_finite, measure, same_bits
from onnx_refit.weights.source import WeightSource
from onnx_refit.weights.view import NamedView, ViewProblemKind

# Near misses are looked up for so many problems of a kind; nobody reads further, and a look-up takes milliseconds.
_LOOKED_UP = 25

_CAST_REASONS = {
    CastProblem.KIND: RejectReason.DTYPE,
    CastProblem.LOSSY: RejectReason.LOSSY_CAST,
    CastProblem.OVERFLOW: RejectReason.OVERFLOW,
}
# What another tensor of the checkpoint may have been meant for.
_ELSEWHERE = {RejectReason.SHAPE, RejectReason.DTYPE}

_VIEW_REASONS = {
    ViewProblemKind.AMBIGUOUS: RejectReason.AMBIGUOUS,
    ViewProblemKind.SHAPE: RejectReason.SHAPE,
}


class Casting(Enum):
    """What may happen to values whose dtype is not the declared one."""

    LOSSLESS = "lossless"
    ROUND = "round"


class UnusedTensors(Enum):
    """What to do about tensors that no weight is made of.

    ``AUTO`` refuses them only in a partial refit, where a misspelt name would otherwise be skipped in silence.
    """

    AUTO = "auto"
    REPORT = "report"
    REFUSE = "refuse"


@dataclass(frozen=True)
class CheckOptions:
    """How strict a check is; strict by default.

    Attributes:
        partial: weights that the checkpoint lacks stay as they are.
        allow_nonfinite: NaN and infinities are accepted.
        casting: whether a cast may round. Overflow is refused in any case.
        unused: what to do about tensors that no weight is made of.
        compare: leave out weights whose bits are the current ones (costs a pass over those that are equal).
        measure: compute norms and relative changes (costs several passes).
    """

    partial: bool = False
    allow_nonfinite: bool = False
    casting: Casting = Casting.LOSSLESS
    unused: UnusedTensors = UnusedTensors.AUTO
    compare: bool = False
    measure: bool = False


Load: TypeAlias = Callable[[TensorSpec, TensorSpec], "tuple[Any | None, tuple[RejectReason, str]]"]
"""Gives a tensor as the weight that is declared, from how it is declared and stored: an array, or why there is none."""


def check(
    sources: Sequence[SourceWeight],
    weights: WeightSource,
    *,
    current: Callable[[str], Array | None] | None = None,
    options: CheckOptions | None = None,
    finite_later: bool = False,
    load: Load | None = None,
) -> tuple[CheckReport, dict[str, Array]]:
    """Check a checkpoint against the weights of a model; nothing is changed.

    Args:
        sources: every refittable weight of the model.
        weights: the checkpoint, or a view of it in the model's names.
        current: gives the current value of a weight, None where it is not at hand; used by ``compare`` and
            ``measure``.
        options: how strict to be.
        finite_later: the caller looks for NaN and infinities itself, in the arrays that he gets, and checks once more
            where he finds some: only tensors that have to be cast are looked at here.
        load: reads tensors instead, for those that are not on the host; whatever it gives has ``nbytes``.

    Returns:
        The report, and the arrays to apply: C-contiguous, of the declared dtype and shape, without the weights that
        ``compare`` found unchanged; empty unless the report is ok. They may share memory with the checkpoint.
    """
    chosen = options or CheckOptions()
    view = weights if isinstance(weights, NamedView) else None
    problems = view.problems if view is not None else {}
    kept = view.kept if view is not None else frozenset()
    stored_specs = weights.specs
    accepted: list[Accepted] = []
    rejected: list[Rejected] = []
    missing: list[Missing] = []
    arrays: dict[str, Array] = {}
    fitting = (
        source.spec.name
        for source in sources
        if source.spec.name not in problems
        and (found := stored_specs.get(source.spec.name)) is not None
        and found.shape == source.spec.shape
    )
    if load is None:
        reader = Reader(weights, fitting, look=not chosen.allow_nonfinite and not finite_later)
        load = lambda spec, stored: _load(reader, spec, stored, chosen)  # noqa: E731
    for source in sources:
        spec = source.spec
        name = spec.name
        if name in problems:
            names = view.checkpoint_names(name) if view is not None else ()
            problem = problems[name]
            rejected.append(Rejected(name, names, _VIEW_REASONS[problem.kind], problem.text, spec))
            continue
        stored = stored_specs.get(name)
        if stored is None:
            if name not in kept:
                missing.append(_missing(spec, view))
            continue
        names = (name,) if view is None else view.checkpoint_names(name)
        if stored.shape != spec.shape:
            rejected.append(Rejected(name, names, RejectReason.SHAPE, _shape_text(spec, stored), spec))
            continue
        array, refusal = load(spec, stored)
        if array is None:
            rejected.append(Rejected(name, names, *refusal, spec))
            continue
        changed, measured = _compare(name, array, current, chosen)
        accepted.append(Accepted(name, names, spec.dtype, stored.dtype, array.nbytes, changed, measured))
        if changed is not False:
            arrays[name] = array
    if view is not None:
        for name, text in view.dropped().items():
            rejected.append(Rejected(name, (name,), RejectReason.DROPPED, text, TensorSpec(name, "float32", None)))
    unused = _unused(sources, weights, view)
    report = _report(weights.description, chosen, accepted, rejected, missing, unused)
    return report, arrays if report.ok else {}


def _missing(spec: TensorSpec, view: NamedView | None) -> Missing:
    if view is None:
        return Missing(spec.name, spec)
    return Missing(spec.name, spec, expected=view.expected(spec.name), text=view.why_missing(spec.name))


def _load(
    reader: Reader, spec: TensorSpec, stored: TensorSpec, options: CheckOptions
) -> tuple[Array | None, tuple[RejectReason, str]]:
    """One tensor in the declared dtype, or why it cannot be had."""
    try:
        array, finite = reader.read(spec.name)
    except OnnxRefitError as error:
        return None, (RejectReason.UNREADABLE, str(error))
    # A non-finite value is said to be one before a cast can speak of it.
    if not finite or (stored.dtype != spec.dtype and not options.allow_nonfinite and not all_finite(array)):
        return None, (RejectReason.NON_FINITE, _non_finite_text(array))
    if stored.dtype != spec.dtype:
        result = cast(array, spec.dtype, rounding=options.casting is Casting.ROUND)
        if result.array is None:
            problem = result.problem or CastProblem.KIND
            return None, (_CAST_REASONS[problem], _cast_text(stored.dtype, spec.dtype, result.worst))
        array = result.array
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    return array, (RejectReason.DTYPE, "")


def _compare(
    name: str, array: Array, current: Callable[[str], Array | None] | None, options: CheckOptions
) -> tuple[bool | None, Measure | None]:
    """Whether the weight changed, and by how much, as far as the options ask."""
    if not (options.compare or options.measure):
        return None, None
    before = current(name) if current is not None else None
    changed = None if before is None or not options.compare else not same_bits(array, before)
    return changed, measure(array, before) if options.measure else None


def _unused(sources: Sequence[SourceWeight], weights: WeightSource, view: NamedView | None) -> Iterable[TensorSpec]:
    if view is not None:
        return view.unused({source.spec.name for source in sources}).values()
    wanted = {source.spec.name for source in sources}
    return [spec for name, spec in weights.specs.items() if name not in wanted]


def _refused(spec: TensorSpec, options: CheckOptions) -> bool:
    if options.unused is not UnusedTensors.AUTO:
        return options.unused is UnusedTensors.REFUSE
    # Counters, masks and epsilons that an ONNX file or a state dict carries along are no misspelt weights.
    return options.partial and is_floating(spec.dtype) and spec.is_static and spec.size > 1


def _report(
    description: str,
    options: CheckOptions,
    accepted: list[Accepted],
    rejected: list[Rejected],
    missing: list[Missing],
    unused: Iterable[TensorSpec],
) -> CheckReport:
    """Put the report together, with near misses on both sides."""
    left = list(unused)
    spare = Nearest(left) if (missing or rejected) and left else None
    wanted = Nearest([w for m in missing for w in m.expected or (m.spec,)]) if missing and left else None
    return CheckReport(
        description,
        options.partial,
        tuple(accepted),
        tuple(
            replace(r, candidates=spare.find(r.spec))
            if spare is not None and r.reason in _ELSEWHERE and i < _LOOKED_UP
            else r
            for i, r in enumerate(rejected)
        ),
        tuple(
            replace(m, candidates=spare.find((*m.expected, m.spec)[0]))
            if spare is not None and i < _LOOKED_UP and not m.text
            else m
            for i, m in enumerate(missing)
        ),
        tuple(
            Unused(u.name, u, _refused(u, options), wanted.find(u) if wanted is not None and i < _LOOKED_UP else ())
            for i, u in enumerate(left)
        ),
    )


def _dims(spec: TensorSpec) -> str:
    return "[" + ", ".join(str(d) for d in spec.shape or ()) + "]"


def _shape_text(wanted: TensorSpec, stored: TensorSpec) -> str:
    text = f"the shape is {_dims(stored)}, the model has {_dims(wanted)}"
    if sorted(map(str, wanted.shape or ())) == sorted(map(str, stored.shape or ())):
        text += ", which looks transposed"
    return text


def _at(worst: Worst) -> str:
    return f" at {list(worst.index)}" if worst.index else ""


def _non_finite_text(array: Array) -> str:
    worst = first_non_finite(array)
    if worst is None:
        return "a value is not finite"
    which = "the value is" if array.size == 1 else f"{worst.count} of {array.size} values are not finite, the first is"
    return f"{which} {worst.value}{_at(worst)}"


def _cast_text(stored: str, wanted: str, worst: Worst | None) -> str:
    if worst is None:
        return f"the dtype is {stored}, the model has {wanted}"
    return (
        f"{worst.count} values do not fit into {wanted} (from {stored}), "
        f"the worst is {worst.value}{_at(worst)}, which would become {worst.becomes}"
    )


__all__ = [
    "Accepted",
    "Casting",
    "CheckOptions",
    "CheckReport",
    "Missing",
    "RejectReason",
    "Rejected",
    "Unused",
    "UnusedTensors",
    "check",
]
