"""The memory of whole weight sets: given out, shared, taken back, and never while somebody may read it."""

from __future__ import annotations

import contextlib
import gc
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_refit.engine.onnxruntime import buffers
from onnx_refit.engine.onnxruntime.backend import OnnxRuntimeBackend
from onnx_refit.engine.onnxruntime.buffers import BufferPool, RackLease
from onnx_refit.engine.onnxruntime.weightset import OnnxRuntimeWeightSet
from onnx_refit.errors import EngineError
from onnx_refit.tensors import Array, TensorSpec
from tests.support.interrupts import Interrupt, at_line, interrupt
from tests.support.janitors import by_hand

from .compiled_by_hand import random_like
from .test_backend import X, backend_of, mlp


def addresses(made: OnnxRuntimeWeightSet) -> set[int]:
    return {buffer.array.ctypes.data for buffer in made.buffers.values()}


def derived(backend: OnnxRuntimeBackend, weights: dict[str, Array], *where: Any) -> OnnxRuntimeWeightSet:
    return backend.derive(weights, *where)


def test_the_memory_of_a_dead_set_comes_back_whole_and_answers_with_what_is_written_next() -> None:
    backend, weights = backend_of(mlp())
    first = derived(backend, weights)
    runner, place = first.runner, addresses(first)
    before = backend.run(first, X)["y"].copy()
    del first
    other = random_like(weights, 3)
    second = derived(backend, other)
    assert second.runner is runner
    assert addresses(second) == place
    fresh, _ = backend_of(mlp())
    assert np.array_equal(backend.run(second, X)["y"], fresh.run(fresh.derive(other), X)["y"])
    assert not np.array_equal(backend.run(second, X)["y"], before)


def test_what_a_partial_refit_shares_is_not_taken_back_with_the_set_that_had_it() -> None:
    backend, weights = backend_of(mlp())
    first = derived(backend, weights)
    changed = {"b1": weights["b1"] + 1}
    second = derived(backend, changed, first, frozenset(changed))
    shared = addresses(second) & addresses(first)
    assert shared
    (own,) = addresses(first) - addresses(second)
    before = backend.run(second, X)["y"].copy()
    del first
    spare = [storage for spares in backend._pool._spare.values() for storage in spares]
    assert [storage.address for storage in spare] == [own]
    assert not backend._pool._racks
    third = derived(backend, random_like(weights, 4))
    assert not addresses(third) & addresses(second)
    assert np.array_equal(backend.run(second, X)["y"], before)


def test_the_same_weights_again_take_no_memory_and_leave_a_rack_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, weights = backend_of(mlp())
    living = [derived(backend, random_like(weights, seed)) for seed in range(2)]
    living.append(derived(backend, {}, living[-1], frozenset()))
    assert addresses(living[2]) == addresses(living[1])
    assert living[2].shared_nbytes == living[2].nbytes
    answer = backend.run(living[2], X)["y"].copy()
    living.append(derived(backend, random_like(weights, 2)))
    monkeypatch.setattr(buffers, "Storage", None)  # from here on there is no new memory
    living.pop(0)  # its memory is spare now
    living.append(derived(backend, random_like(weights, 3)))
    living.pop(0)
    assert not backend._pool._racks, "the same weights are read yet"
    assert np.array_equal(backend.run(living[0], X)["y"], answer)
    living.pop(0)
    assert len(backend._pool._racks) == 1
    derived(backend, random_like(weights, 4))


def test_a_partial_refit_takes_spare_memory_out_of_a_rack() -> None:
    backend, weights = backend_of(mlp())
    first, second = derived(backend, weights), derived(backend, weights)
    place = addresses(second)
    del second
    changed = {"b0": weights["b0"] + 1}
    third = derived(backend, changed, first, frozenset(changed))
    assert (addresses(third) - addresses(first)) <= place
    assert all(len(spare) <= 1 for spare in backend._pool._spare.values())


