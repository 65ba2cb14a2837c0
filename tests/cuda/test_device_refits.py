"""Refits from a trainer's tensors, however they lie and are named: the same bits as by the host, and none read there.

Each test runs on PyTorch's CPU device, where operators stand in for kernels, and again on a GPU under its mark.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
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
from onnx_refit.errors import RefitError, RefitRejectedError  # noqa: E402
from onnx_refit.plan.plan import Plan  # noqa: E402
from onnx_refit.refit.check import Casting, CheckOptions  # noqa: E402
from onnx_refit.weights.open import open_weights  # noqa: E402
from onnx_refit.weights.rules import Rules  # noqa: E402
from onnx_refit.weights.sources import arrays  # noqa: E402

from .models import make, mlp, random_like, weight  # noqa: E402
from .test_in_place import scaled  # noqa: E402
from .test_together import normalised  # noqa: E402

pytestmark = pytest.mark.torch

DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    where: str = request.param
    if where != "cpu" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return where


@pytest.fixture
def no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(value: object, *, where: str) -> Any:
        raise AssertionError(f"{where} was read by the host")

    monkeypatch.setattr(arrays, "to_array", fail)


def planned(model: onnx.ModelProto, checkpoint: Any = None) -> Plan:
    options = onnx_refit.BuildOptions(specialise=False)
    return onnx_refit.build(model, engine="cuda", checkpoint=checkpoint, options=options)


def loaded(plan: Plan, device: str, **options: Any) -> Any:
    return onnx_refit.load(plan, options=EngineOptions(cuda=CudaOptions(devices=(device,), measure=False, **options)))


def there(values: dict[str, Any], device: str, dtype: Any = None) -> dict[str, Any]:
    tensors = {name: torch.from_numpy(np.array(value)).to(device) for name, value in values.items()}
    return tensors if dtype is None else {name: tensor.to(dtype) for name, tensor in tensors.items()}


def bits(engine: Any) -> dict[str, Any]:
    """Every engine weight of the current version, as bytes."""
    held = engine._versions.current.weights
    return {n: held.view(n).contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes() for n in held.places}


def by_host(plan: Plan, device: str, values: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The engine weights that host arrays give."""
    with loaded(plan, device, **options) as engine:
        engine.refit(values, CheckOptions(casting=Casting.ROUND))
        return bits(engine)


def sources(engine: Any) -> dict[str, Any]:
    read = engine.weights()
    return {name: read.read(name) for name in read.specs}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


MODELS: list[Callable[[], onnx.ModelProto]] = [mlp, scaled, normalised]


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


def test_the_same_tensors_are_recognised_and_others_are_not(device: str) -> None:
    plan = planned(mlp())
    assert plan.weights is not None
    tensors = there(random_like(dict(plan.weights), 11), device)
    with loaded(plan, device) as engine:
        in_place = engine._derivation.in_place
        engine.refit(tensors)
        known = in_place._last

        def again(given: dict[str, Any]) -> bool:
            """Whether a refit looked at nothing anew; its weights are what was given."""
            before = in_place._last
            engine.refit(given)
            assert same(sources(engine), {n: t.cpu().numpy() for n, t in given.items() if n in plan.refittable})
            return in_place._last is before

        for tensor in tensors.values():
            tensor.add_(1)
        assert again(tensors)
        assert again({name: tensor.detach() for name, tensor in tensors.items()})  # a new mapping of new tensors
        assert in_place._last is known
        tensors["w0"].data = tensors["w0"].data.clone()  # another address
        assert not again(tensors)
        assert again(tensors)
        tensors["w1"].data = tensors["w1"].data.view(4, 16).t()  # the same address in another order
        assert not again(tensors)
        tensors["w1"].data = tensors["w1"].data.contiguous().to(torch.float64)
        assert not again(tensors)
        assert not again({**tensors, "counter": torch.zeros(1, dtype=torch.int64, device=device)})
        with pytest.raises(RefitRejectedError, match="shape"):
            engine.refit({**tensors, "b0": tensors["b0"][:8]})


def test_nothing_of_a_mapping_is_kept_alive(device: str) -> None:
    plan = planned(mlp())
    assert plan.weights is not None
    tensors = there(random_like(dict(plan.weights), 12), device)
    with loaded(plan, device) as engine:
        engine.refit(tensors)
        engine.refit(tensors)
        alive = [weakref.ref(tensor) for tensor in tensors.values()]
        del tensors
        gc.collect()
        left = [found for reference in alive if (found := reference()) is not None]
        assert not left, [type(holder) for one in left for holder in gc.get_referrers(one)]


@pytest.mark.parametrize("make_model", MODELS)
def test_bound_tensors(make_model: Any, device: str, no_host: None) -> None:
    plan = planned(make_model())
    assert plan.weights is not None
    values = random_like(dict(plan.weights), 13)
    tensors = there(values, device)
    with loaded(plan, device) as engine, loaded(plan, device) as other:
        bound = engine.bind(tensors)
        assert dict(bound) == tensors and len(bound) == len(tensors)
        for turn in range(3):
            for tensor in tensors.values():
                tensor.mul_(0.5)
            report = engine.refit(bound)
            assert report.version == turn + 2 and set(report.changed) == set(tensors)
            now = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
            assert same(sources(engine), now)
            assert bits(engine) == by_host(plan, device, now)
        other.refit(bound)  # a mapping like any other there
        assert bits(other) == bits(engine)
        with engine.stage(bound) as staged:
            assert staged.candidate.changed == frozenset()
        name = next(iter(tensors))
        tensors[name].data = tensors[name].data + 1  # elsewhere: looked at anew
        engine.refit(bound)
        assert same(sources(engine), {n: tensor.cpu().numpy() for n, tensor in tensors.items()})


