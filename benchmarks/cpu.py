"""The CPU figures of one case: inference, refit, rebuild, partial refit, tail latency, memory, build."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

import onnx_refit
from benchmarks import peers
from benchmarks.cases import Case
from benchmarks.growth import chain
from benchmarks.measure import (
    TAIL_REQUESTS,
    TAIL_SECONDS,
    TAIL_SLICE,
    TAIL_WARM,
    TAIL_WINDOWS,
    copy_seconds,
    once,
    race,
    ratio,
)
from onnx_refit.tensors import Array


def other_weights(engine: onnx_refit.Engine, seed: int) -> dict[str, Array]:
    """Weights like the engine's own, different in every element from these and from those of another seed."""
    rng = np.random.default_rng(seed)
    made = {}
    for name in engine.refittable:
        array = np.array(engine.weights().read(name))
        noise = rng.uniform(0.9, 1.1, array.shape)
        made[name] = np.ascontiguousarray(((array + (array == 0) * 1e-3) * noise).astype(array.dtype))
    return made


def measure_case(case: Case, threads: int, *, peers_too: bool, seconds: float) -> dict[str, Any]:
    """All figures of one case with one number of threads."""
    options = onnx_refit.BuildOptions(engine=onnx_refit.EngineOptions(threads))
    # Neither side pays for its imports, which come once a process.
    onnx_refit.build(chain(1, 16, 16), options=options)
    peers.baked(chain(1, 16, 16), threads)
    build = statistics.median(once(lambda: onnx_refit.build(case.model, options=options)) for _ in range(3))
    bake = statistics.median(once(lambda: peers.baked(case.model, threads)) for _ in range(3))
    plan = onnx_refit.build(case.model, options=options)
    session = peers.baked(case.model, threads)
    with onnx_refit.load(plan, options=onnx_refit.EngineOptions(threads)) as engine:
        engine.full_speed.wait()
        result: dict[str, Any] = {
            "case": case.name,
            "threads": threads,
            "weight_bytes": plan.weight_bytes,
            "tensors": len(plan.refittable),
            "build_seconds": build,
            "bake_seconds": bake,
            "build_over_bake": build / bake,
            "inference": {},
        }
        for label, inputs in case.inputs.items():
            result["inference"][label] = _inference(case, engine, session, inputs, threads, peers_too, seconds)
        label, inputs = next(iter(case.inputs.items()))
        result["refit"] = _refit(case, engine, inputs)
        result["refit"].update(_rebuild(case, engine, inputs, threads, result["refit"]["seconds"]))
        result["tail"] = _tail(engine, inputs)
    return result


def _inference(
    case: Case,
    engine: onnx_refit.Engine,
    session: ort.InferenceSession,
    inputs: Mapping[str, Array],
    threads: int,
    peers_too: bool,
    seconds: float,
) -> dict[str, Any]:
    calls: dict[str, Any] = {
        "baked": lambda: session.run(None, dict(inputs)),
        "onnx-refit": lambda: engine.run(inputs),
    }
    if peers_too:
        for name, run in _peers(case, threads).items():
            with contextlib.suppress(Exception):  # a peer that cannot run this model is left out of its row
                run(inputs)
                calls[name] = lambda run=run: run(inputs)
    ours, theirs = engine.run(inputs), session.run(None, dict(inputs))
    worst = max(
        float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max() / (np.abs(b.astype(np.float64)).max() + 1e-30))
        for a, b in zip(ours.values(), theirs, strict=True)
    )
    figures = race(calls, seconds=seconds)
    return {
        "seconds": {name: statistics.median(values) for name, values in figures.items()},
        "over_baked": {name: ratio(figures, name, "baked") for name in figures if name != "baked"},
        "largest_relative_error": worst,
    }


