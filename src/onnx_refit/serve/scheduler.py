"""The queue in front of an engine: instances, dynamic batches, back-pressure, deadlines."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from onnx_refit.errors import OnnxRefitError
from onnx_refit.serve.batching import join, signature, split
from onnx_refit.serve.errors import DeadlineError, DrainingError, OverloadedError
from onnx_refit.serve.settings import Batching
from onnx_refit.tensors import Array

Run = Callable[[Mapping[str, Array], Sequence[str] | None, int | None], tuple[Mapping[str, Array], int]]
"""Runs one inference: inputs, outputs wanted, version wanted -> outputs, version that answered."""

Done = Callable[["Job"], None]


@dataclass(eq=False, slots=True)
class Job:
    """One request on its way through the queue; whoever takes it fills in the lower half.

    Attributes:
        inputs: input name -> array.
        outputs: names of the outputs wanted; None means all.
        version: the version that is to answer; None means the current one.
        deadline: on the clock of ``time.perf_counter``.
        done: called once from a worker's thread, when the answer or the error is there.
        signature: what must be equal for requests to share a batch; None keeps it alone.
        rows: rows of its inputs.
        cancelled: set when nobody waits for the answer any more.
        queued: when it was queued.
        started: when a worker took it.
        finished: when its inference ended.
        batch: rows of the batch it ran in.
        results: outputs, unless it failed.
        answered: the version that answered.
        error: why it failed.
    """

    inputs: Mapping[str, Array]
    outputs: Sequence[str] | None
    version: int | None
    deadline: float
    done: Done
    signature: tuple[object, ...] | None = None
    rows: int = 1
    cancelled: bool = False
    queued: float = 0.0
    started: float = 0.0
    finished: float = 0.0
    batch: int = 1
    results: Mapping[str, Array] | None = None
    answered: int = 0
    error: BaseException | None = None


class Scheduler:
    """Runs jobs on a number of worker threads, the oldest first.

    Workers form batches themselves, when they are free to run one, so that a batch never waits for another thread.

    Args:
        run: runs one inference; called from the workers' threads.
        instances: how many inferences run at a time.
        limit: how many jobs may wait.
        batching: how batches are formed.
        observe: called with (rows, requests) for every inference.
    """

    def __init__(
        self,
        run: Run,
        *,
        instances: int = 1,
        limit: int = 256,
        batching: Batching = Batching(),  # noqa: B008 - frozen
        observe: Callable[[int, int], None] = lambda rows, requests: None,
    ) -> None:
        self._run, self._limit, self._batching, self._observe = run, limit, batching, observe
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._running = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"onnx-refit-instance-{index}", daemon=True)
            for index in range(instances)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Inferences that run now."""
        return self._running

    @property
    def idle(self) -> bool:
        """Whether a job would be taken at once: an instance is free and nobody waits."""
        return not self._closed and not self._queue and self._running < len(self._threads)

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            OverloadedError: the queue is full.
            DrainingError: the scheduler was closed.
        """
        job.queued = time.perf_counter()
        if self._batching.rows > 1:
            job.signature = signature(job.inputs)
            if job.signature is not None:
                job.rows = next(iter(job.inputs.values())).shape[0]
                job.signature = (job.version, *(job.outputs or ()), None, *job.signature)
        with self._changed:
            if self._closed:
                raise DrainingError("the model is being taken offline")
            if len(self._queue) >= self._limit:
                raise OverloadedError(len(self._queue))
            self._queue.append(job)
            self._changed.notify()

    def close(self, seconds: float | None = None) -> bool:
        """Let the workers finish what is queued, then end them.

        Args:
            seconds: how long to wait for them; None for as long as it takes.

        Returns:
            Whether all have ended.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = None if seconds is None else time.monotonic() + seconds
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while True:
            with self._changed:
                batch = self._take()
                if batch is None:
                    return
                self._running += 1
            try:
                self._execute(batch)
            finally:
                with self._changed:
                    self._running -= 1
            # Dropped before waiting again: their inputs and outputs would stay in memory until the next request.
            del batch

    def _take(self) -> list[Job] | None:
        """Wait for jobs and take the next batch; None when closed and empty. The lock is held."""
        while True:
            while not self._queue:
                if self._closed:
                    return None
                self._changed.wait()
            now = time.perf_counter()
            first = self._queue[0]
            if first.cancelled or first.deadline <= now:
                self._queue.popleft()
                return [first]
            if first.signature is None or first.rows >= self._batching.rows:
                self._queue.popleft()
                return [first]
            chosen = self._gather(first)
            patience = first.queued + self._batching.delay_seconds - now
            if patience <= 0 or self._closed or sum(job.rows for job in chosen) >= self._batching.rows:
                for job in chosen:
                    self._queue.remove(job)
                return chosen
            self._changed.wait(patience)

    def _gather(self, first: Job) -> list[Job]:
        chosen, rows = [first], first.rows
        for job in self._queue:
            if job is not first and job.signature == first.signature and rows + job.rows <= self._batching.rows:
                chosen.append(job)
                rows += job.rows
                if rows == self._batching.rows:
                    break
        return chosen

    def _execute(self, batch: list[Job]) -> None:
        now = time.perf_counter()
        ready = []
        for job in batch:
            job.started = now
            if job.cancelled or job.deadline <= now:
                job.error = DeadlineError("the deadline passed while the request was waiting")
                job.finished = now
                job.done(job)
            else:
                ready.append(job)
        if not ready:
            return
        self._infer(ready)
        finished = time.perf_counter()
        for job in ready:
            job.finished = finished
            job.done(job)

    def _infer(self, jobs: list[Job]) -> None:
        first = jobs[0]
        try:
            inputs = first.inputs if len(jobs) == 1 else join([job.inputs for job in jobs])
            results, version = self._run(inputs, first.outputs, first.version)
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for the job
            if len(jobs) > 1 and isinstance(error, OnnxRefitError):
                # One request's inputs must not fail its neighbours: each runs alone.
                for job in jobs:
                    self._infer([job])
                return
            for job in jobs:
                job.error = error
            return
        rows = sum(job.rows for job in jobs)
        self._observe(rows, len(jobs))
        parts = [results] if len(jobs) == 1 else split(results, [job.rows for job in jobs])
        for job, part in zip(jobs, parts, strict=True):
            job.results, job.answered, job.batch = part, version, rows
