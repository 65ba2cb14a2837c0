"""Refits of everything from plain arrays: only addresses are filled in, and nothing else may differ for it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import onnx_refit
from onnx_refit.engine.onnxruntime.batch import Batcher
from onnx_refit.errors import RefitRejectedError
from onnx_refit.moves.library import Library, load
from onnx_refit.refit.check import CheckOptions
from onnx_refit.tensors import Array

from .compiled_by_hand import random_like
from .zoo import Case, chain, convolutions, feed_forward, recurrent

pytestmark = pytest.mark.skipif(not isinstance(load(), Library), reason="no native code was compiled")

CASES = {"feed forward": feed_forward, "chain": chain, "recurrent": recurrent}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How often the short way was gone."""
    seen: list[int] = []
    usual = Batcher.ready_all

    def noting(self: Batcher, *arguments: object) -> object:
        seen.append(1)
        return usual(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Batcher, "ready_all", noting)
    yield seen


def held(engine: onnx_refit.Engine) -> dict[str, Array]:
    return {name: np.array(engine.weights().read(name)) for name in engine.refittable}


def loaded(case: Case, threads: int) -> onnx_refit.Engine:
    options = onnx_refit.EngineOptions(threads)
    return onnx_refit.load(onnx_refit.build(case[0], options=onnx_refit.BuildOptions(engine=options)), options=options)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_it_answers_as_an_engine_that_never_took_the_short_way(name: str, threads: int, quick: list[int]) -> None:
    case = CASES[name]()
    with loaded(case, threads) as engine, loaded(case, threads) as fresh:
        start = held(engine)
        for seed in range(1, 8):
            given = random_like(start, seed)
            kept = {name: array.copy() for name, array in given.items()}
            engine.refit(given)
            for array in given.values():
                array[...] = np.nan  # the caller's arrays are not read any more
            for name, array in kept.items():
                np.testing.assert_array_equal(engine.weights().read(name), array)
            seen = len(quick)
            fresh.refit(kept, CheckOptions(allow_nonfinite=True))
            assert len(quick) == seen, "this one takes the long way"
            for one, two in zip(engine.run(case[1]).values(), fresh.run(case[1]).values(), strict=True):
                np.testing.assert_array_equal(one, two)
        assert len(quick) == 7
        engine.rollback()
        np.testing.assert_array_equal(engine.weights().read(name), random_like(start, 6)[name])


@pytest.mark.parametrize("name", CASES)
def test_each_weight_that_is_not_finite_is_named_and_nothing_changes(name: str, quick: list[int]) -> None:
    case = CASES[name]()
    with loaded(case, 1) as engine:
        good = random_like(held(engine), 1)
        engine.refit(good)
        before = engine.run(case[1])
        for bad in engine.refittable:
            given = random_like(good, 2)
            given[bad].reshape(-1)[-1] = np.inf
            seen = len(quick)
            with pytest.raises(RefitRejectedError, match="not finite") as caught:
                engine.refit(given)
            assert bad in str(caught.value)
            assert len(quick) == seen + 1
            after = engine.run(case[1])
            assert engine.version == before.version
            assert all(np.array_equal(before[key], after[key]) for key in before)
        engine.refit(random_like(good, 3))


def test_after_a_rest_everything_is_written_down_anew(quick: list[int]) -> None:
    case = feed_forward()
    with loaded(case, 1) as engine:
        start = held(engine)
        for seed in range(1, 6):
            given = random_like(start, seed)
            engine.refit(given)
            engine._derivation._packet.clear()
            engine._backend._pool.clear()  # type: ignore[attr-defined]
            for name, array in given.items():
                np.testing.assert_array_equal(engine.weights().read(name), array)
        assert len(quick) == 5


@pytest.mark.parametrize("case", [feed_forward, convolutions])
def test_at_rest_nobody_holds_the_memory_of_small_weights(case: Callable[[], Case]) -> None:
    with loaded(case(), 1) as engine:
        engine.refit(random_like(held(engine), 1))
        packet = engine._derivation._packet
        assert packet._memory is not None
        joined = weakref.ref(packet._memory[0])
        packet.clear()
        engine._backend._deriver.rest()  # type: ignore[attr-defined]
        gc.collect()
        assert joined() is None


def test_where_something_is_kept_or_stays_as_it_is_the_long_way_is_taken(quick: list[int]) -> None:
    with loaded(convolutions(), 1) as engine:
        assert engine._derivation._kept_names, "weights of folded normalisations, some of them large"
        large = [n for n in engine._derivation._kept_names if engine.refittable[n].size > 1 << 13]
        given = random_like(held(engine), 1)
        engine.refit(given)
        assert bool(quick) != bool(large)
    quick.clear()
    with loaded(feed_forward(), 1) as engine:
        given = random_like(held(engine), 1)
        same = next(iter(given))
        given[same] = held(engine)[same]
        report = engine.refit(given)
        assert same in report.unchanged
        assert not quick
        for name, array in given.items():
            np.testing.assert_array_equal(engine.weights().read(name), array)