def _peers(case: Case, threads: int) -> dict[str, peers.Run]:
    found: dict[str, peers.Run] = {}
    with contextlib.suppress(Exception):
        found["OpenVINO f32"] = peers.openvino(case.model, threads, "f32")
    with contextlib.suppress(Exception):
        found["OpenVINO bf16"] = peers.openvino(case.model, threads, "bf16")
    if case.module is not None:
        found["PyTorch"] = peers.torch_eager(case.module, threads)
        found["torch.compile"] = peers.torch_compiled(case.module, threads)
    return found


def _steady(session: ort.InferenceSession, feeds: dict[str, Array]) -> float:
    return statistics.median(once(lambda: session.run(None, feeds)) for _ in range(3))


def _rebuild(
    case: Case, engine: onnx_refit.Engine, inputs: Mapping[str, Array], threads: int, refit: float
) -> dict[str, Any]:
    """New arrays in RAM to the first answer of a new session that has them, minus that inference: as for a refit."""
    sets = [other_weights(engine, seed) for seed in (1, 2)]
    rebuilder = peers.Rebuilder(case.model, threads, frozenset(sets[0]))
    seconds: dict[str, list[float]] = {"serialised": [], "handed_over": []}
    feeds = dict(inputs)
    for turn in range(6):
        for name, kept in seconds.items():
            started = time.perf_counter()
            session = getattr(rebuilder, name)(sets[turn % 2])
            answer = session.run(None, feeds)
            answered = time.perf_counter() - started
            again = _steady(session, feeds)
            if turn == 0:  # it must be the weights given that answer
                engine.refit(sets[0])
                for ours, theirs in zip(engine.run(inputs).values(), answer, strict=True):
                    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
            else:
                kept.append(answered - again)
            del session
    usual, quickest = (statistics.median(seconds[name]) for name in ("serialised", "handed_over"))
    return {
        "rebuild_seconds": usual,
        "rebuild_over_refit": usual / refit,
        "quickest_rebuild_seconds": quickest,
        "quickest_rebuild_over_refit": quickest / refit,
    }


