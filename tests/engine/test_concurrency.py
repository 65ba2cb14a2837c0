"""Threads that infer while weight sets come and go: each answer is one version's, whole."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from onnx_refit.tensors import Array

from .compiled_by_hand import relative_error
from .test_models import Live


def storm(name: str, seconds: float, enough: int, threads: int = 8) -> None:
    """Infer in threads while refits commit as fast as they can.

    Until the seconds are over and there were more answers and more refits than enough; at most a minute longer.
    """
    live = Live(name, threads=2)
    versions = [live.other(seed) for seed in range(3)]
    wanted = [live.wanted(weights)[0] for weights in versions]
    current = live.backend.derive(versions[0])
    stop = threading.Event()
    failures: list[str] = []
    answers = [0] * threads

    def infer(number: int) -> None:
        while not stop.is_set():
            result = live.backend.run(current, live.inputs)["y"]
            errors = [relative_error(result, right) for right in wanted]
            if min(errors) > 1e-5:
                failures.append(f"an answer of no version: {errors}")
                return
            answers[number] += 1

    def guarded(number: int) -> None:
        try:
            infer(number)
        except Exception as error:  # noqa: BLE001  a thread's failure must fail the test
            failures.append(repr(error))

    workers = [threading.Thread(target=guarded, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    refits = 0
    end = time.monotonic() + seconds
    previous: dict[str, Array] = versions[0]
    while (now := time.monotonic()) < end + 60 and not failures:
        if now >= end and refits > enough and sum(answers) > enough:
            break
        refits += 1
        weights = versions[refits % 3]
        changed = None if refits % 2 else frozenset(k for k in weights if not np.array_equal(weights[k], previous[k]))
        current = live.backend.derive(weights, current, changed)
        previous = weights
    stop.set()
    for worker in workers:
        worker.join()
    live.backend.close()
    assert not failures
    assert sum(answers) > enough
    assert refits > enough


@pytest.mark.parametrize("name", ["chain", "lstm"])
def test_every_answer_is_one_version_s(name: str) -> None:
    storm(name, 1.5, enough=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["feed_forward", "convolutions", "lstm"])
def test_every_answer_is_one_version_s_for_long(name: str) -> None:
    before = _resident()
    storm(name, 60, enough=100)
    assert _resident() - before < 200e6


def _resident() -> float:
    with open("/proc/self/status") as file:  # noqa: PTH123
        return next(float(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))
