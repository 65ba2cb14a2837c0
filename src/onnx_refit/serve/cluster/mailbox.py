"""Commands for a replica that cannot be called: they wait until it asks for them.

On Ray Serve every call to a deployment goes to a replica of the router's choice, so the coordinator cannot speak to a
certain one. The replica therefore asks: it polls its mailbox, carries out what it finds, and brings the reply with
its next poll. A command stays until its reply has come, so that nothing is lost with a poll that breaks off; carrying
out a command twice does it once.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from onnx_refit.serve.cluster.errors import ReplicaLostError
from onnx_refit.serve.cluster.messages import Command, Member, Reply


@dataclass(frozen=True)
class Letter:
    """A command and its key, which its reply bears too. No other coordinator ever uses the same key."""

    key: str
    command: Command


@dataclass(frozen=True)
class Answer:
    """The reply to a letter."""

    key: str
    reply: Reply


@dataclass(frozen=True)
class Carrier:
    """What the transport can do to a replica without its help.

    Attributes:
        alive: whether it has not ended; what cannot be told counts as alive.
        end: end it, and return when it is certain that it answers nobody any more.
    """

    alive: Callable[[Member], Awaitable[bool]]
    end: Callable[[Member], Awaitable[None]]


class Mailbox:
    """A replica as the coordinator sees it (``coordinator.Participant``). Belongs to one event loop.

    Args:
        member: the replica.
        carrier: how to look whether it lives, and how to end it.
        look_every: seconds between two looks at it while it works on a command.
    """

    def __init__(self, member: Member, carrier: Carrier, *, look_every: float = 0.5) -> None:
        self.member = member
        self._carrier, self._look_every = carrier, look_every
        self._letter: Letter | None = None
        self._reply: asyncio.Future[Reply] | None = None
        self._arrived = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()

    async def ask(self, command: Command) -> Reply:
        """Have a command carried out; ReplicaLostError if the replica ends instead."""
        async with self._one_at_a_time:
            self._letter = Letter(secrets.token_hex(8), command)
            reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
            self._reply = reply
            self._arrived.set()
            try:
                while True:
                    done, _ = await asyncio.wait({reply}, timeout=self._look_every)
                    if done:
                        return reply.result()
                    if not await self.alive() and not reply.done():
                        raise ReplicaLostError("the replica has ended", where=self.member.name)
            finally:
                # Who stops waiting has given the command up; the replica may still find out what came of it.
                self._letter = self._reply = None
                self._arrived.clear()

    async def poll(self, answer: Answer | None, seconds: float) -> Letter | None:
        """The replica's side: hand in a reply, and wait for the next command.

        Args:
            answer: the reply to the last letter, again if it is not certain that it arrived.
            seconds: how long to wait; None is returned then.
        """
        if answer is not None and self._letter is not None and self._letter.key == answer.key:
            if self._reply is not None and not self._reply.done():
                self._reply.set_result(answer.reply)
            # Not yet taken away by the one who asked: it must not be delivered again.
            self._letter = None
            self._arrived.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._arrived.wait()
        except TimeoutError:
            return None
        return self._letter

    async def alive(self) -> bool:
        """Whether the replica has not ended."""
        return await self._carrier.alive(self.member)

    async def end(self) -> None:
        """End the replica, and return when it answers nobody any more."""
        await self._carrier.end(self.member)
