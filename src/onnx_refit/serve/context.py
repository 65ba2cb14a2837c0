"""What the handlers of one server share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from onnx_refit.serve.errors import DrainingError
from onnx_refit.serve.metrics import Metrics
from onnx_refit.serve.model import ModelTable
from onnx_refit.serve.priority import background_pool
from onnx_refit.serve.settings import Settings
from onnx_refit.serve.spool import Spool
from onnx_refit.serve.tracing import in_context

Result = TypeVar("Result")
# Requests had their time to finish before; what runs now has nobody waiting for it.
_LAST_SECONDS = 1.0


class Context:
    """Models, settings, metrics, and whether the server takes requests.

    Refits run on threads of their own, which give way to inference: one stages, others commit, roll back and tell what
    there is meanwhile.
    """

    def __init__(self, settings: Settings, models: ModelTable, metrics: Metrics, spool: Spool) -> None:
        self.settings, self.models, self.metrics, self.spool = settings, models, metrics, spool
        self._desk = background_pool(2, "onnx-refit-desk")
        self._staging = background_pool(1, "onnx-refit-stage")
        self._serving = False

    @property
    def serving(self) -> bool:
        """Whether the server takes requests."""
        return self._serving

    @serving.setter
    def serving(self, serving: bool) -> None:
        self._serving = serving
        self.metrics.ready.set(int(serving))

    def require_serving(self) -> None:
        """DrainingError while the server is starting or stopping."""
        if not self._serving:
            raise DrainingError("the server is shutting down")

    async def at_desk(self, work: Callable[[], Result]) -> Result:
        """Run a piece of a refit that is short, or that must not wait for what is being staged."""
        return await asyncio.get_running_loop().run_in_executor(self._desk, in_context(work))

    async def staging(self, work: Callable[[], Result]) -> Result:
        """Run a check and derivation, one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._staging, in_context(work))

    def close(self, seconds: float = _LAST_SECONDS) -> bool:
        """End the refits' threads, close the models and the spool. Blocks.

        Args:
            seconds: how long to wait for inferences that still run.

        Returns:
            Whether none was left running.
        """
        # A commit that has begun is finished: it is short, and its client deserves to know.
        for threads in (self._staging, self._desk):
            threads.shutdown(wait=True, cancel_futures=True)
        ended = [model.close(seconds) for model in self.models]
        self.spool.close()
        return all(ended)
