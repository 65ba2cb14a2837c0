"""Every model through the public API: whole and partial refits, versions and rollbacks against fresh baked sessions."""

from __future__ import annotations

import numpy as np
import pytest

import onnx_refit
from onnx_refit.engine.onnxruntime.options import OnnxRuntimeOptions
from onnx_refit.engine.onnxruntime.specialise import specialise
from onnx_refit.model.graph import all_graphs
from onnx_refit.plan.compile import compile_model
from onnx_refit.tensors import Array

from .compiled_by_hand import relative_error
from .test_models import CASES, Live
from .zoo import ZOO


def same(engine: onnx_refit.Engine, live: Live, weights: dict[str, Array], version: int | None = None) -> None:
    outputs = engine.run(live.inputs, version=version)
    for result, wanted in zip(outputs.values(), live.wanted(weights), strict=True):
        assert relative_error(result, wanted) < (2e-3 if live.halves else 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_refits_versions_and_rollbacks(name: str) -> None:
    live = Live(name)  # for its weights and what a baked session gives
    history: dict[int, dict[str, Array]] = {1: live.weights}
    with onnx_refit.load(onnx_refit.build(live.model), keep=6) as engine:
        same(engine, live, live.weights)
        for seed in (1, 2):
            whole = live.other(seed)
            report = engine.refit(whole)
            history[report.version] = whole
            names = sorted(whole)[:: seed + 1]
            part = {key: live.other(seed + 10)[key] for key in names}
            report = engine.refit(part, partial=True)
            history[report.version] = {**whole, **part}
            report.full_speed.wait()
            same(engine, live, history[report.version])
        answers = {version: engine.run(live.inputs, version=version) for version in history}
        for version, weights in history.items():
            same(engine, live, weights, version)
        engine.rollback()
        assert engine.version == len(history) - 1
        for version in (*reversed(history), 1, len(history)):
            engine.rollback(to=version)
            outputs = engine.run(live.inputs)
            assert outputs.version == version
            for key, array in outputs.items():
                assert np.array_equal(array, answers[version][key])
    live.backend.close()


def test_convolutions_of_a_branch_are_blocked_too() -> None:
    model, _ = ZOO["branches"]()
    specialised = specialise(compile_model(model).compiled, OnnxRuntimeOptions(threads=1))
    _, *branches = all_graphs(specialised.model.graph)
    blocked = [node for graph in branches for node in graph.node if node.domain == "com.microsoft.nchwc"]
    sizes = [list(attribute.ints) for node in blocked for attribute in node.attribute if attribute.name == "pads"]
    assert [1, 1, 1, 1] in sizes


def test_what_a_keras_export_turns_and_joins_is_turned_and_joined_at_refit() -> None:
    model, _ = ZOO["keras"]()
    compiled = compile_model(model).compiled
    left = [node.op_type for node in compiled.activation.graph.node]
    assert left.count("Transpose") == 3, "of activations only"
    assert not {"Split", "Concat", "Unsqueeze"} & set(left)
    assert "Mul" not in left, "the fused BatchNorm went into the convolutions"
