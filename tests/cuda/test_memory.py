"""Memory that goes from one version to the next refit: only when nobody can read it any more."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from onnx_refit.engine.cuda.memory import _LARGEST, Recycled  # noqa: E402

from .models import random_like  # noqa: E402
from .taken import MODELS, loaded, planned, there  # noqa: E402
from .test_backend import rows  # noqa: E402

pytestmark = pytest.mark.torch


def raw(tensor: Any) -> Any:
    return tensor.contiguous().view(-1).view(torch.uint8)


def test_what_nobody_holds_is_used_again() -> None:
    recycled = Recycled(64, "cpu")
    first, second = recycled.memory(), recycled.memory()
    assert first.address != second.address
    address = first.address
    del first
    third = recycled.memory()
    assert third.address == address == third.storage.data_ptr()
    del second, third
    assert len(recycled._spare) == 1, "more than one would be memory that no refit wants"
    recycled.clear()
    assert not recycled._spare


def test_what_somebody_may_read_is_not() -> None:
    recycled = Recycled(64, "cpu")
    memory = recycled.memory()
    view = memory.storage[:8].fill_(7)
    memory.keep()
    del memory
    recycled.memory().storage.fill_(1)
    assert view.tolist() == [7] * 8
    large = Recycled(_LARGEST + 1, "meta")
    del large.memory().storage
    assert not large._spare


@pytest.mark.parametrize("make_model", MODELS)
def test_a_weight_that_was_looked_at_outlives_its_version(make_model: Any, device: str) -> None:
    plan = planned(make_model())
    assert plan.weights is not None
    tensors = there(random_like(dict(plan.weights), 1), device)
    with loaded(plan, device) as engine:
        bound = engine.bind(tensors)
        engine.refit(bound)
        held = engine._versions.current.weights
        seen = {name: held.view(name) for name in held.places}
        before = {name: raw(tensor).clone() for name, tensor in seen.items()}
        kept = engine._versions.current.retained
        aside = {name: kept.holder(name).there(name) for name in kept if hasattr(kept.holder(name), "there")}
        was = {name: raw(tensor).clone() for name, tensor in aside.items()}
        del held, kept
        for _ in range(8):
            for tensor in tensors.values():
                tensor.mul_(0.5).add_(1.0)
            engine.refit(bound)
        assert all(torch.equal(raw(seen[name]), before[name]) for name in seen)
        assert all(torch.equal(raw(aside[name]), was[name]) for name in aside)


@pytest.mark.gpu
@pytest.mark.parametrize("make_model", MODELS)
def test_a_few_refits_take_turns_in_the_same_memory(make_model: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    plan = planned(make_model())
    assert plan.weights is not None
    tensors = there(random_like(dict(plan.weights), 1), "cuda:0")
    with loaded(plan, "cuda:0") as engine:
        bound = engine.bind(tensors)
        addresses = set()
        for _ in range(12):
            for tensor in tensors.values():
                tensor.add_(1.0)
            engine.refit(bound)
            addresses.add(engine._versions.current.weights.arena.storage.data_ptr())
        assert len(addresses) == 3, "two versions and the next one"


@pytest.mark.gpu
def test_a_request_that_fails_keeps_what_its_copy_may_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    plan = planned(MODELS[0]())
    assert plan.weights is not None
    tensors = there(random_like(dict(plan.weights), 1), "cuda:0")
    with loaded(plan, "cuda:0") as engine:
        bound = engine.bind(tensors)
        engine.refit(bound)
        failed = engine._versions.current.weights.arena.storage

        def fail(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(engine._backend.runner, "_recording", fail)
            with pytest.raises(KeyboardInterrupt):
                engine.run(rows(2))
        for _ in range(6):
            for tensor in tensors.values():
                tensor.add_(1.0)
            engine.refit(bound)
            assert engine._versions.current.weights.arena.storage.data_ptr() != failed.data_ptr()