def test_memory_that_was_half_written_is_not_given_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, weights = backend_of(mlp())
    first = derived(backend, weights)
    second = derived(backend, weights)
    place = addresses(second)
    del second
    with monkeypatch.context() as patch:
        patch.setattr(backend._deriver._workers, "do", lambda *_, **__: (_ for _ in ()).throw(EngineError("cut short")))
        with pytest.raises(EngineError, match="cut short"):
            backend.derive(random_like(weights, 1))
    assert not backend._pool._racks  # a thread that was not waited for may write to it still
    held = [derived(backend, weights) for _ in range(3)]
    assert all(np.array_equal(backend.run(made, X)["y"], backend.run(first, X)["y"]) for made in held)
    assert place  # kept alive until here, so that no new memory lies there by chance


def test_there_is_one_spare_rack_at_most() -> None:
    backend, weights = backend_of(mlp())
    made = [derived(backend, weights) for _ in range(4)]
    del made
    assert len(backend._pool._racks) == 1
    assert not any(backend._pool._spare.values())
    backend._pool.clear()
    assert not backend._pool._racks


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["full", "partial", "same", "drop"]), st.integers(0, 99)), max_size=25))
def test_living_sets_answer_as_they_did_at_first(steps: list[tuple[str, int]]) -> None:
    backend, weights = backend_of(mlp())
    living: list[tuple[OnnxRuntimeWeightSet, Array]] = []
    for step, number in steps:
        if step == "drop" and living:
            living.pop(number % len(living))
        elif step == "partial" and living:
            base = living[number % len(living)][0]
            name = sorted(weights)[number % len(weights)]
            given = {name: random_like(weights, number)[name]}
            made = derived(backend, given, base, frozenset(given))
            living.append((made, backend.run(made, X)["y"].copy()))
        elif step == "same" and living:
            base = living[number % len(living)][0]
            made = derived(backend, {}, base, frozenset())
            living.append((made, backend.run(made, X)["y"].copy()))
        else:
            made = derived(backend, random_like(weights, number))
            living.append((made, backend.run(made, X)["y"].copy()))
        for made, answer in living:
            assert np.array_equal(backend.run(made, X)["y"], answer)
    backend.close()


@pytest.mark.parametrize("step", range(1, 13))
def test_an_interrupt_while_a_rack_is_shared_gives_no_memory_to_two(step: int) -> None:
    backend, weights = backend_of(mlp())
    base, first = derived(backend, weights), derived(backend, weights)
    changed = {"b1": weights["b1"] + 1}
    with at_line(RackLease.share.__code__, step, interrupt), contextlib.suppress(Interrupt):
        derived(backend, changed, first, frozenset(changed))
    del first
    gc.collect()
    derived(backend, changed, base, frozenset(changed))  # takes single storages out of a rack, and gives one back
    assert all(len({id(s) for s in spare}) == len(spare) <= 1 for spare in backend._pool._spare.values())
    living = [derived(backend, random_like(weights, seed)) for seed in range(3)]
    for one, other in itertools.combinations([base, *living], 2):
        assert not addresses(one) & addresses(other)


def test_buffers_taken_just_when_the_janitor_has_looked_keep_what_is_spare_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(buffers, "_SPARE_SECONDS", 1e6)
    pool = BufferPool([TensorSpec("w", "float32", (4,))])
    look = by_hand(pool, buffers._clean, monkeypatch)
    pool.touch()
    pool._expected.until = 0.0
    real = pool.seconds_left
    looked: list[float] = []

    def seconds_left() -> float:
        left = real()
        if not looked:
            pool.touch()  # between its look and what it does then
        looked.append(left)
        return left

    monkeypatch.setattr(pool, "seconds_left", seconds_left)
    look()
    assert pool._used.is_set(), "it would not look again soon"
    pool.take(pool._specs[0])
    look()
    assert pool._spare["w"], "its time is not over"
    assert pool._used.is_set(), "it has to look again"
    pool._expected.until = 0.0
    look()
    assert not pool._spare["w"]
    assert not pool._used.is_set()
