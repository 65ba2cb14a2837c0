"""What differs between two checkpoints, tensor by tensor, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_refit.tensors import Array, TensorSpec
from onnx_refit.weights.nearest import Nearest
from onnx_refit.weights.scan import same_bits
from onnx_refit.weights.source import WeightSource

_CHUNK = 1 << 17
HISTOGRAM_FROM, HISTOGRAM_TO = -12, 2
"""The powers of ten of the first and last edge of the histogram; a bin is half a power."""
_BINS = (HISTOGRAM_TO - HISTOGRAM_FROM) * 2


@dataclass(frozen=True)
class TensorDiff:
    """How one tensor differs.

    Attributes:
        spec: its name, dtype and shape in both.
        changed_bytes: bytes that differ.
        changed_elements: elements that differ in any bit.
        norm_before: Euclidean norm in the first checkpoint.
        norm_after: Euclidean norm in the second.
        relative_change: norm of the difference over the norm before; infinite where that is 0.
        largest_relative_change: the largest change of an element over the largest magnitude before.
        not_finite: elements of either that are NaN or infinite; they are left out of the norms.
        histogram: how many elements changed by how much relative to themselves: a count for each half power of ten
            from 1e-12 to 1e2, smaller and larger ones in the first and last bin.
    """

    spec: TensorSpec
    changed_bytes: int
    changed_elements: int
    norm_before: float
    norm_after: float
    relative_change: float
    largest_relative_change: float
    not_finite: int
    histogram: tuple[int, ...]

    @property
    def changed(self) -> bool:
        """Whether any bit differs."""
        return self.changed_bytes > 0


@dataclass(frozen=True)
class Diff:
    """How two checkpoints differ.

    Attributes:
        before: where the first comes from.
        after: where the second comes from.
        tensors: what both have in one dtype and shape, in the order of the first.
        reshaped: what both have in another dtype or shape.
        removed: what only the first has.
        added: what only the second has.
        meant: removed name -> added names that it may have become.
    """

    before: str
    after: str
    tensors: tuple[TensorDiff, ...]
    reshaped: tuple[tuple[TensorSpec, TensorSpec], ...]
    removed: tuple[TensorSpec, ...]
    added: tuple[TensorSpec, ...]
    meant: dict[str, tuple[str, ...]]

    @property
    def identical(self) -> bool:
        """Whether both have the same tensors, bit for bit."""
        return not (self.reshaped or self.removed or self.added or any(t.changed for t in self.tensors))

    @property
    def changed(self) -> tuple[TensorDiff, ...]:
        """The common tensors that differ."""
        return tuple(t for t in self.tensors if t.changed)

    @property
    def histogram(self) -> tuple[int, ...]:
        """The histogram over all common tensors."""
        return tuple(int(n) for n in np.sum([t.histogram for t in self.tensors] or [(0,) * _BINS], axis=0))

    def to_json(self) -> dict[str, Any]:
        """The differences as JSON-able values; numbers that JSON lacks become null."""
        return {
            "before": self.before,
            "after": self.after,
            "identical": self.identical,
            "changed": len(self.changed),
            "changed_bytes": sum(t.changed_bytes for t in self.tensors),
            "bytes": sum(t.spec.nbytes for t in self.tensors),
            "histogram": {"from": HISTOGRAM_FROM, "to": HISTOGRAM_TO, "counts": list(self.histogram)},
            "tensors": [_tensor_json(t) for t in self.tensors],
            "reshaped": [{"before": str(a), "after": str(b)} for a, b in self.reshaped],
            "removed": [{"tensor": str(s), "meant": list(self.meant.get(s.name, ()))} for s in self.removed],
            "added": [str(s) for s in self.added],
        }


def diff(before: WeightSource, after: WeightSource, progress: Callable[[int], None] | None = None) -> Diff:
    """Compare two checkpoints.

    Args:
        before: the first.
        after: the second.
        progress: called with the bytes compared so far.

    Raises:
        WeightsError: a tensor cannot be read.
    """
    tensors: list[TensorDiff] = []
    reshaped: list[tuple[TensorSpec, TensorSpec]] = []
    done = 0
    for name, spec in before.specs.items():
        other = after.specs.get(name)
        if other is None:
            continue
        if other != spec:
            reshaped.append((spec, other))
            continue
        tensors.append(compare(spec, before.read(name), after.read(name)))
        done += spec.nbytes
        if progress is not None:
            progress(done)
    removed = tuple(spec for name, spec in before.specs.items() if name not in after.specs)
    added = tuple(spec for name, spec in after.specs.items() if name not in before.specs)
    index = Nearest(added)
    meant = {spec.name: tuple(c.spec.name for c in index.find(spec)) for spec in removed[:50]} if added else {}
    return Diff(before.description, after.description, tuple(tensors), tuple(reshaped), removed, added, meant)


def compare(spec: TensorSpec, before: Array, after: Array) -> TensorDiff:
    """Compare two tensors of one dtype and shape, block by block in float64."""
    a, b = np.ascontiguousarray(before).reshape(-1), np.ascontiguousarray(after).reshape(-1)
    equal = same_bits(a, b)
    squares_a = squares_b = squares_change = scale = largest = 0.0
    changed_bytes = changed_elements = not_finite = 0
    counts = np.zeros(_BINS, np.int64)
    with np.errstate(all="ignore"):
        for start in range(0, a.size, _CHUNK):
            raw_a, raw_b = a[start : start + _CHUNK], b[start : start + _CHUNK]
            x, y = _as_float64(raw_a), _as_float64(raw_b)
            finite = np.isfinite(x) & np.isfinite(y)
            if not finite.all():
                not_finite += int(finite.size - finite.sum())
                x, y = np.where(finite, x, 0), np.where(finite, y, 0)
            squares_a += float(np.dot(x, x))
            squares_b += float(np.dot(y, y))
            scale = max(scale, float(np.abs(x).max()))
            if equal:
                continue
            bytes_differ = (raw_a.view(np.uint8) != raw_b.view(np.uint8)).reshape(raw_a.size, -1)
            changed_bytes += int(np.count_nonzero(bytes_differ))
            differs = bytes_differ.any(axis=1)
            changed_elements += int(np.count_nonzero(differs))
            change = np.abs(y - x)
            squares_change += float(np.dot(change, change))
            largest = max(largest, float(change.max()))
            counts += _histogram(change[differs & finite], np.abs(x[differs & finite]))
    norm = float(np.sqrt(squares_a))
    return TensorDiff(
        spec,
        changed_bytes,
        changed_elements,
        norm,
        float(np.sqrt(squares_b)),
        _ratio(float(np.sqrt(squares_change)), norm),
        _ratio(largest, scale),
        not_finite,
        tuple(int(n) for n in counts),
    )


def _histogram(change: Any, magnitude: Any) -> Any:
    relative = np.log10(np.where(magnitude > 0, change / magnitude, np.inf))
    bins = np.floor((relative - HISTOGRAM_FROM) * 2)
    return np.bincount(np.clip(np.nan_to_num(bins, posinf=_BINS), 0, _BINS - 1).astype(np.intp), minlength=_BINS)


def _ratio(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole else float("inf")


def _as_float64(values: Array) -> Any:
    if values.dtype.kind == "c":
        values = np.abs(values)
    return values.astype(np.float64)


def _tensor_json(tensor: TensorDiff) -> dict[str, Any]:
    def finite(value: float) -> float | None:
        return value if abs(value) < float("inf") else None

    return {
        "name": tensor.spec.name,
        "dtype": tensor.spec.dtype,
        "shape": list(tensor.spec.static_shape),
        "bytes": tensor.spec.nbytes,
        "changed_bytes": tensor.changed_bytes,
        "changed_elements": tensor.changed_elements,
        "norm_before": finite(tensor.norm_before),
        "norm_after": finite(tensor.norm_after),
        "relative_change": finite(tensor.relative_change),
        "largest_relative_change": finite(tensor.largest_relative_change),
        "not_finite": tensor.not_finite,
    }
