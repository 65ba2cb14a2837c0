"""Operators one by one: ONNX's own backend node tests, each constant-able float input made a refittable weight."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper
from onnx.backend.test.case.node import collect_testcases

from onnx_refit.errors import ModelError
from onnx_refit.plan.compile import compile_model
from onnx_refit.tensors import Array
from tests.plan.support import assert_contract, run, run_compiled

pytestmark = pytest.mark.slow


def cases(*, first: bool) -> Iterator[tuple[str, ModelProto, dict[str, Array]]]:
    """Name, model and inputs of each case; ``first``: the first input becomes a weight too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    for case in found:
        if case.model is None or not case.data_sets:
            continue
        if any(entry.domain == "" and entry.version < 7 for entry in case.model.opset_import):
            continue
        given = case.data_sets[0][0]
        arrays = [numpy_helper.to_array(a) if isinstance(a, onnx.TensorProto) else a for a in given]
        if len(arrays) != len(case.model.graph.input) or not all(
            isinstance(a, np.ndarray | np.generic) for a in arrays
        ):
            continue
        proto, feeds, inputs = ModelProto(), {}, []
        proto.CopyFrom(case.model)
        for index, (declared, values) in enumerate(zip(case.model.graph.input, map(np.asarray, arrays), strict=True)):
            if values.dtype.kind == "f" and values.size > 1 and (index or first):
                proto.graph.initializer.append(numpy_helper.from_array(values, declared.name))
            else:
                feeds[declared.name] = values
                inputs.append(declared)
        del proto.graph.input[:]
        proto.graph.input.extend(inputs)
        yield case.name, proto, feeds


def differs(left: Array, right: Array) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return True
    if left.dtype.kind != "f" or not left.size:
        return not np.array_equal(left, right)
    limit = 2e-3 if left.dtype == np.float16 else 1e-5
    a, b = left.astype(np.float64), right.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return True
    finite = np.isfinite(a)
    return bool(finite.any()) and float(np.abs(a - b)[finite].max()) > limit * max(
        float(np.abs(a[finite]).max()), 1e-30
    )


@pytest.mark.parametrize("first", [False, True])
def test_node_cases(first: bool) -> None:
    seen: Counter[str] = Counter()
    wrong = []
    for name, proto, feeds in cases(first=first):
        try:
            expected = run(proto, feeds)
        except Exception:  # noqa: BLE001  ONNX Runtime has no kernel for it, in a dozen ways of saying so
            seen["ONNX Runtime cannot run it"] += 1
            continue
        try:
            compilation = compile_model(proto)
        except ModelError as error:
            assert "is not a tensor" in str(error), name  # sequences and optionals as outputs
            seen["no tensors"] += 1
            continue
        assert_contract(compilation)
        got = run_compiled(compilation.compiled, compilation.weights, feeds)
        wrong += [name] if any(differs(a, b) for a, b in zip(expected, got, strict=True)) else []
        seen["compared"] += 1
    assert not wrong
    assert seen["compared"] > 1500
    assert seen["no tensors"] <= 10
