"""The coordinator: changes the weights of many replicas together, or of none.

Two phases. Every replica stages the weights, derives them and runs the canary; if one refuses, ends or is silent, all
discard. Once all are ready the decision is made: one durable line in the version store. From then on it is committed,
whatever ends: replicas that fail to publish are brought there, or ended, and what replaces them starts there. The
coordinator itself may end at any moment; the next one reads from the book what was decided and brings every replica
to it before it does anything else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from onnx_refit.errors import OnnxRefitError, VersionError
from onnx_refit.plan.plan import Plan
from onnx_refit.refit.timing import timed
from onnx_refit.serve.cluster.book import Book
from onnx_refit.serve.cluster.depot import Depot
from onnx_refit.serve.cluster.errors import ClusterError, RefusalKind, ReplicaLostError
from onnx_refit.serve.cluster.incoming import Incoming, Transport
from onnx_refit.serve.cluster.messages import (
    ClusterReport,
    Discard,
    Forget,
    Member,
    Prepare,
    Publish,
    RefitOrder,
    ReplicaState,
    Reply,
    Target,
)
from onnx_refit.serve.cluster.roster import Participant, Patience, Roster
from onnx_refit.serve.cluster.settler import Settler

Result = TypeVar("Result")


@dataclass(frozen=True)
class Welcome:
    """What a new replica starts with.

    Attributes:
        target: what the cluster answers with.
        weights: the weights of that version, as the transport ships them.
        source: where they came from, in words.
    """

    target: Target
    weights: object
    source: str


class Coordinator:
    """Belongs to one event loop. Refits, rollbacks and admissions happen one after the other.

    Args:
        plan: the plan.
        book: what was decided so far; not empty.
        connect: makes a participant of a replica.
        transport: how weights travel.
        patience: how long to wait.
        on_phase: told of ``checked``, ``prepared``, ``decided``, ``published`` and ``aborted``.
    """

    def __init__(
        self,
        plan: Plan,
        book: Book,
        connect: Callable[[Member], Participant],
        *,
        transport: Transport = Transport(),  # noqa: B008 - frozen
        patience: Patience = Patience(),  # noqa: B008 - frozen
        on_phase: Callable[[str, str], None] = lambda phase, transaction: None,
    ) -> None:
        self._book = book
        self._patience, self._on_phase = patience, on_phase
        self._incoming = Incoming(plan, book, transport)
        self._roster = Roster(book, connect)
        self._depot = Depot(plan, book, transport)
        self._settler = Settler(book, self._roster, self._depot, patience)
        self._lock = asyncio.Lock()
        self._running: set[asyncio.Task[Any]] = set()

    # ------------------------------------------------------------------ replicas come and go

    async def hello(self) -> Welcome:
        """What a new replica is to load."""
        async with self._lock:
            target = self._book.target
            return Welcome(target, await self._depot.weights(target.version), self._book.source(target.version))

    async def admit(self, member: Member, state: ReplicaState) -> Target | None:
        """Let a replica in, if it stands where the cluster stands; None if it has to say hello again.

        A replica must not answer requests before. As this waits for what is under way, none comes in behind.

        Returns:
            What the replica is to publish before it answers: the same version, perhaps at a later epoch.
        """
        async with self._lock:
            if state.target.version != self._book.target.version:
                return None
            await self._settler.not_behind(state)
            await self._roster.add(member)
            return self._book.target

    async def leave(self, name: str) -> None:
        """A replica answers nobody any more."""
        async with self._lock:
            await self._roster.drop(name)

    def participant(self, name: str) -> Participant | None:
        """A replica that was let in."""
        return self._roster.get(name)

    async def settle(self) -> None:
        """Bring every replica to what was decided; those that cannot be brought there are ended."""
        await self._whole(self._settler.settle())

    async def look(self) -> None:
        """Take note of replicas that have ended, and settle what is open; to be called now and then."""
        if self._lock.locked():
            return
        await self._whole(self._settler.settle())
        self._depot.tidy()

    async def stop(self) -> None:
        """Finish what is under way; nothing more is begun."""
        await self._lock.acquire()

    # ------------------------------------------------------------------ the verbs

    async def refit(self, order: RefitOrder) -> ClusterReport:
        """Replace the weights of every replica.

        Raises:
            RefitRejectedError: the check refused.
            CanaryError: the canary of a replica refused.
            ClusterError: a replica ended or was silent before the decision, or there is none.
            StoreError, WriteError: the disk refused.
            In every case nothing was published, and all replicas have discarded, or do when they can be reached.
        """
        return await self._whole(self._refit(order))

    async def rollback(self, to: int | None, transaction: str) -> ClusterReport:
        """Have every replica publish an earlier version again; raises as ``refit``, VersionError if there is none."""
        return await self._whole(self._rollback(to, transaction))

    async def outcome(self, transaction: str) -> ClusterReport | None:
        """What became of a refit or rollback: its account if it was decided, None if it never was nor will be."""

        async def find() -> ClusterReport | None:
            await self._settler.settle()
            return self._account(transaction)

        return await self._whole(find())

    async def forget(self, version: int) -> None:
        """Delete an earlier version everywhere; VersionError if there is none, or it answers."""

        async def forget() -> None:
            await asyncio.to_thread(self._book.forget, version)
            await self._roster.ask_all(Forget(version), self._patience.publish)

        await self._whole(forget())

    def status(self) -> dict[str, Any]:
        """What answers, who the replicas are, and the versions, as JSON-able data."""
        target = self._book.target
        return {
            "version": target.version,
            "epoch": target.epoch,
            "settled": self._settler.settled,
            "busy": self._lock.locked(),
            "replicas": {member.name: dict(member.address) for member in self._roster.members},
            "versions": [
                {
                    "number": record.number,
                    "source": self._book.source(record.number),
                    "parent": record.parent,
                    "committed": record.committed.isoformat(),
                    "fingerprint": record.fingerprint,
                    "current": record.number == target.version,
                }
                for record in self._book.records
            ],
        }

    # ------------------------------------------------------------------ the transaction; all of it under the lock

    async def _refit(self, order: RefitOrder) -> ClusterReport:
        known = await self._begin(order.transaction)
        if known is not None:
            return known
        before = self._book.target
        seconds: dict[str, float] = {}
        with timed(seconds, "check"):
            accepted = await asyncio.to_thread(self._incoming.check, order)
        self._on_phase("checked", order.transaction)
        command = Prepare(
            order.transaction,
            before.version,
            weights=accepted.weights,
            partial=accepted.partial,
            source=order.source,
            canary=order.canary,
        )
        with timed(seconds, "prepare"):
            prepared = await self._prepare(command)
        with timed(seconds, "decide"):
            target = await self._decide(
                command,
                lambda: self._book.commit(accepted.arrays, order.source, order.transaction, partial=accepted.partial),
            )
        return await self._publish(command, target, prepared, seconds)

    async def _rollback(self, to: int | None, transaction: str) -> ClusterReport:
        known = await self._begin(transaction)
        if known is not None:
            return known
        before = self._book.target
        version = self._book.previous() if to is None else to
        if version == before.version:
            raise VersionError(f"version {version} answers already")
        self._book.stored(version)
        seconds: dict[str, float] = {}
        command = Prepare(transaction, before.version, version, source=f"rollback to version {version}")
        with timed(seconds, "prepare"):
            # Most replicas hold it still; weights travel only if one does not.
            prepared = await self._prepare(command, absent=lambda: self._depot.weights(version))
        with timed(seconds, "decide"):
            target = await self._decide(command, lambda: self._book.rollback(version, transaction))
        return await self._publish(command, target, prepared, seconds)

    async def _begin(self, transaction: str) -> ClusterReport | None:
        """Make sure that all stand at the same version; the account of a transaction that was decided already."""
        await self._settler.settle()
        known = self._account(transaction)
        if known is None and not len(self._roster):
            raise ClusterError("there is no replica", hint="Wait until one has joined")
        return known

    async def _prepare(
        self, command: Prepare, absent: Callable[[], Awaitable[object]] | None = None
    ) -> dict[str, Reply]:
        """First phase: the replies of all replicas, all of them ready; else all have discarded and this raises.

        Args:
            command: what to prepare.
            absent: gives the weights for replicas that no longer hold the version.
        """
        results = await self._roster.ask_all(command, self._patience.prepare)
        lacking = [name for name, result in results.items() if _is_absent(result)]
        if absent is not None and lacking:
            shipped = Prepare(command.transaction, command.base, command.version, await absent(), source=command.source)
            results |= await self._roster.ask_all(shipped, self._patience.prepare, lacking)
        prepared: dict[str, Reply] = {}
        refused: OnnxRefitError | None = None
        missed: OnnxRefitError | None = None
        for name, result in results.items():
            if isinstance(result, ReplicaLostError):
                await self._roster.drop(name)
            if isinstance(result, OnnxRefitError):
                missed = ClusterError(f"{result.message}; nothing was published", where=name, hint="Refit again")
            elif result.refusal is not None:
                refused = result.refusal.error(name)
            else:
                prepared[name] = result
        # What a replica refuses says more than that another one has ended.
        failure = refused or missed
        if failure is not None:
            await self._abort(command.transaction)
            raise failure
        self._on_phase("prepared", command.transaction)
        return prepared

    async def _decide(self, command: Prepare, write: Callable[[], Target]) -> Target:
        """The decision: durable when this returns, decided against when it raises."""
        try:
            target = await asyncio.to_thread(write)
        except OnnxRefitError:
            await self._abort(command.transaction)
            # The epoch may have been counted up already.
            self._settler.settled = False
            raise
        self._settler.settled = False
        self._on_phase("decided", command.transaction)
        return target

    async def _abort(self, transaction: str) -> None:
        # A replica that does not hear it discards when the next one is prepared, or when it is asked where it stands.
        results = await self._roster.ask_all(Discard(transaction), self._patience.publish)
        self._settler.settled = self._settler.settled and all(isinstance(result, Reply) for result in results.values())
        self._on_phase("aborted", transaction)

    async def _publish(
        self, command: Prepare, target: Target, prepared: Mapping[str, Reply], seconds: dict[str, float]
    ) -> ClusterReport:
        """Second phase: when this returns, no replica answers with anything older."""
        replicas: dict[str, Mapping[str, float]] = {}
        lost: list[str] = []
        with timed(seconds, "publish"):
            order = Publish(command.transaction, target)
            results = await self._roster.ask_all(order, self._patience.publish)
            for name, result in results.items():
                if await self._settler.brought(name, result, target):
                    spent = result.seconds if isinstance(result, Reply) else {}
                    replicas[name] = {**prepared[name].seconds, **spent}
                else:
                    lost.append(name)
        self._settler.settled = True
        self._on_phase("published", command.transaction)
        changed = {name for reply in prepared.values() for name in reply.changed}
        return ClusterReport(
            target,
            command.base,
            command.transaction,
            command.source,
            tuple(sorted(changed)),
            replicas,
            tuple(lost),
            seconds,
        )

    # ------------------------------------------------------------------ small things

    def _account(self, transaction: str) -> ClusterReport | None:
        version = self._book.decided(transaction)
        if version is None:
            return None
        current = self._book.target
        # Which epoch an earlier version had is not written down.
        target = current if version == current.version else Target(version, 0)
        replicas = {member.name: dict[str, float]() for member in self._roster.members}
        return ClusterReport(target, None, transaction, self._book.source(version), replicas=replicas)

    async def _whole(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do a piece of work under the lock to its end, even if whoever asked for it goes away."""

        async def locked() -> Result:
            async with self._lock:
                return await work

        task = asyncio.create_task(locked())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)


def _is_absent(result: object) -> bool:
    return isinstance(result, Reply) and result.refusal is not None and result.refusal.kind is RefusalKind.ABSENT
