"""Comparing a prepared model with the original on real inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnxruntime
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator

from onnx_refit.errors import ModelError
from onnx_refit.model.prepare import Prepared
from onnx_refit.model.vocabulary import apply_maps
from onnx_refit.tensors import Array

_TYPES = {"float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Equivalence:
    """How two models compare.

    Attributes:
        differences: output name -> the largest absolute difference (0 where all is equal to the bit).
        cases: how many sets of inputs were compared.
    """

    differences: Mapping[str, float]
    cases: int


def verify_equivalent(
    original: ModelProto,
    prepared: Prepared,
    inputs: Mapping[str, Array] | Iterable[Mapping[str, Array]],
    *,
    rtol: float = 1e-5,
    atol: float = 1e-6,
) -> Equivalence:
    """Run a model as it was and as it is now on the same inputs and compare the outputs.

    ONNX Runtime runs both; where it does not know an operator of the original, ONNX's reference evaluator runs that.

    Args:
        original: the model as the user has it.
        prepared: what ``prepare`` made of it.
        inputs: one set of the original's inputs by name, or several.
        rtol: relative tolerance for floating-point outputs; others must be equal.
        atol: absolute tolerance.

    Raises:
        ModelError: an output differs, with the output and the size of the difference, or a model does not run.
    """
    cases = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    before, after = Runner(original), Runner(prepared.model)
    differences: dict[str, float] = {}
    for case in cases:
        expected = before.run(case)
        mapped = apply_maps(prepared.preprocessors, case)
        got = after.run({name: mapped[name] for name in after.inputs if name in mapped})
        got = apply_maps(prepared.postprocessors, got)
        for name, one in expected.items():
            if name not in got:
                raise ModelError("the prepared model has no such output", where=name)
            size = _difference(one, got[name], name, rtol, atol)
            differences[name] = max(size, differences.get(name, 0.0))
    return Equivalence(differences, len(cases))


def _difference(expected: Array, got: Array, name: str, rtol: float, atol: float) -> float:
    if expected.shape != got.shape:
        raise ModelError(f"the prepared model gives shape {got.shape}, the original {expected.shape}", where=name)
    if expected.dtype != got.dtype and not (expected.dtype.kind in "OU" and got.dtype.kind in "OU"):
        raise ModelError(f"the prepared model gives {got.dtype}, the original {expected.dtype}", where=name)
    if expected.dtype.kind in "OUSb" or expected.dtype.kind in "iu":
        if not np.array_equal(expected, got):
            raise ModelError(f"{np.count_nonzero(expected != got)} elements differ", where=name)
        return 0.0
    left, right = expected.astype(np.float64), got.astype(np.float64)
    loose = _TYPES.get(str(expected.dtype), 0.0)
    if not np.allclose(left, right, rtol=max(rtol, loose), atol=max(atol, loose), equal_nan=True):
        raise ModelError(f"outputs differ by up to {np.nanmax(np.abs(left - right)):.3g}", where=name)
    finite = np.isfinite(left) & np.isfinite(right)
    return float(np.max(np.abs(left - right), where=finite, initial=0.0))


class Runner:
    """Runs a model for comparison: ONNX Runtime where it can, else ONNX's reference evaluator.

    Raises:
        ModelError: neither can.
    """

    def __init__(self, model: ModelProto) -> None:
        self._reference: ReferenceEvaluator | None = None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            self.inputs = tuple(value.name for value in self._session.get_inputs())
            self.outputs = tuple(value.name for value in self._session.get_outputs())
        except Exception as error:  # noqa: BLE001  (its exceptions have no common base but Exception)
            try:
                self._reference = ReferenceEvaluator(model)
            except Exception as other:
                raise ModelError(
                    f"neither ONNX Runtime ({error}) nor the reference evaluator ({other}) runs it"
                ) from other
            weights = {tensor.name for tensor in model.graph.initializer}
            self.inputs = tuple(value.name for value in model.graph.input if value.name not in weights)
            self.outputs = tuple(value.name for value in model.graph.output)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Output name -> array; ModelError if the run fails."""
        try:
            if self._reference is not None:
                results = self._reference.run(None, dict(inputs))
            else:
                results = self._session.run(None, dict(inputs))
        except Exception as error:
            raise ModelError(f"the model does not run on these inputs: {error}") from error
        return dict(zip(self.outputs, results, strict=True))
