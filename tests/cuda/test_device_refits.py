"""Refits from a trainer's tensors, however they lie and are named: the same bits as by the host, and none read there.

Each test runs on PyTorch's CPU device, where operators stand in for kernels, and again on a GPU under its mark.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from onnx_refit.engine.cuda.options import Precision  # noqa: E402
from onnx_refit.errors import RefitRejectedError  # noqa: E402
from onnx_refit.refit.check import Casting, CheckOptions  # noqa: E402
from onnx_refit.weights.open import open_weights  # noqa: E402
from onnx_refit.weights.rules import Rules  # noqa: E402

from .models import make, mlp, random_like, weight  # noqa: E402
from .taken import MODELS, bits, by_host, loaded, planned, same, sources, there  # noqa: E402
from .test_in_place import scaled  # noqa: E402
from .test_together import normalised  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("make_model", MODELS)
@pytest.mark.parametrize("precision", list(Precision))
def test_the_bits_are_those_that_the_host_gives(
    make_model: Any, precision: Precision, device: str, no_host: None
) -> None:
    plan = planned(make_model())
    assert plan.weights is not None
    values = random_like(dict(plan.weights), 3)
    expected = by_host(plan, device, values, precision=precision)
    tensors = there(values, device)
    with loaded(plan, device, precision=precision) as engine:
        for _ in range(3):
            engine.refit(tensors)
            assert bits(engine) == expected
            assert same(sources(engine), values)
            for tensor in tensors.values():
                tensor.mul_(0.5)
            engine.refit(tensors)
            for tensor in tensors.values():
                tensor.mul_(2)


@pytest.mark.parametrize("make_model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts(make_model: Any, dtype: Any, device: str, no_host: None) -> None:
    plan = planned(make_model())
    assert plan.weights is not None
    given = there(random_like(dict(plan.weights), 4), device, dtype)
    declared = {name: tensor.to(torch.float32).cpu().numpy() for name, tensor in given.items()}
    if dtype is torch.float64:
        given = {name: torch.from_numpy(value).to(device).to(dtype) for name, value in declared.items()}
    with loaded(plan, device) as engine:
        report = engine.refit(given)
        assert {one.stored_dtype for one in report.check.accepted} == {str(dtype).removeprefix("torch.")}
        assert bits(engine) == by_host(plan, device, declared)
        assert same(sources(engine), declared)


def half_model() -> onnx.ModelProto:
    """A product whose weight is float16 in the model."""
    nodes = [helper.make_node("Cast", ["w"], ["wide"], to=1), helper.make_node("MatMul", ["x", "wide"], ["y"])]
    tensor = onnx.numpy_helper.from_array(np.ones((8, 4), np.float16), "w")
    return make(nodes, {"x": ["N", 8]}, {"y": ["N", 4]}, w=tensor)


@pytest.mark.parametrize("rounding", [False, True])
def test_casts_that_lose_something_are_allowed_or_refused_as_by_the_host(rounding: bool, device: str) -> None:
    plan = planned(half_model())
    options = CheckOptions(casting=Casting.ROUND if rounding else Casting.LOSSLESS)
    exact = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float16).astype(np.float32)
    with loaded(plan, device) as engine:
        engine.refit({"w": torch.from_numpy(exact).to(device)}, options)
        assert same(sources(engine), {"w": exact.astype(np.float16)})
        inexact = exact + np.float32(1e-5)
        if rounding:
            engine.refit({"w": torch.from_numpy(inexact).to(device)}, options)
            assert same(sources(engine), {"w": inexact.astype(np.float16)})
        else:
            with pytest.raises(RefitRejectedError, match="do not fit into float16"):
                engine.refit({"w": torch.from_numpy(inexact).to(device)}, options)
        large = exact.copy()
        large[3, 1] = 1e6
        with pytest.raises(RefitRejectedError, match=r"\[3, 1\]"):
            engine.refit({"w": torch.from_numpy(large).to(device)}, options)


def turned(tensor: Any) -> Any:
    """The same values in another order of elements."""
    return tensor if tensor.dim() < 2 else tensor.transpose(0, -1).contiguous().transpose(0, -1)


def spread(tensor: Any) -> Any:
    """The same values, every third element of a larger tensor."""
    wide = tensor.new_full((*tensor.shape, 3), float("nan"))
    wide[..., 1] = tensor
    return wide[..., 1]


def shifted(tensor: Any) -> Any:
    """The same values at an address that allows no wide loads."""
    return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)


@pytest.mark.parametrize("make_model", MODELS)
@pytest.mark.parametrize("lay", [turned, spread, shifted])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_other_orders_of_elements(make_model: Any, lay: Any, dtype: Any, device: str, no_host: None) -> None:
    plan = planned(make_model())
    assert plan.weights is not None
    given = {n: lay(tensor) for n, tensor in there(random_like(dict(plan.weights), 5), device, dtype).items()}
    declared = {name: tensor.to(torch.float32).cpu().numpy() for name, tensor in given.items()}
    with loaded(plan, device) as engine:
        for _ in range(2):
            assert set(engine.refit(given).changed) | {"nothing"}
            assert bits(engine) == by_host(plan, device, declared)
        assert engine.refit(given).changed == ()


def test_channels_last_and_repeated_elements(device: str, no_host: None) -> None:
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"])]
    model = make(nodes, {"x": ["N", 6, 5, 5]}, {"y": ["N", 4, None, None]}, w=weight("w", 4, 6, 3, 2), b=weight("b", 4))
    plan = planned(model)
    given: dict[str, Any] = {
        "w": torch.randn(4, 6, 3, 2, device=device).to(memory_format=torch.channels_last),
        "b": torch.ones(1, device=device).expand(4),
    }
    with loaded(plan, device) as engine:
        engine.refit(given)
        assert same(sources(engine), {name: tensor.cpu().numpy() for name, tensor in given.items()})


@pytest.mark.parametrize("make_model", MODELS)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_partial_sets(make_model: Any, precision: Precision, device: str, no_host: None) -> None:
    plan = planned(make_model())
    assert plan.weights is not None
    names = list(plan.weights)
    values = random_like(dict(plan.weights), 6)
    with loaded(plan, device, precision=precision) as engine:
        engine.refit(there(values, device))
        for turn in range(2 * len(names)):
            some = names[turn % len(names) :][:2]
            values |= random_like({name: values[name] for name in some}, 10 + turn)
            report = engine.refit(there({name: values[name] for name in some}, device), partial=True)
            assert set(report.changed) == set(some)
            assert [one.name for one in report.check.missing] == [name for name in names if name not in some]
            assert same(sources(engine), values)
            assert bits(engine) == by_host(plan, device, values, precision=precision)
        engine.rollback()


def test_a_partial_set_after_what_is_kept_moved_to_disk(device: str) -> None:
    plan = planned(scaled())
    assert plan.weights is not None
    values = random_like(dict(plan.weights), 7)
    with loaded(plan, device) as engine:
        engine.refit(there(values, device))
        retainer = engine._derivation._retainer
        retainer._deadline = 0.0
        retainer.cool()
        values["s"] = values["s"] * 2
        engine.refit(there({"s": values["s"]}, device), partial=True)
        assert same(sources(engine), values)
        assert bits(engine) == by_host(plan, device, values)
        again = there(values, device)
        assert engine.refit(again).changed == ()


def test_a_partial_set_on_a_version_that_came_from_the_host(device: str, no_host: None) -> None:
    plan = planned(normalised())
    assert plan.weights is not None
    values = random_like(dict(plan.weights), 8)
    name = next(iter(values))
    with loaded(plan, device) as engine:
        engine.refit(values)
        values[name] = values[name] + 1
        engine.refit(there({name: values[name]}, device), partial=True)
        assert bits(engine) == by_host(plan, device, values)


def test_a_partial_set_with_a_misspelt_name_is_refused(device: str) -> None:
    plan = planned(mlp())
    assert plan.weights is not None
    values = there(random_like(dict(plan.weights), 9), device)
    with loaded(plan, device) as engine:
        before = bits(engine)
        with pytest.raises(RefitRejectedError, match="no weight of the model"):
            engine.refit({"b0": values["b0"], "w_1": values["w1"]}, partial=True)
        with pytest.raises(RefitRejectedError, match="missing"):
            engine.refit({"b0": values["b0"]})
        assert bits(engine) == before


def test_rules(device: str, no_host: None) -> None:
    plan = planned(mlp())
    assert plan.weights is not None
    values = random_like(dict(plan.weights), 10)
    tensors = there({f"module.{name}": value for name, value in values.items()}, device)
    rules = Rules.parse('[[rename]]\nprefix = "module."\nto = ""')
    with loaded(plan, device) as engine:
        report = engine.refit(rules.apply(open_weights(tensors)))
        assert report.check.accepted[0].checkpoint_names == ("module.w0",)
        assert same(sources(engine), values)
        bound = engine.bind(rules.apply(open_weights(tensors)))
        for tensor in tensors.values():
            tensor.mul_(0.5)
        engine.refit(bound)
        assert same(sources(engine), {name: value * np.float32(0.5) for name, value in values.items()})


def exported() -> tuple[onnx.ModelProto, dict[str, Any]]:
    """A model whose weights are made of a checkpoint's in several ways, and that checkpoint."""
    rng = np.random.default_rng(2)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    checkpoint = {
        "first.weight": normal(16, 8),
        "first.bias": normal(16),
        "qkv": normal(12, 16),
        "norm.weight": normal(6) + 3,
        "norm.bias": normal(6),
        "norm.running_mean": normal(6),
        "norm.running_var": np.abs(normal(6)) + 1,
        "conv.weight": normal(6, 4, 1, 1),
        "left": normal(5, 4),
        "right": normal(3, 4),
    }
    epsilon = np.float32(1e-5)
    scale = checkpoint["norm.weight"] / np.sqrt(checkpoint["norm.running_var"] + epsilon)
    folded = checkpoint["conv.weight"] * scale.reshape(-1, 1, 1, 1)
    bias = (0 - checkpoint["norm.running_mean"]) * scale + checkpoint["norm.bias"]
    tensors = {
        "w": np.ascontiguousarray(checkpoint["first.weight"].T),
        "b": checkpoint["first.bias"],
        "q": np.ascontiguousarray(checkpoint["qkv"][4:8].T),
        "c": folded,
        "cb": bias,
        "both": np.concatenate([checkpoint["left"], checkpoint["right"]]),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "b"], ["d"]),
        helper.make_node("MatMul", ["d", "q"], ["e"]),
        helper.make_node("Reshape", ["e", "shape"], ["f"]),
        helper.make_node("Conv", ["f", "c", "cb"], ["g"]),
        helper.make_node("MatMul", ["x", "both"], ["h"]),
        helper.make_node("ReduceSum", ["g"], ["s"]),
        helper.make_node("Add", ["h", "s"], ["y"]),
    ]
    shape = onnx.numpy_helper.from_array(np.array([-1, 4, 1, 1]), "shape")
    made = {name: onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()}
    return make(nodes, {"x": ["N", 8]}, {"y": ["N", 4]}, shape=shape, **made), checkpoint


def test_names_of_a_checkpoint_and_what_an_exporter_did(device: str, no_host: None) -> None:
    model, checkpoint = exported()
    plan = planned(model, checkpoint)
    assert plan.names is not None and not plan.names.unmatched
    kinds = {type(entry).__name__ for entry in plan.names.entries.values()}
    assert {"Transpose", "Concat", "BatchNormFold"} <= kinds
    values = {name: np.abs(array) + np.float32(0.5) for name, array in checkpoint.items()}
    with loaded(plan, device) as host:
        host.refit(values)
        expected, read = bits(host), sources(host)
    tensors = there(values, device)
    with loaded(plan, device) as engine:
        for _ in range(2):
            engine.refit(tensors)
            assert bits(engine) == expected
            assert same(sources(engine), read)
        some = {name: tensors[name] * 2 for name in ("first.weight", "left", "right")}
        engine.refit(some, partial=True)
        with loaded(plan, device) as host:
            host.refit({**values, **{name: value.cpu().numpy() for name, value in some.items()}})
            assert bits(engine) == bits(host)
