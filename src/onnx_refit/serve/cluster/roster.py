"""The replicas that were let in, and how the coordinator speaks to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from onnx_refit.serve.cluster.book import Book
from onnx_refit.serve.cluster.errors import ClusterError, ReplicaLostError
from onnx_refit.serve.cluster.messages import Command, Member, Reply


class Participant(Protocol):
    """A replica as the coordinator sees it."""

    @property
    def member(self) -> Member:
        """Who it is."""
        ...

    async def ask(self, command: Command) -> Reply:
        """Have a command carried out; ReplicaLostError only if it is certain that the replica has ended."""
        ...

    async def alive(self) -> bool:
        """Whether it has not ended; what cannot be told counts as alive."""
        ...

    async def end(self) -> None:
        """End it, and return when it is certain that it answers nobody any more."""
        ...


@dataclass(frozen=True)
class Patience:
    """How long the coordinator waits for a replica, in seconds.

    Attributes:
        prepare: for staging and the canary; a replica that takes longer stops the refit.
        publish: for publishing; a replica that takes longer is ended.
        report: for saying where it stands, after the coordinator was restarted; then it is ended. As long as for
            staging, which a replica may be at, and others do not wait for it.
    """

    prepare: float = 600.0
    publish: float = 30.0
    report: float = 600.0


class Roster:
    """The replicas by name; the book has their names too, so that a new coordinator knows whom to ask.

    Args:
        book: where to note who came and who went.
        connect: makes a participant of a replica.
    """

    def __init__(self, book: Book, connect: Callable[[Member], Participant]) -> None:
        self._book, self._connect = book, connect
        self._members = {member.name: connect(member) for member in book.members}

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    @property
    def members(self) -> tuple[Member, ...]:
        """Who they are."""
        return tuple(participant.member for participant in self._members.values())

    def get(self, name: str) -> Participant | None:
        """One of them; None for who is not let in."""
        return self._members.get(name)

    async def add(self, member: Member) -> None:
        """Let a replica in, durably."""
        if member.name not in self._members:
            await asyncio.to_thread(self._book.add, member)
            self._members[member.name] = self._connect(member)

    async def drop(self, name: str) -> None:
        """Forget a replica that has ended."""
        if self._members.pop(name, None) is not None:
            await asyncio.to_thread(self._book.remove, name)

    async def end(self, name: str) -> None:
        """End a replica; when this returns it answers nobody any more."""
        participant = self._members.get(name)
        if participant is not None:
            await participant.end()
            await self.drop(name)

    async def drop_ended(self) -> None:
        """Forget those that have ended, once they certainly answer nobody any more."""
        names = list(self._members)
        alive = await asyncio.gather(*(self._members[name].alive() for name in names))
        await asyncio.gather(*(self.end(name) for name, lives in zip(names, alive, strict=True) if not lives))

    async def ask(self, name: str, command: Command, seconds: float) -> Reply | ClusterError:
        """A replica's reply; a ReplicaLostError if it has ended, a ClusterError if it is silent. Neither is raised."""
        participant = self._members.get(name)
        if participant is None:
            return ReplicaLostError("the replica has ended", where=name)
        try:
            async with asyncio.timeout(seconds):
                return await participant.ask(command)
        except ReplicaLostError as error:
            return error
        except TimeoutError:
            return ClusterError(f"the replica did not answer within {seconds:g} s", where=name)

    async def ask_all(
        self, command: Command, seconds: float, names: Iterable[str] | None = None
    ) -> dict[str, Reply | ClusterError]:
        """The replies of all replicas, or of some, asked at the same time."""
        asked = list(self._members if names is None else names)
        results = await asyncio.gather(*(self.ask(name, command, seconds) for name in asked))
        return dict(zip(asked, results, strict=True))