def test_what_was_bound_is_given_back_with_it(device: str) -> None:
    plan = planned(mlp())
    assert plan.weights is not None
    tensors = there(random_like(dict(plan.weights), 20), device)
    with loaded(plan, device) as engine:
        bound = engine.bind(tensors)
        engine.refit(bound)
        known = weakref.ref(bound.known.attached)
        del bound
        gc.collect()
        assert known() is None


def test_many_refits_in_a_row_from_two_streams(device: str) -> None:
    plan = planned(mlp())
    assert plan.weights is not None
    tensors = there(random_like(dict(plan.weights), 22), device)
    streams = [None] if device == "cpu" else [None, torch.cuda.Stream(device)]
    with loaded(plan, device) as engine:
        bound = engine.bind(tensors)
        for turn in range(200):
            with torch.cuda.stream(streams[turn % len(streams)]):
                for tensor in tensors.values():
                    tensor.add_(1.0)
                engine.refit(bound)
                # At once, elsewhere: what a request on its own stream sees.
                assert same(sources(engine), {name: tensor.cpu().numpy() for name, tensor in tensors.items()})


def test_bound_tensors_that_are_not_finite_are_refused(device: str) -> None:
    plan = planned(mlp())
    assert plan.weights is not None
    tensors = there(random_like(dict(plan.weights), 14), device)
    with loaded(plan, device) as engine:
        bound = engine.bind(tensors)
        engine.refit(bound)
        before = bits(engine)
        for name, at in (("w0", (3, 2)), ("b0", (15,)), ("w1", (15, 3))):
            kept = tensors[name][at].clone()
            for value in (float("nan"), float("inf"), float("-inf")):
                tensors[name][at] = value
                with pytest.raises(RefitRejectedError, match=str(list(at)).replace("[", r"\[").replace("]", r"\]")):
                    engine.refit(bound)
                assert bits(engine) == before
            tensors[name][at] = kept
        assert engine.refit(bound).changed == ()
        loose = engine.bind(tensors, CheckOptions(allow_nonfinite=True))
        tensors["b0"][0] = float("nan")
        assert engine.refit(loose).changed == ("b0",)


def test_what_cannot_be_bound_is_refused(device: str) -> None:
    plan = planned(mlp())
    assert plan.weights is not None
    with loaded(plan, device) as engine:
        with pytest.raises(RefitError, match="cannot be bound"):
            engine.bind(dict(plan.weights))
        with pytest.raises(RefitError, match="cannot be bound"):
            engine.bind({"w0": torch.zeros(16, 8, device=device)})
        some = engine.bind({"b0": torch.zeros(16, device=device)}, partial=True)
        assert engine.refit(some).changed == ("b0",)


def test_frozen_weights_are_found_unchanged(device: str, no_host: None) -> None:
    for model in (mlp(), scaled(), normalised()):
        plan = planned(model)
        assert plan.weights is not None
        tensors = there(random_like(dict(plan.weights), 15), device)
        first = next(iter(tensors))
        with loaded(plan, device) as engine:
            engine.refit(tensors)
            tensors[first].view(-1)[-1] += 1  # perhaps none of its samples
            assert engine.refit(tensors).changed == (first,)
            assert engine.refit(tensors).changed == ()


@pytest.mark.parametrize("make_model", MODELS)
@pytest.mark.parametrize("second", ["cpu", pytest.param("cuda:1", marks=pytest.mark.gpu)])
def test_every_device_of_a_group_has_what_the_first_one_takes(make_model: Any, second: str) -> None:
    if second != "cpu" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    devices = ("cpu" if second == "cpu" else "cuda:0", second)
    plan = planned(make_model())
    assert plan.weights is not None
    values = random_like(dict(plan.weights), 16)
    name = next(iter(values))

    def alike(engine: Any) -> None:
        held = engine._versions.current.weights
        expected = by_host(plan, devices[0], values)
        for member in held.members:
            found = {n: member.view(n).contiguous().view(-1).view(torch.uint8).cpu().numpy() for n in member.places}
            assert {n: array.tobytes() for n, array in found.items()} == expected

    options = EngineOptions(cuda=CudaOptions(devices=devices, measure=False))
    with onnx_refit.load(plan, options=options) as engine:
        tensors = there(values, devices[0])
        for given in (tensors, engine.bind(tensors)):
            engine.refit(given)
            alike(engine)
        values[name] = values[name] * 2
        assert engine.refit(there({name: values[name]}, devices[0]), partial=True).changed == (name,)
        alike(engine)
        assert engine.refit(there(values, devices[0])).changed == ()
        tensors[name].view(-1)[-1] = float("nan")
        with pytest.raises(RefitRejectedError):
            engine.refit(tensors)
        alike(engine)
