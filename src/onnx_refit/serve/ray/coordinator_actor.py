"""The coordinator as a Ray actor: named, detached, and started anew by Ray when it ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from ray.exceptions import RayError

from onnx_refit.errors import OnnxRefitError, PlanMismatchError, StoreLockedError
from onnx_refit.serve.cluster.book import Book
from onnx_refit.serve.cluster.coordinator import Coordinator, Welcome
from onnx_refit.serve.cluster.errors import Refusal
from onnx_refit.serve.cluster.mailbox import Answer, Carrier, Letter, Mailbox
from onnx_refit.serve.cluster.messages import ClusterReport, Member, RefitOrder, ReplicaState, Target
from onnx_refit.serve.cluster.parcel import unpack
from onnx_refit.serve.logs import log
from onnx_refit.serve.ray.process import alive, end, here
from onnx_refit.serve.ray.settings import ClusterSettings
from onnx_refit.serve.ray.transport import TRANSPORT, Shipment, plan_from_bytes

Result = TypeVar("Result")
_LOOK_SECONDS = 1.0
_LOCK_SECONDS = 20.0


class Unknown:
    """What a replica that was never let in, or was given up, gets instead of a command."""


class CoordinatorActor:
    """Wraps ``Coordinator``. What it refuses it returns as a ``Refusal``: not every exception survives the way.

    Args:
        settings: the deployment's.
        plan: the plan's bytes, without weights.
        store: directory of the version store, on the machine that the actor is tied to, or shared by several.

    Raises:
        StoreError: the store cannot be used; the actor ends.
    """

    def __init__(self, settings: ClusterSettings, plan: bytes, store: str) -> None:
        self._settings = settings
        self._plan = plan_from_bytes(plan)
        self._book = _open_book(store, self._plan)
        self._coordinator: Coordinator | None = None
        self._looking: asyncio.Task[None] | None = None
        self._carrier = Carrier(alive, end)

    # ------------------------------------------------------------------ for deploy

    async def require_plan(self, fingerprint: str) -> Refusal | None:
        """Refuse another plan than the one it was started with."""
        if fingerprint == self._plan.fingerprint:
            return None
        error = PlanMismatchError(
            "the deployment runs another plan",
            where=self._settings.name,
            hint="Remove it first, or choose another name",
        )
        return Refusal.of(error)

    async def empty(self) -> bool:
        """Whether the store has no version yet."""
        return self._book.empty

    async def seed(self, shipment: Shipment, source: str) -> Refusal | None:
        """Take the weights of the first version; does nothing if there are versions."""

        async def seed() -> None:
            if self._book.empty:
                weights = await asyncio.to_thread(lambda: unpack(TRANSPORT.open(shipment)))
                await asyncio.to_thread(self._book.seed, weights, source)

        return await _answered(seed())

    async def close(self) -> None:
        """Let go of the store; nothing more is decided."""
        if self._looking is not None:
            self._looking.cancel()
        if self._coordinator is not None:
            await self._coordinator.stop()
        self._book.close()

    # ------------------------------------------------------------------ for replicas

    async def hello(self) -> Welcome | Refusal:
        """See ``Coordinator.hello``."""
        return await _answered(self._ready().hello())

    async def admit(self, member: Member, state: ReplicaState) -> Target | None:
        """See ``Coordinator.admit``."""
        return await self._ready().admit(member, state)

    async def poll(self, name: str, answer: Answer | None, seconds: float) -> Letter | Unknown | None:
        """See ``Mailbox.poll``."""
        mailbox = self._ready().participant(name)
        if not isinstance(mailbox, Mailbox):
            return Unknown()
        return await mailbox.poll(answer, seconds)

    async def leave(self, name: str) -> None:
        """See ``Coordinator.leave``."""
        await self._ready().leave(name)

    # ------------------------------------------------------------------ for clients

    async def refit(self, order: RefitOrder) -> ClusterReport | Refusal:
        """See ``Coordinator.refit``."""
        return await _answered(self._ready().refit(order))

    async def rollback(self, to: int | None, transaction: str) -> ClusterReport | Refusal:
        """See ``Coordinator.rollback``."""
        return await _answered(self._ready().rollback(to, transaction))

    async def outcome(self, transaction: str) -> ClusterReport | Refusal | None:
        """See ``Coordinator.outcome``."""
        return await _answered(self._ready().outcome(transaction))

    async def forget(self, version: int) -> Refusal | None:
        """See ``Coordinator.forget``."""
        return await _answered(self._ready().forget(version))

    async def status(self) -> Mapping[str, Any]:
        """See ``Coordinator.status``; and where the coordinator is."""
        return {**self._ready().status(), "coordinator": here()}

    # ------------------------------------------------------------------ inside

    def _ready(self) -> Coordinator:
        """The coordinator, from the first call that needs it on; before, there may be no version yet."""
        if self._coordinator is None:
            observer = self._settings.on_phase
            self._coordinator = Coordinator(
                self._plan,
                self._book,
                lambda member: Mailbox(member, self._carrier),
                transport=TRANSPORT,
                patience=self._settings.patience,
                on_phase=_observed(observer),
            )
            self._looking = asyncio.create_task(self._look())
        return self._coordinator

    async def _look(self) -> None:
        while True:
            try:
                await self._ready().look()
            except (OnnxRefitError, RayError) as error:
                log("the replicas could not be looked after", level=logging.ERROR, exception=error)
            await asyncio.sleep(_LOOK_SECONDS)


def _observed(observer: Callable[[str, str], None] | None) -> Callable[[str, str], None]:
    def observe(phase: str, transaction: str) -> None:
        log("refit", phase=phase, transaction=transaction)
        if observer is not None:
            observer(phase, transaction)

    return observe


async def _answered(work: Awaitable[Result]) -> Result | Refusal:
    try:
        return await work
    except OnnxRefitError as error:
        return Refusal.of(error)


def _open_book(store: str, plan: Any) -> Book:
    """The book, once the process before this one, if there is one, has let go of it."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return Book(store, plan)
        except StoreLockedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
