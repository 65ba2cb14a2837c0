"""Memory is kept for a next refit twice as long as the last interval between two."""

from __future__ import annotations

import time

import pytest

from onnx_refit.expected import Expected


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_nothing_is_kept_before_the_first_refit(clock: list[float]) -> None:
    assert Expected().seconds_left() <= 0


def test_one_refit_alone_is_a_few_seconds(clock: list[float]) -> None:
    expected = Expected()
    expected.note(3.0)
    assert expected.seconds_left() == 3.0
    clock[0] += 3600
    expected.note(3.0)
    assert expected.seconds_left() == 3.0


@pytest.mark.parametrize(("interval", "kept"), [(0.05, 3.0), (1.0, 3.0), (10.0, 20.0), (60.0, 120.0), (61.0, 3.0)])
def test_refits_at_intervals_find_what_the_last_one_left(clock: list[float], interval: float, kept: float) -> None:
    expected = Expected()
    for _ in range(4):
        clock[0] += interval
        expected.note(3.0)
        clock[0] += 0.25
        expected.note(3.0)  # the same refit
    assert expected.seconds_left() == (kept - 0.25 if kept > 3 else 3.0)
    assert (expected.seconds_left() > interval) == (interval <= 60)


def test_once_they_end_it_is_given_back(clock: list[float]) -> None:
    expected = Expected()
    for _ in range(4):
        clock[0] += 10.0
        expected.note(3.0)
    clock[0] += 20.0
    assert expected.seconds_left() <= 0
