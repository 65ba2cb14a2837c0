"""A served model: its engine, the queue in front of it, its traffic split, and the desk for refits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from onnx_refit.errors import VersionError
from onnx_refit.refit.live import Engine
from onnx_refit.serve.batching import why_not_batchable
from onnx_refit.serve.describe import config, metadata
from onnx_refit.serve.desk import RefitDesk
from onnx_refit.serve.errors import DeadlineError, DrainingError
from onnx_refit.serve.events import EventHub
from onnx_refit.serve.fastpath import FastPath
from onnx_refit.serve.memory import DeskMemory
from onnx_refit.serve.metrics import Metrics
from onnx_refit.serve.request import InferRequest, InferResponse
from onnx_refit.serve.scheduler import Job, Scheduler
from onnx_refit.serve.settings import Batching, Settings
from onnx_refit.serve.traffic import TrafficSplit
from onnx_refit.tensors import Array

# A request with less time than this goes through the queue, which keeps deadlines to the microsecond.
_HURRIED_SECONDS = 0.01


class ServedModel:
    """One engine under a name.

    Args:
        name: what clients call it.
        engine: the engine; closed with the model.
        settings: the server's settings.
        metrics: where to count.
    """

    def __init__(self, name: str, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self.name, self.engine = name, engine
        self.online = True
        self.traffic: TrafficSplit | None = None
        self.events = EventHub()
        memory = None if settings.memory is None else DeskMemory(settings.memory / f"{name}.desk.jsonl")
        self.desk = RefitDesk(name, engine, self.events, metrics, settings.limits, memory)
        self.unbatched = "batching is off" if settings.batching.rows == 1 else why_not_batchable(engine)
        self.max_rows = 1 if self.unbatched else settings.batching.rows
        self._most_seconds = settings.limits.request_seconds
        self._metrics = metrics
        self._fast = FastPath(engine.plan.compiled.activation)
        self._queue_seconds = metrics.queue_seconds.labels(name)
        self._inference_seconds = metrics.inference_seconds.labels(name)
        self._batch_rows = metrics.batch_rows.labels(name)
        self._scheduler = Scheduler(
            self._run,
            instances=settings.instances,
            limit=settings.limits.queue,
            batching=Batching() if self.unbatched else settings.batching,
            observe=lambda rows, _: self._batch_rows.observe(rows),
        )
        metrics.weight_bytes.labels(name).set(engine.plan.weight_bytes)
        metrics.watch(name, lambda: self._scheduler.waiting, lambda: self._scheduler.running)

    # ------------------------------------------------------------------ inference

    async def infer(self, request: InferRequest, version: int | None = None) -> InferResponse:
        """Run one inference, through the queue.

        Args:
            request: what to run.
            version: a version that the transport names (a path or a header); goes before the request's own.

        Raises:
            DrainingError: the model is offline.
            OverloadedError: the queue is full.
            DeadlineError: the time was up.
            InputError, VersionError, EngineError: as ``Engine.run``.
        """
        if not self.online:
            raise DrainingError(f"the model {self.name!r} is offline")
        chosen = self._version(version or request.version, request.split_key)
        kind = self._fast.key(request.inputs)
        hurried = request.timeout is not None and request.timeout < _HURRIED_SECONDS
        if self._scheduler.idle and not hurried and self._fast.quick(kind):
            started = time.perf_counter()
            results, answering = self._run(request.inputs, request.output_names, chosen)
            self._fast.note(kind, time.perf_counter() - started)
            self._batch_rows.observe(1)
            return self._answered(results, answering, 0.0, time.perf_counter() - started)
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Job] = loop.create_future()
        seconds = self._most_seconds if request.timeout is None else min(request.timeout, self._most_seconds)
        job = Job(
            inputs=request.inputs,
            outputs=request.output_names,
            version=chosen,
            deadline=time.perf_counter() + seconds,
            done=lambda job: _answer(loop, answered, job),
        )
        self._scheduler.submit(job)
        timer = loop.call_later(seconds, _expire, answered, job)
        try:
            await answered
        except asyncio.CancelledError:
            job.cancelled = True
            raise
        finally:
            timer.cancel()
        if job.error is not None:
            raise job.error
        assert job.results is not None
        if job.batch == job.rows:
            self._fast.note(kind, job.finished - job.started)
        return self._answered(job.results, job.answered, job.started - job.queued, job.finished - job.started)

    def _answered(self, results: Mapping[str, Array], version: int, waited: float, ran: float) -> InferResponse:
        self._queue_seconds.observe(waited)
        self._inference_seconds.observe(ran)
        self._metrics.answers.labels(self.name, str(version)).inc()
        return InferResponse(self.name, version, results)

    def _version(self, version: int | None, split_key: str | None) -> int | None:
        if version is not None or self.traffic is None:
            return version
        return self.traffic.choose(split_key)

    def _run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None, version: int | None
    ) -> tuple[Mapping[str, Array], int]:
        results = self.engine.run(inputs, outputs, version=version)
        return results, results.version

    def split_traffic(self, split: TrafficSplit | None) -> None:
        """Split the requests that name no version; None ends the split. VersionError for a version not held."""
        held = {info.number for info in self.engine.versions if info.held}
        for version, _ in () if split is None else split.shares:
            if version not in held:
                raise VersionError(f"version {version} is not held; held are {', '.join(map(str, sorted(held)))}")
        self.traffic = split
        self.events.publish("traffic", split=None if split is None else split.to_json())

    # ------------------------------------------------------------------ description

    def metadata(self, version: int | None = None) -> dict[str, Any]:
        """The protocol's model metadata; VersionError for a version that is not held."""
        return metadata(self.name, self.engine, version)

    def config(self) -> dict[str, Any]:
        """Triton's model configuration, as far as its clients and load generators read it."""
        return config(self.name, self.engine)

    @property
    def load(self) -> dict[str, Any]:
        """How busy it is."""
        return {"waiting": self._scheduler.waiting, "running": self._scheduler.running}

    def close(self, seconds: float) -> bool:
        """Finish what is queued, discard what is staged, and close the engine. Blocks.

        Args:
            seconds: how long to wait for what runs; an inference cannot be interrupted.

        Returns:
            Whether everything ended in time.
        """
        self.online = False
        ended = self._scheduler.close(seconds)
        self.events.close()
        self.desk.close()
        self.engine.close()
        return ended


def _answer(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Job], job: Job) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(_resolve, future, job)


def _resolve(future: asyncio.Future[Job], job: Job) -> None:
    if not future.done():
        future.set_result(job)


def _expire(future: asyncio.Future[Job], job: Job) -> None:
    if not future.done():
        job.cancelled = True
        future.set_exception(DeadlineError())


class ModelTable:
    """The models of one server, by name. Fixed when the server starts: no client can add one."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = {model.name: model for model in models}

    def __iter__(self) -> Any:
        return iter(self._models.values())

    def get(self, name: str) -> ServedModel:
        """A model; VersionError (404) if there is none of this name."""
        model = self._models.get(name)
        if model is None:
            raise VersionError(f"there is no model {name[:80]!r}", hint=f"The models are {', '.join(self._models)}")
        return model
