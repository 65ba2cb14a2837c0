"""The queue in front of an engine: batches, limits, deadlines. Time is controlled by gates, not by sleeping."""

import threading
import time

import numpy as np
import pytest

from onnx_refit.errors import EngineError
from onnx_refit.serve.errors import DeadlineError, DrainingError, OverloadedError
from onnx_refit.serve.scheduler import Job, Scheduler
from onnx_refit.serve.settings import Batching


class Gate:
    """An engine that doubles its input and can be held; it records every batch it ran."""

    def __init__(self, held=False):
        self.open, self.entered, self.batches, self.fail = threading.Event(), threading.Semaphore(0), [], None
        if not held:
            self.open.set()

    def __call__(self, inputs, outputs, version):
        self.entered.release()
        assert self.open.wait(60)
        self.batches.append((len(inputs["x"]), version))
        if self.fail and self.fail(inputs["x"]):
            raise EngineError("refused")
        return {"y": inputs["x"] * 2}, version or 1


class Waiting:
    def __init__(self, scheduler, value, rows=1, version=None, seconds=60.0, cancelled=False, columns=1):
        self.event = threading.Event()
        self.job = Job(
            {"x": np.full((rows, columns), value, np.float32)}, None, version, time.perf_counter() + seconds,
            lambda job: self.event.set(), cancelled=cancelled,
        )  # fmt: skip
        scheduler.submit(self.job)

    def result(self):
        assert self.event.wait(60)
        if self.job.error:
            raise self.job.error
        return (self.job.results or {})["y"]


@pytest.fixture
def make(request):
    made = []

    def make(gate, **options):
        made.append((gate, Scheduler(gate, **options)))
        return made[-1][1]

    yield make
    for gate, scheduler in made:
        gate.open.set()
        scheduler.close()


def test_each_gets_its_own_rows(make):
    gate = Gate(held=True)
    scheduler = make(gate, batching=Batching(rows=8))
    first = Waiting(scheduler, 0)
    gate.entered.acquire()
    waiting = [Waiting(scheduler, value, rows=value) for value in (1, 2, 3)]
    gate.open.set()
    for value, one in zip((1, 2, 3), waiting, strict=True):
        assert one.result().tolist() == [[2.0 * value]] * value
        assert one.job.batch == 6
    first.result()
    assert gate.batches == [(1, None), (6, None)]


def test_versions_shapes_and_sizes_never_share_a_batch(make):
    gate = Gate(held=True)
    scheduler = make(gate, batching=Batching(rows=4))
    Waiting(scheduler, 0)
    gate.entered.acquire()
    waiting = [
        Waiting(scheduler, 1, version=1),
        Waiting(scheduler, 2, version=2),
        Waiting(scheduler, 3, version=1),
        Waiting(scheduler, 4, version=1, columns=2),
        Waiting(scheduler, 5, version=2, rows=4),
        Waiting(scheduler, 6, version=1, rows=9),
    ]
    gate.open.set()
    for one in waiting:
        one.result()
    assert gate.batches[1:] == [(2, 1), (1, 2), (1, 1), (4, 2), (9, 1)]
    assert [one.job.answered for one in waiting] == [1, 2, 1, 1, 2, 1]


def test_a_batch_waits_no_longer_than_the_delay(make):
    gate = Gate()
    scheduler = make(gate, batching=Batching(rows=100, delay_seconds=0.05))
    started = time.perf_counter()
    Waiting(scheduler, 1).result()
    assert 0.04 < time.perf_counter() - started < 30


def test_a_full_batch_does_not_wait(make):
    gate = Gate()
    scheduler = make(gate, batching=Batching(rows=2, delay_seconds=600))
    waiting = [Waiting(scheduler, 1), Waiting(scheduler, 2)]
    assert [one.result()[0, 0] for one in waiting] == [2, 4]
    assert gate.batches == [(2, None)]


def test_one_bad_request_does_not_fail_its_neighbours(make):
    gate = Gate(held=True)
    gate.fail = lambda x: (x == 13).any()
    scheduler = make(gate, batching=Batching(rows=8))
    Waiting(scheduler, 0)
    gate.entered.acquire()
    good, bad, other = Waiting(scheduler, 1), Waiting(scheduler, 13), Waiting(scheduler, 2)
    gate.open.set()
    assert good.result()[0, 0] == 2
    assert other.result()[0, 0] == 4
    with pytest.raises(EngineError):
        bad.result()


def test_a_full_queue_refuses(make):
    gate = Gate(held=True)
    scheduler = make(gate, limit=2)
    Waiting(scheduler, 0)
    gate.entered.acquire()
    Waiting(scheduler, 1), Waiting(scheduler, 2)
    with pytest.raises(OverloadedError) as refused:
        Waiting(scheduler, 3)
    assert refused.value.status == 429
    assert refused.value.retry_after
    assert scheduler.waiting == 2


def test_what_is_late_or_abandoned_does_not_run(make):
    gate = Gate(held=True)
    scheduler = make(gate)
    Waiting(scheduler, 0)
    gate.entered.acquire()
    late, abandoned = Waiting(scheduler, 1, seconds=0), Waiting(scheduler, 2, cancelled=True)
    gate.open.set()
    for one in (late, abandoned):
        with pytest.raises(DeadlineError):
            one.result()
    assert len(gate.batches) == 1


def test_instances_run_at_the_same_time(make):
    gate = Gate(held=True)
    scheduler = make(gate, instances=2)
    waiting = [Waiting(scheduler, 1), Waiting(scheduler, 2)]
    assert gate.entered.acquire(timeout=60)
    assert gate.entered.acquire(timeout=60), "the second instance did not start while the first ran"
    assert scheduler.running == 2
    gate.open.set()
    for one in waiting:
        one.result()


def test_closing_finishes_what_is_queued_and_refuses_more():
    gate = Gate(held=True)
    scheduler = Scheduler(gate)
    waiting = [Waiting(scheduler, value) for value in range(5)]
    threading.Timer(0.05, gate.open.set).start()
    scheduler.close()
    assert [one.result()[0, 0] for one in waiting] == [0, 2, 4, 6, 8]
    with pytest.raises(DrainingError):
        Waiting(scheduler, 1)
