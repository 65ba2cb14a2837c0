"""Bringing replicas to what was decided: after a second phase that did not reach all, and for a new coordinator."""

from __future__ import annotations

import asyncio

from onnx_refit.errors import OnnxRefitError
from onnx_refit.serve.cluster.book import Book
from onnx_refit.serve.cluster.depot import Depot
from onnx_refit.serve.cluster.errors import ClusterError
from onnx_refit.serve.cluster.messages import Discard, Prepare, Publish, ReplicaState, Reply, Report, Target
from onnx_refit.serve.cluster.roster import Patience, Roster


class Settler:
    """Sees to it that no replica answers with anything else than the book's target. Works under the coordinator's lock.

    Args:
        book: what was decided.
        roster: the replicas.
        depot: the weights of stored versions.
        patience: how long to wait for a replica.

    Attributes:
        settled: whether every replica is known to answer with the target. A new coordinator knows nothing.
    """

    def __init__(self, book: Book, roster: Roster, depot: Depot, patience: Patience) -> None:
        self._book, self._roster, self._depot, self._patience = book, roster, depot, patience
        self.settled = not len(roster)

    async def settle(self) -> None:
        """Take note of replicas that have ended, and bring the others to the book's target, if that is open."""
        await self._roster.drop_ended()
        if self.settled:
            return
        # Nobody waits for another one: a replica that is silent may still be staging what is no longer wanted.
        target = None
        while target != self._book.target:
            target = self._book.target
            await asyncio.gather(*(self._settle_one(member.name) for member in self._roster.members))
        self.settled = True

    async def _settle_one(self, name: str) -> None:
        result = await self._roster.ask(name, Report(), self._patience.report)
        if not isinstance(result, Reply):
            await self._roster.end(name)
            return
        await self.not_behind(result.state)
        target = self._book.target
        decided, prepared = self._book.transaction, result.state.prepared
        if prepared is not None and prepared != decided:
            discarded = await self._roster.ask(name, Discard(prepared), self._patience.publish)
            if not isinstance(discarded, Reply):
                # It has just said where it stands, and does not even do this.
                await self._roster.end(name)
                return
        if result.state.target != target:
            publish = Publish(decided, target)
            await self.brought(name, await self._roster.ask(name, publish, self._patience.publish), target)

    async def not_behind(self, state: ReplicaState) -> None:
        """Epochs only grow, even if the book was lost or is an old copy: count on from what a replica has seen."""
        target = self._book.target
        ahead = state.target.epoch > target.epoch or (
            state.target.epoch == target.epoch and state.target.version != target.version
        )
        if ahead:
            self.settled = False
            await asyncio.to_thread(self._book.raise_epoch, state.target.epoch + 1)

    async def brought(self, name: str, result: Reply | ClusterError, target: Target) -> bool:
        """Whether a replica has published, if need be with weights sent anew; one that has not is ended.

        Args:
            name: the replica.
            result: what it answered when it was told to publish.
            target: what.
        """
        if isinstance(result, Reply) and result.refusal is not None:
            try:
                result = await self._send_anew(name, result.state, target)
            except OnnxRefitError as error:
                # The store cannot give the weights. Those that have them go on; this one cannot.
                result = ClusterError(error.message, where=name)
        if isinstance(result, Reply) and result.refusal is None:
            return True
        await self._roster.end(name)
        return False

    async def _send_anew(self, name: str, state: ReplicaState, target: Target) -> Reply | ClusterError:
        # Under a name of its own: what the replica may have prepared is not this.
        transaction = f"bring {target.version} {target.epoch}"
        weights, source = await self._depot.weights(target.version), self._book.source(target.version)
        command = Prepare(transaction, state.target.version, target.version, weights, source=source)
        result = await self._roster.ask(name, command, self._patience.prepare)
        if isinstance(result, Reply) and result.refusal is None:
            return await self._roster.ask(name, Publish(transaction, target), self._patience.publish)
        return result
