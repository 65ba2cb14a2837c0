from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from onnx_refit.engine.onnxruntime import artefact, backend
from onnx_refit.engine.onnxruntime.backend import create
from onnx_refit.engine.onnxruntime.options import OnnxRuntimeOptions
from onnx_refit.plan.compile import compile_model

from .zoo import ZOO

OPTIONS = OnnxRuntimeOptions(threads=1)


@pytest.mark.parametrize("name", ["convolutions", "tied", "lstm"])
def test_a_backend_from_an_artefact_optimises_nothing_and_answers_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = ZOO[name]()
    compilation = compile_model(model)
    first = create(compilation.compiled, None, OPTIONS)
    data = first.artefact()
    assert data

    def fail(*_: object) -> None:
        raise AssertionError("optimised again")

    monkeypatch.setattr(backend, "specialise", fail)
    second = create(compilation.compiled, None, OPTIONS, data)
    weights = dict(compilation.weights)
    one, two = first.derive(weights), second.derive(weights)
    assert one.full_speed.wait(60) and two.full_speed.wait(60)
    for a, b in zip(first.run(one, inputs).values(), second.run(two, inputs).values(), strict=True):
        assert np.array_equal(a, b)
    assert second.decisions == first.decisions
    assert second.recoverable == first.recoverable
    first.close()
    second.close()


def test_an_artefact_of_another_host_model_or_damaged_is_not_used() -> None:
    compiled = compile_model(ZOO["chain"]()[0]).compiled
    other = compile_model(ZOO["gemms"]()[0]).compiled
    made = create(compiled, None, OPTIONS)
    data = made.artefact()
    assert data is not None
    key = artefact.host_key(compiled, optimise=True)
    assert artefact.load(data, key) is not None
    assert artefact.load(data, artefact.host_key(other, optimise=True)) is None
    assert artefact.load(data, artefact.host_key(compiled, optimise=False)) is None
    assert artefact.load(data[: len(data) // 2], key) is None
    assert artefact.load(b"", key) is None
    changed = dataclasses.replace(compiled, activation=other.activation)
    assert artefact.host_key(changed, optimise=True) != key
    create(compiled, None, OPTIONS, data[:100]).close()
    made.close()
