"""Which requests may run as one batch, and how a batch is put together and taken apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnx_refit.errors import OnnxRefitError
from onnx_refit.refit.live import Engine
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype

_PROBE_ROWS = 3
_PROBE_OTHER = 4


def batch_dimension(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str | None:
    """Why the rows of a model cannot be told apart by its declared shapes; None where they can.

    Every input and output must have a first dimension that varies, and where these have names, the same one.
    """
    named: set[str] = set()
    for spec in (*inputs, *outputs):
        if not spec.shape:
            return f"{spec.name!r} has no first dimension"
        if isinstance(spec.shape[0], int):
            return f"the first dimension of {spec.name!r} is fixed"
        if isinstance(spec.shape[0], str) and spec in inputs:
            named.add(spec.shape[0])
    return None if len(named) <= 1 else f"the first dimensions of the inputs are different ones: {sorted(named)}"


def why_not_batchable(engine: Engine) -> str | None:
    """Why requests to an engine must not be batched; None if they may.

    Declared shapes are not enough: a model can mix rows (a normalisation over the batch). So a few random rows are run
    together and one by one, and must give the same.
    """
    reason = batch_dimension(engine.inputs, engine.outputs)
    if reason is not None:
        return reason
    rng = np.random.default_rng(0)
    probe = {spec.name: _random(spec, rng) for spec in engine.inputs}
    try:
        whole = engine.run(probe)
        for row in range(_PROBE_ROWS):
            single = engine.run({name: value[row : row + 1] for name, value in probe.items()})
            for name, value in single.items():
                if whole[name].shape[0] != _PROBE_ROWS or value.shape != whole[name][row : row + 1].shape:
                    return f"output {name!r} does not have a row for each row of the inputs"
                if value.dtype.kind == "f" and not np.isfinite(value).all():
                    return f"output {name!r} is not finite for random inputs, so its rows cannot be compared"
                if not _close(value, whole[name][row : row + 1]):
                    return f"output {name!r} differs when rows run together"
    except OnnxRefitError as error:
        return f"a trial with random inputs failed: {error}"
    return None


def _random(spec: TensorSpec, rng: np.random.Generator) -> Array:
    shape = [_PROBE_ROWS, *(d if isinstance(d, int) else _PROBE_OTHER for d in (spec.shape or ())[1:])]
    dtype = numpy_dtype(spec.dtype)
    if dtype.kind == "O":
        return np.full(shape, "", object)
    if dtype.kind in "iub":
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def _close(left: Array, right: Array) -> bool:
    if left.dtype.kind != "f":
        return bool(np.array_equal(left, right))
    # Kernels sum in another order for another number of rows; a mixed row differs in the first digits.
    return bool(np.allclose(left, right, rtol=1e-2, atol=1e-3))


def signature(inputs: Mapping[str, Array]) -> tuple[object, ...] | None:
    """What must be equal for requests to share a batch; None if this one cannot be in any."""
    rows = {array.shape[0] if array.ndim else 0 for array in inputs.values()}
    if len(rows) != 1 or 0 in rows:
        return None
    return tuple((name, array.dtype.str, array.shape[1:]) for name, array in sorted(inputs.items()))


def join(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The inputs of several requests, one below the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def split(outputs: Mapping[str, Array], rows: Sequence[int]) -> list[dict[str, Array]]:
    """The outputs of a batch, taken apart again (views)."""
    parts: list[dict[str, Array]] = []
    start = 0
    for count in rows:
        parts.append({name: value[start : start + count] for name, value in outputs.items()})
        start += count
    return parts
