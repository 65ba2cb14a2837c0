"""The canary: golden inputs run on a staged weight set before anybody else's are."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from onnx_refit.errors import CanaryError
from onnx_refit.tensors import Array, dtype_name, is_floating


@dataclass(frozen=True)
class Canary:
    """What to run on a staged set, and what must come out.

    Attributes:
        inputs: one inference's inputs.
        expect: output name -> array that must come out within the tolerance; None checks no values.
        rtol: relative tolerance of floating-point outputs.
        atol: absolute tolerance of floating-point outputs.
        accept: the user's own judge: takes the outputs, returns True (or None) to accept, False or a reason (a
            string) to refuse; what it raises refuses too.
        allow_nonfinite: accept NaN and Inf in the outputs.
    """

    inputs: Mapping[str, object]
    expect: Mapping[str, object] | None = None
    rtol: float = 1e-4
    atol: float = 1e-5
    accept: Callable[[Mapping[str, Array]], bool | str | None] | None = None
    allow_nonfinite: bool = False


@dataclass(frozen=True)
class CanaryResult:
    """What the canary saw.

    Attributes:
        outputs: the staged set's outputs.
        seconds: how long the inference took.
        worst: output name -> largest absolute difference from what was expected.
    """

    outputs: Mapping[str, Array]
    seconds: float
    worst: Mapping[str, float]


def run_canary(canary: Canary, infer: Callable[[Mapping[str, object]], Mapping[str, Array]]) -> CanaryResult:
    """Run a canary and judge its outputs.

    Raises:
        CanaryError: the inference failed, gave NaN or Inf, or not what was expected.
    """
    started = time.perf_counter()
    outputs = infer(canary.inputs)
    seconds = time.perf_counter() - started
    if not canary.allow_nonfinite:
        for name, value in outputs.items():
            if is_number(value) and not np.isfinite(value.astype(np.complex128)).all():
                raise CanaryError("the canary's output holds NaN or Inf", where=f"output {name!r}")
    worst = {name: _compare(canary, name, outputs, expected) for name, expected in (canary.expect or {}).items()}
    if canary.accept is not None:
        _ask(canary.accept, outputs)
    return CanaryResult(outputs, seconds, worst)


def is_number(array: Array) -> bool:
    """Whether an output holds real or complex numbers in a floating-point format."""
    return array.dtype.kind == "c" or (array.dtype.kind in "fV" and is_floating(dtype_name(array.dtype)))


def _ask(accept: Callable[[Mapping[str, Array]], bool | str | None], outputs: Mapping[str, Array]) -> None:
    try:
        verdict = accept(outputs)
    except Exception as error:
        raise CanaryError(f"the canary's judge raised {type(error).__name__}: {error}") from error
    if isinstance(verdict, str):
        raise CanaryError(f"the canary's judge refused: {verdict}")
    if verdict is not None and not verdict:
        raise CanaryError("the canary's judge refused the outputs")


def _compare(canary: Canary, name: str, outputs: Mapping[str, Array], expected: object) -> float:
    where = f"output {name!r}"
    if name not in outputs:
        raise CanaryError("the canary expects an output that the engine does not have", where=where)
    got, wanted = outputs[name], np.asarray(expected)
    if got.shape != wanted.shape:
        raise CanaryError(f"the shape is {list(got.shape)}, expected was {list(wanted.shape)}", where=where)
    if not is_number(got):
        if not np.array_equal(got, wanted):
            raise CanaryError("the output is not what the canary expects", where=where)
        return 0.0
    # bfloat16 and its like are known to NumPy only as raw bytes: compare in the widest type.
    wide = np.complex128 if got.dtype.kind == "c" else np.float64
    got, wanted = got.astype(wide), wanted.astype(wide)
    largest = float(np.abs(got - wanted).max(initial=0.0))
    if not np.allclose(got, wanted, rtol=canary.rtol, atol=canary.atol, equal_nan=canary.allow_nonfinite):
        raise CanaryError(
            f"the output differs from what the canary expects by up to {largest:.3g} "
            f"(rtol {canary.rtol:g}, atol {canary.atol:g})",
            where=where,
        )
    return largest
