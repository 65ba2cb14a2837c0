"""Timing: paired, interleaved, medians; and the machine described."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from onnx_refit.tensors import Array

Clock = Callable[[], float]
_REST = 0.04  # seconds
TAIL_SLICE = 1.0  # seconds of requests alone, then as many beside refits
TAIL_SECONDS = 2.0  # of either, at least, for a p99
TAIL_REQUESTS = 1000  # of either, at least: the p99 of 400 is the fourth slowest
TAIL_WINDOWS = 5  # pairs of p99
TAIL_WARM = 3  # refits first: as many weight sets as are alive at once, whose memory is new till then


def once(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def race(calls: Mapping[str, Callable[[], object]], *, seconds: float = 4.0, seed: int = 0) -> dict[str, list[float]]:
    """Time several calls in turn, in a new random order each round.

    Each round gives one figure a call: the median of a few repetitions. So a figure of one call has a partner of every
    other call, taken within the same fraction of a second: their ratio does not see the machine's slow drift.

    Before each figure there is a pause: the threads of the rival that ran last go on turning for up to 30 ms, and with
    as many threads as cores whoever came next would be measured beside them.
    """
    for call in calls.values():
        call()
        call()
    each = sum(once(call) for call in calls.values()) / len(calls)
    repeats = max(3, min(30, int(0.03 / max(each, 1e-9))))
    rounds = max(9, min(61, int(seconds / ((each * (repeats + 1) + _REST) * len(calls)))))

    def timed(name: str) -> float:
        return once(calls[name])

    return alternate(timed, list(calls), rounds=rounds, repeats=repeats, rest=_REST, seed=seed)


def alternate(
    timed: Callable[[str], float], names: Sequence[str], *, rounds: int, repeats: int, rest: float = 0.0, seed: int = 0
) -> dict[str, list[float]]:
    """Figures of several calls, in turn, in a new random order each round; see ``race``.

    Args:
        timed: makes the call of a name, and gives the seconds that count.
        names: of the calls.
        rounds: figures of each.
        repeats: calls whose median is a figure.
        rest: seconds of a pause before each figure.
        seed: of the order.
    """
    order = list(names)
    rng = np.random.default_rng(seed)
    figures: dict[str, list[float]] = {name: [] for name in order}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            rng.shuffle(order)
            for name in order:
                if rest:
                    time.sleep(rest)
                timed(name)  # each call warms its own caches again after its rivals
                figures[name].append(statistics.median(timed(name) for _ in range(repeats)))
    finally:
        gc.enable()
    return figures


def ratio(figures: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """Median over rounds of one call's figure over the other's."""
    return statistics.median(a / b for a, b in zip(figures[one], figures[other], strict=True))


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(values))))


def copy_seconds(weights: Mapping[str, Array], repeats: int = 9) -> float:
    """Median seconds of ``numpy.copyto`` of all arrays into existing ones, one thread: the physical limit."""
    targets = {name: np.empty_like(array) for name, array in weights.items()}

    def copy() -> None:
        for name, array in weights.items():
            np.copyto(targets[name], array)

    copy()
    return statistics.median(once(copy) for _ in range(repeats))


def machine() -> dict[str, object]:
    """What the figures were taken on."""
    model = ""
    cpu = Path("/proc/cpuinfo")
    flags: set[str] = set()
    if cpu.exists():
        for line in cpu.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            if key.strip() == "flags":
                flags = set(value.split())
    packages = {}
    for name in ("onnx-refit", "onnxruntime", "onnx", "numpy", "openvino", "torch"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "vector": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in flags],
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": packages,
    }