def _refit(case: Case, engine: onnx_refit.Engine, inputs: Mapping[str, Array]) -> dict[str, Any]:
    """New arrays in RAM to the first inference that uses them, minus that inference; and two copies to compare it with.

    One goes again and again between the same arrays. The other one takes the refit's place: the same came before it,
    its arrays were used as long ago, and so was the memory that it writes.
    """
    sets = [other_weights(engine, seed) for seed in (1, 2, 3, 4)]
    copies = copy_seconds(sets[0])
    first: list[float] = []
    full: list[float] = []
    plain: list[float] = []
    literal: list[float] = []
    excess: list[float] = []
    in_place: list[float] = []
    over_in_place: list[float] = []
    call_over_in_place: list[float] = []
    spare = [{name: np.zeros_like(array) for name, array in sets[0].items()} for _ in range(3)]
    for turn in range(14):
        report = None
        given, copied = sets[2 * turn % 4], sets[(2 * turn + 1) % 4]
        started = time.perf_counter()
        report = engine.refit(given)
        called = time.perf_counter() - started
        engine.run(inputs)
        answered = time.perf_counter() - started
        report.full_speed.wait()
        engine.run(inputs)
        at_full = time.perf_counter() - started
        again = statistics.median(once(lambda: engine.run(inputs)) for _ in range(3))
        copy = copy_seconds(given, 3)
        started = time.perf_counter()
        for name, array in copied.items():
            np.copyto(spare[turn % 3][name], array)
        other = time.perf_counter() - started
        for _ in range(5):
            engine.run(inputs)
        copy_seconds(copied, 3)
        if turn >= 4:  # the first refits touch fresh memory
            first.append(max(0.0, answered - again) / copy)
            literal.append(called / copy)
            excess.append((answered - called - again) / copy)
            full.append(max(0.0, at_full - 2 * again) / copy if case.recurrent else max(0.0, answered - again) / copy)
            plain.append(answered - again)
            in_place.append(other)
            over_in_place.append(max(0.0, answered - again) / other)
            call_over_in_place.append(called / other)
    del spare
    names = sorted(engine.refittable)
    few = names[:: max(1, len(names) // max(1, len(names) // 100))][: max(1, len(names) // 100)]
    partial: list[float] = []
    for turn in range(14):
        given = {name: sets[turn % 2][name] for name in few}
        started = time.perf_counter()
        engine.refit(given, partial=True)
        partial.append(time.perf_counter() - started)
    whole = statistics.median(plain)
    return {
        "copy_seconds": copies,
        "seconds": whole,
        "over_copy": statistics.median(first),
        "copy_in_place_seconds": statistics.median(in_place),
        "over_copy_in_place": statistics.median(over_in_place),
        "call_over_copy_in_place": statistics.median(call_over_in_place),
        # The same taken apart: the call of refit alone, and what the first answer takes longer than a steady one.
        "call_over_copy": statistics.median(literal),
        "first_answer_excess_over_copy": statistics.median(excess),
        "full_speed_over_copy": statistics.median(full),
        "partial": {
            "tensors": len(few),
            "bytes": sum(sets[0][name].nbytes for name in few),
            "seconds": statistics.median(partial[4:]),
            "over_full": statistics.median(partial[4:]) / whole,
        },
    }


def _tail(engine: onnx_refit.Engine, inputs: Mapping[str, Array], seconds: float = TAIL_SECONDS) -> dict[str, Any]:
    """P99 of a client alone, and while somebody refits every 50 ms: slices of each in turn, and medians of windows.

    A window is as many slices as both p99 need. Their ratio does not see the machine's drift, and the median over the
    windows does not see what else happened in one of them.
    """
    weights = itertools.cycle([other_weights(engine, seed) for seed in (3, 4)])

    def client(until: Callable[[], bool]) -> list[float]:
        found = []
        while not until():
            found.append(once(lambda: engine.run(inputs)))
        return found

    def beside(until: Callable[[int], bool]) -> tuple[list[float], int]:
        done = threading.Event()
        count = 0

        def refits() -> None:
            nonlocal count
            while not done.is_set():
                began = time.perf_counter()
                engine.refit(next(weights))
                count += not done.is_set()  # one that the slice cut off is not counted
                done.wait(max(0.0, 0.05 - (time.perf_counter() - began)))

        thread = threading.Thread(target=refits)
        thread.start()
        try:
            return client(lambda: until(count)), count
        finally:
            done.set()
            thread.join()

    def over(length: float) -> Callable[..., bool]:
        stop = time.perf_counter() + length
        return lambda *_: time.perf_counter() >= stop

    def window() -> tuple[list[float], list[float], int, float]:
        idle: list[float] = []
        busy: list[float] = []
        refitted, lasted = 0, 0.0
        while lasted < seconds or min(len(idle), len(busy)) < TAIL_REQUESTS:
            idle += client(over(TAIL_SLICE))
            found, count = beside(over(TAIL_SLICE))
            busy += found
            refitted += count
            lasted += TAIL_SLICE
        return idle, busy, refitted, lasted

    client(over(0.5))
    beside(lambda count: count >= TAIL_WARM)
    windows = [window() for _ in range(TAIL_WINDOWS)]
    ratios = [float(np.quantile(busy, 0.99) / np.quantile(idle, 0.99)) for idle, busy, *_ in windows]

    def middle(place: int, quantile: float) -> float:
        return statistics.median(float(np.quantile(window[place], quantile)) for window in windows)

    return {
        "idle_p99_seconds": middle(0, 0.99),
        "refit_p99_seconds": middle(1, 0.99),
        "idle_p50_seconds": middle(0, 0.5),
        "refit_p50_seconds": middle(1, 0.5),
        "p99_over_idle": statistics.median(ratios),
        "p99_over_idle_of_windows": ratios,
        "requests_of_windows": [[len(idle), len(busy)] for idle, busy, *_ in windows],
        "refits": float(sum(refitted for *_, refitted, _ in windows)),
        "seconds": sum(lasted for *_, lasted in windows),
    }
