"""Tensors that come again, bound or in a mapping: recognised, read at each refit, and held no longer than they must.

Each test runs on PyTorch's CPU device, where operators stand in for kernels, and again on a GPU under its mark.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

import onnx_refit  # noqa: E402
from onnx_refit.engine.cuda.options import CudaOptions  # noqa: E402
from onnx_refit.engine.registry import EngineOptions  # noqa: E402
from onnx_refit.errors import RefitError, RefitRejectedError  # noqa: E402
from onnx_refit.refit.check import CheckOptions  # noqa: E402

from .models import mlp, random_like  # noqa: E402
from .taken import MODELS, bits, by_host, loaded, planned, same, sources, there  # noqa: E402
from .test_in_place import scaled  # noqa: E402
from .test_together import normalised  # noqa: E402

pytestmark = pytest.mark.torch


def test_the_same_tensors_are_recognised_and_others_are_not(device: str) -> None:
    plan = planned(mlp())
    assert plan.weights is not None
    tensors = there(random_like(dict(plan.weights), 11), device)
    with loaded(plan, device) as engine:
        in_place = engine._derivation.in_place
        engine.refit(tensors)
        known = in_place._recent[0]

        def again(given: dict[str, Any]) -> bool:
            """Whether a refit looked at nothing anew; its weights are what was given."""
            before = in_place._recent[0]
            engine.refit(given)
            assert same(sources(engine), {n: t.cpu().numpy() for n, t in given.items() if n in plan.refittable})
            return in_place._recent[0] is before

        for tensor in tensors.values():
            tensor.add_(1)
        assert again(tensors)
        assert again({name: tensor.detach() for name, tensor in tensors.items()})  # a new mapping of new tensors
        assert in_place._recent[0] is known
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


def test_two_sets_of_tensors_that_take_turns_are_looked_at_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(scaled())
    assert plan.weights is not None
    turns = [there(random_like(dict(plan.weights), seed), device) for seed in range(6)]
    with loaded(plan, device) as engine:
        looked = []
        attach = engine._backend.attach

        def counting(*given: Any, **options: Any) -> Any:
            looked.append(given)
            return attach(*given, **options)

        monkeypatch.setattr(engine._backend, "attach", counting)
        for turn in range(12):
            given = turns[turn % 2]
            for tensor in given.values():
                tensor.mul_(1.5)
            engine.refit(given)
            assert same(sources(engine), {name: tensor.cpu().numpy() for name, tensor in given.items()})
        assert len(looked) == 2
        for given in turns:  # more than are remembered
            engine.refit(given)
        assert len(engine._derivation.in_place._recent) == 4


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
