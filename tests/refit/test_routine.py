"""Usual refits, seen in one call: nothing may differ from those that take the general way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import numpy as np
import pytest

import onnx_refit
from onnx_refit.errors import RefitRejectedError
from onnx_refit.moves.library import Library, load
from onnx_refit.refit.check import CheckOptions
from onnx_refit.refit.routine import Routine, Seen
from onnx_refit.tensors import Array
from tests.engine.compiled_by_hand import random_like
from tests.engine.zoo import Case, branches, convolutions, feed_forward, half, recurrent, tied

pytestmark = pytest.mark.skipif(not isinstance(load(), Library), reason="no native code was compiled")

CASES: Mapping[str, Callable[[], Case]] = {
    "feed forward": feed_forward,
    "normalised": convolutions,
    "recurrent": recurrent,
    "branches": branches,
    "tied": tied,
    "half": half,
}


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each refit whether it was a usual one."""
    found: list[bool] = []
    see = Routine.see

    def noting(self: Routine, *arguments: object) -> Seen | None:
        seen = see(self, *arguments)  # type: ignore[arg-type]
        found.append(seen is not None)
        return seen

    monkeypatch.setattr(Routine, "see", noting)
    yield found


def held(engine: onnx_refit.Engine) -> dict[str, Array]:
    return {name: np.array(engine.weights().read(name)) for name in engine.refittable}


def loaded(case: Case) -> onnx_refit.Engine:
    return onnx_refit.load(onnx_refit.build(case[0]), keep=3)


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_the_general_way_makes_of_the_same_weights(name: str, usual: list[bool]) -> None:
    case = CASES[name]()
    with loaded(case) as engine, loaded(case) as general:
        start = held(engine)
        for seed in range(1, 5):
            given = random_like(start, seed)
            turned = dict(reversed(given.items())) if seed % 2 else given
            options = CheckOptions() if seed == 3 else None
            one, two = engine.refit(turned, options), general.refit(MappingProxyType(given), options)
            assert usual == [True, False]
            usual.clear()
            assert one.check is not None
            assert two.check is not None
            assert one.check.to_json() == two.check.to_json()
            first, second = one.to_json(), two.to_json()
            for report in (first, second):
                assert report.pop("seconds").keys() >= {"check", "derive", "commit"}
                del report["total_seconds"], report["full_speed"]
            assert first == second
            for weight, array in given.items():
                np.testing.assert_array_equal(engine.weights().read(weight), array)
            for a, b in zip(engine.run(case[1]).values(), general.run(case[1]).values(), strict=True):
                np.testing.assert_array_equal(a, b)
        # What later refits are told of it: which weights are the same, and what the others are.
        few = sorted(start)[:2]
        given = {few[0]: held(engine)[few[0]], few[1]: random_like(start, 9)[few[1]]}
        for each in (engine, general):
            assert each.refit(given, partial=True).changed == (few[1],)
        assert all(np.array_equal(a, held(general)[weight]) for weight, a in held(engine).items())
        engine.refit(random_like(start, 10))
        engine.rollback()
        assert all(np.array_equal(a, held(general)[weight]) for weight, a in held(engine).items())


@pytest.mark.parametrize("keep", ["mlp", "lstm"])
def test_whatever_is_not_usual_takes_the_general_way(keep: str, usual: list[bool]) -> None:
    case = feed_forward() if keep == "mlp" else recurrent()
    with loaded(case) as engine:
        start = held(engine)
        first, *_, last = sorted(start)
        given = random_like(start, 1)
        others: list[tuple[Mapping[str, object], CheckOptions | None, str | None]] = [
            (MappingProxyType(given), None, None),
            (given, CheckOptions(partial=True), None),
            (given, CheckOptions(allow_nonfinite=True), None),
            ({**given, first: given[first].astype(np.float64)}, None, None),
            ({**given, "more": given[first]}, None, None),
            ({name: array for name, array in given.items() if name != last}, None, "missing"),
            ({("x" if name == last else name): array for name, array in given.items()}, None, "missing"),
            ({**given, first: given[first][None]}, None, "shape"),
            ({}, None, "missing"),
        ]
        for source, options, problem in others:
            usual.clear()
            before = engine.version
            if problem is None:
                engine.refit(source, options)
                assert engine.version == before + 1
                given.update(random_like(given, before))  # which changes what the others give, too
            else:
                with pytest.raises(RefitRejectedError, match=problem):
                    engine.refit(source, options)
                assert engine.version == before
            assert usual == [False]


def test_a_weight_that_stays_as_it_is_is_found(usual: list[bool]) -> None:
    case = recurrent()
    with loaded(case) as engine:
        start = held(engine)
        engine.refit(random_like(start, 1))
        for seed, name in enumerate(start, start=2):
            now = held(engine)
            given = {**random_like(now, seed), name: now[name]}
            report = engine.refit(given)
            assert report.unchanged == (name,)
            assert usual.pop() is False
            assert all(np.array_equal(array, engine.weights().read(each)) for each, array in given.items())


def test_a_staged_refit_is_a_usual_one_too_and_can_be_dropped(usual: list[bool]) -> None:
    case = feed_forward()
    with loaded(case) as engine:
        start = held(engine)
        with engine.stage(random_like(start, 1)):
            pass
        assert all(np.array_equal(array, engine.weights().read(name)) for name, array in start.items())
        with engine.stage(random_like(start, 2)) as staged:
            staged.commit()
        for name, array in random_like(start, 2).items():
            np.testing.assert_array_equal(engine.weights().read(name), array)
        assert usual == [True, True]


def test_memory_that_is_cleared_meanwhile_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    with loaded(convolutions()) as engine:
        start = held(engine)
        derive = type(engine._backend).derive

        def cleared(self: object, *arguments: object, **named: object) -> object:
            engine._derivation._packet.clear()  # as the janitor does
            return derive(self, *arguments, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(type(engine._backend), "derive", cleared)
        for seed in range(1, 4):
            given = random_like(start, seed)
            engine.refit(given)
            assert all(np.array_equal(array, engine.weights().read(name)) for name, array in given.items())
