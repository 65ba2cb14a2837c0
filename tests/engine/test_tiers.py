from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

from onnx_refit.engine.onnxruntime import tiers
from onnx_refit.errors import EngineError

from .compiled_by_hand import relative_error
from .test_models import Live


def test_models_without_packing_kernels_are_at_full_speed_at_once() -> None:
    live = Live("feed_forward")
    assert live.backend.derive(live.weights).full_speed.done()
    live.backend.close()


@pytest.mark.parametrize("name", ["lstm", "gru", "convolutions"])
def test_the_second_tier_answers_like_the_first(name: str) -> None:
    live = Live(name, in_place=False)
    made = live.backend.derive(live.weights)
    first = made.runner
    live.check(made, live.weights)
    assert made.full_speed.wait(60)
    assert made.full_speed.done()
    assert made.runner is not first
    live.check(made, live.weights)
    live.backend.close()


def test_a_set_that_changes_nothing_takes_over_the_session() -> None:
    live = Live("lstm", in_place=False)
    base = live.backend.derive(live.weights)
    assert base.full_speed.wait(60)
    made = live.backend.derive({}, base, frozenset())
    assert made.full_speed.done()
    assert made.runner.session is base.runner.session
    live.check(made, live.weights)
    changed = live.backend.derive({"B": live.other(1)["B"]}, base, frozenset({"B"}))
    assert changed.full_speed.wait(60)
    assert changed.runner.session is not base.runner.session
    live.check(changed, {**live.weights, "B": live.other(1)["B"]})
    live.check(base, live.weights)
    live.backend.close()


def test_sets_that_die_waiting_are_forgotten_and_the_last_one_gets_there() -> None:
    live = Live("lstm", in_place=False)
    made = live.backend.derive(live.weights)
    for seed in range(30):
        made = live.backend.derive(live.other(seed), made)
    assert made.full_speed.wait(60)
    live.check(made, live.other(29))
    live.backend.close()


def test_closing_ends_the_threads_and_wakes_who_waits() -> None:
    before = threading.active_count()
    live = Live("lstm", in_place=False, threads=2)
    sets = [live.backend.derive(live.other(seed)) for seed in range(10)]
    live.backend.close()
    assert all(isinstance(made.full_speed.wait(60), bool) for made in sets)
    assert threading.active_count() <= before + 1  # the janitor of spare memory ends by itself
    with pytest.raises(EngineError):
        live.backend.run(sets[0], live.inputs)
    with pytest.raises(EngineError):
        live.backend.derive(live.weights)


def test_requests_in_flight_see_one_version_across_the_switch() -> None:
    live = Live("lstm", in_place=False, threads=1)
    wanted = live.wanted(live.weights)[0]
    made = live.backend.derive(live.weights)
    results = [live.backend.run(made, live.inputs)["y"] for _ in range(200)]
    assert made.full_speed.wait(60)
    assert all(relative_error(result, wanted) < 1e-5 for result in results)
    live.backend.close()


def test_a_second_tier_that_fails_for_one_set_is_there_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    live = Live("lstm", in_place=False)
    assert live.backend.derive(live.weights).full_speed.wait(60)

    def fail(_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(tiers, "public_value", fail)
        made = live.backend.derive(live.other(0))
        assert not made.full_speed.wait(60)
        live.check(made, live.other(0))
    made = live.backend.derive(live.other(1), made)
    assert made.full_speed.wait(60)
    live.check(made, live.other(1))
    live.backend.close()


def test_the_session_of_a_dead_set_is_taken_apart_in_the_background() -> None:
    live = Live("lstm", in_place=False)
    made = live.backend.derive(live.weights)
    assert made.full_speed.wait(60)
    session = weakref.ref(made.runner.session)
    second = live.backend._second
    assert second is not None
    del made
    gc.collect()
    deadline = time.monotonic() + 60
    while session() is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert session() is None
    assert second.dead == []
    live.backend.close()
