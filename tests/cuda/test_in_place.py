"""Refits from tensors on the engine's own device (here the CPU): checked and derived there, never read by the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

import onnx_refit  # noqa: E402
from onnx_refit.engine.cuda.options import CudaOptions, Precision  # noqa: E402
from onnx_refit.engine.registry import EngineOptions  # noqa: E402
from onnx_refit.errors import RefitRejectedError  # noqa: E402
from onnx_refit.weights.open import open_weights  # noqa: E402
from onnx_refit.weights.sources import arrays  # noqa: E402

from .models import make, mlp, random_like, weight  # noqa: E402
from .test_backend import rows, same, wanted  # noqa: E402

pytestmark = pytest.mark.torch


def scaled() -> onnx.ModelProto:
    """A weight that is the product of two: the engine cannot give these back."""
    return make(
        [
            helper.make_node("Mul", ["w", "s"], ["ws"]),
            helper.make_node("MatMul", ["x", "ws"], ["a"]),
            helper.make_node("Add", ["a", "b"], ["y"]),
        ],
        {"x": ["N", 8]},
        {"y": ["N", 4]},
        w=weight("w", 8, 4),
        s=weight("s", 1, 4),
        b=weight("b", 4),
    )


def load(model: onnx.ModelProto, **options: Any) -> tuple[Any, dict[str, Any]]:
    plan = onnx_refit.build(model, engine="cuda", options=onnx_refit.BuildOptions(specialise=False))
    assert plan.weights is not None
    engine = onnx_refit.load(plan, options=EngineOptions(cuda=CudaOptions(devices=("cpu",), **options)))
    return engine, dict(plan.weights)


def tensors(values: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(np.array(value)) for name, value in values.items()}


@pytest.fixture
def no_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(value: object, *, where: str) -> Any:
        raise AssertionError(f"{where} was read by the host")

    monkeypatch.setattr(arrays, "to_array", fail)
    yield


@pytest.mark.parametrize("make_model", [mlp, scaled])
def test_nothing_is_read_by_the_host(make_model: Any, no_host: None) -> None:
    engine, weights = load(make_model())
    x = rows(3)
    with engine:
        values = random_like(weights, 3)
        given = tensors(values)
        report = engine.refit(given)
        assert set(report.changed) == set(weights)
        for tensor in given.values():
            tensor.zero_()  # the trainer goes on
        assert same(engine.run(x)["y"], wanted(make_model(), values, x)[0])
        read = engine.weights()
        assert all(np.array_equal(read.read(name), values[name]) for name in values)
        engine.rollback()
        assert same(engine.run(x)["y"], wanted(make_model(), weights, x)[0])


def test_weights_that_did_not_change_are_found(no_host: None) -> None:
    engine, weights = load(mlp())
    with engine:
        given = tensors(weights)
        assert engine.refit(given).changed == ()
        given["w1"][-1, -1] += 1
        report = engine.refit(given)
        assert report.changed == ("w1",)
        assert set(report.unchanged) == {"w0", "b0"}
        assert np.array_equal(engine.weights().read("w1"), given["w1"].numpy())


def test_kept_weights_that_did_not_change_are_found() -> None:
    engine, weights = load(scaled())
    with engine:
        given = tensors(weights)
        given["b"] += 1
        assert engine.refit(given).changed == ("b",)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_with_its_place(value: float) -> None:
    engine, weights = load(mlp())
    x = rows(2)
    with engine:
        before = engine.run(x)["y"]
        given = tensors(random_like(weights, 4))
        given["w1"][2, 1] = value
        with pytest.raises(RefitRejectedError, match=r"\[2, 1\]"):
            engine.refit(given)
        assert np.array_equal(engine.run(x)["y"], before)
        options = onnx_refit.CheckOptions(allow_nonfinite=True)
        assert engine.refit(given, options).version == 2


def test_other_dtypes_partial_sets_and_extra_tensors_take_the_usual_way() -> None:
    engine, weights = load(mlp())
    x = rows(2)
    with engine:
        values = random_like(weights, 5)
        half = {name: tensor.to(torch.float16) for name, tensor in tensors(values).items()}
        engine.refit(half)
        rounded = {name: tensor.to(torch.float32).numpy() for name, tensor in half.items()}
        assert same(engine.run(x)["y"], wanted(mlp(), rounded, x)[0])
        other = values["b0"] + 1
        engine.refit({"b0": torch.from_numpy(other)}, partial=True)
        assert same(engine.run(x)["y"], wanted(mlp(), {**rounded, "b0": other}, x)[0])
        report = engine.refit({**tensors(values), "optimizer": torch.zeros(3)})
        assert [unused.name for unused in report.check.unused] == ["optimizer"]
        assert same(engine.run(x)["y"], wanted(mlp(), values, x)[0])


def test_a_partial_refit_after_one_in_place_finds_the_weights_it_needs() -> None:
    engine, weights = load(scaled())
    x = rows(2)
    with engine:
        values = random_like(weights, 6)
        engine.refit(tensors(values))
        s = values["s"] * 2
        engine.refit({"s": s}, partial=True)
        assert same(engine.run(x)["y"], wanted(scaled(), {**values, "s": s}, x)[0])


def test_an_opened_source_is_good_for_many_refits(no_host: None) -> None:
    engine, weights = load(mlp())
    x = rows(2)
    with engine:
        given = tensors(weights)
        source = open_weights(given)
        for _ in range(3):
            for tensor in given.values():
                tensor.mul_(0.5)
            engine.refit(source)
            now = {name: tensor.numpy() for name, tensor in given.items()}
            assert same(engine.run(x)["y"], wanted(mlp(), now, x)[0])


def test_versions_go_to_the_store(tmp_path: Path) -> None:
    plan = onnx_refit.build(scaled(), engine="cuda", options=onnx_refit.BuildOptions(specialise=False))
    options = EngineOptions(cuda=CudaOptions(devices=("cpu",)))
    assert plan.weights is not None
    values = random_like(dict(plan.weights), 8)
    with onnx_refit.load(plan, options=options, store=tmp_path / "store") as engine:
        engine.refit(tensors(values))
    with onnx_refit.load(plan, options=options, store=tmp_path / "store") as engine:
        read = engine.weights()
        assert engine.version == 2
        assert all(np.array_equal(read.read(name), values[name]) for name in values)


def test_half_precision_keeps_the_originals() -> None:
    engine, weights = load(mlp(), precision=Precision.BF16)
    with engine:
        values = random_like(weights, 9)
        engine.refit(tensors(values))
        read = engine.weights()
        assert all(np.array_equal(read.read(name), values[name]) for name in values)


def test_a_group_takes_them_from_its_first_device(no_host: None) -> None:
    plan = onnx_refit.build(mlp(), engine="cuda", options=onnx_refit.BuildOptions(specialise=False))
    assert plan.weights is not None
    x = rows(2)
    with onnx_refit.load(plan, options=EngineOptions(cuda=CudaOptions(devices=("cpu",) * 2))) as engine:
        values = random_like(dict(plan.weights), 2)
        engine.refit(tensors(values))
        for _ in range(4):
            assert same(engine.run(x)["y"], wanted(mlp(), values, x)[0])
