"""Replicas and coordinators in one process that end exactly where a test says."""

import asyncio
import itertools
import threading
from typing import Any

from onnx_refit.refit.canary import Canary
from onnx_refit.serve.cluster.book import Book
from onnx_refit.serve.cluster.coordinator import Coordinator
from onnx_refit.serve.cluster.errors import ReplicaLostError
from onnx_refit.serve.cluster.messages import Member, Publish, RefitOrder
from onnx_refit.serve.cluster.parcel import pack
from onnx_refit.serve.cluster.replica import Replica
from onnx_refit.serve.cluster.roster import Patience
from tests.serve.models import affine_weights

ONES = {"x": [[1.0] * 4]}
IMPATIENT = Patience(prepare=2.0, publish=0.2, report=0.2)


class Killed(BaseException):
    """The process that runs this code has ended. No handler for errors may stop it."""


class Local:
    """A replica in this process, as the coordinator sees it.

    Faults: (command's class name, what happens): "before" and "after" end it before or after it does as told,
    "deaf" neither hears nor answers from then on, "lost reply" does as told and the reply never comes.
    """

    def __init__(self, plan, welcome, name):
        self.member = Member(name, {"place": name})
        self.replica = Replica(plan, welcome.target, welcome.weights, welcome.source)
        self.faults = {}
        self.ended = False
        self.asked = []
        self.deaf = False

    def infer(self, **options):
        """The scale of the weights that answered, its version, its epoch; None if the replica has ended."""
        if self.ended:
            return None
        import numpy as np

        answer = self.replica.infer({"x": np.ones((1, 4), np.float32)}, **options)
        values = set((answer["y"] / 2).reshape(-1).tolist())
        assert len(values) == 1, "an answer of mixed weights"
        return values.pop(), answer.version, answer.epoch

    def end_now(self):
        if not self.ended:
            self.ended = True
            self.replica.close()

    async def ask(self, command):
        kind = type(command).__name__
        self.asked.append(kind)
        # Others get their turn, as they would over a network.
        await asyncio.sleep(0)
        if self.ended:
            raise ReplicaLostError("the replica has ended", where=self.member.name)
        fault = self.faults.pop(kind, None)
        if callable(fault):
            fault = fault()
        if fault == "before":
            self.end_now()
        self.deaf = self.deaf or fault == "deaf"
        if self.deaf:
            await asyncio.get_running_loop().create_future()
        if self.ended:
            raise ReplicaLostError("the replica has ended", where=self.member.name)
        reply = self.replica.carry_out(command)
        if fault == "after":
            self.end_now()
            raise ReplicaLostError("the replica has ended", where=self.member.name)
        if fault == "lost reply":
            await asyncio.get_running_loop().create_future()
        if fault == "coordinator":
            raise Killed
        return reply

    async def alive(self):
        return not self.ended

    async def end(self):
        self.end_now()


class World:
    """A store, replicas that outlive coordinators, and one coordinator at a time."""

    def __init__(self, plan, path, patience=IMPATIENT):
        self.plan, self.path, self.patience = plan, path, patience
        self.replicas = {}
        self.phases = []
        self.kill_at = None
        self.scales = {1: 1.0}
        self._names = itertools.count()
        self.coordinator: Any = None
        self.book: Any = None

    def start(self):
        """A coordinator, new or after the last one's end."""
        if self.book is not None:
            # The operating system does this for a process that has ended.
            self.book._ledger.store.close()
        self.book = Book(self.path, self.plan)
        if self.book.empty:
            self.book.seed(self.plan.require_weights(), "plan")
        self.coordinator = Coordinator(
            self.plan,
            self.book,
            lambda member: self.replicas[member.name],
            patience=self.patience,
            on_phase=self.phase,
        )
        return self.coordinator

    def phase(self, phase, transaction):
        self.phases.append(phase)
        if phase == self.kill_at:
            self.kill_at = None
            raise Killed

    async def join(self, count=1):
        for _ in range(count):
            name = f"replica-{next(self._names)}"
            while True:
                local = self.replicas[name] = Local(self.plan, await self.coordinator.hello(), name)
                target = await self.coordinator.admit(local.member, local.replica.state)
                if target is not None:
                    local.replica.carry_out(Publish("join", target))
                    break
                local.end_now()

    @property
    def living(self):
        return [local for local in self.replicas.values() if not local.ended]

    def answers(self):
        return {local.infer() for local in self.living}

    def order(self, scale, name, canary=None, **changes):
        weights = {**affine_weights(scale), **changes}
        return RefitOrder(name, pack(weights), f"scale {scale}", canary=canary)

    async def refit(self, scale, name="t", **options):
        report = await self.coordinator.refit(self.order(scale, name, **options))
        self.scales[report.version] = scale
        return report

    def close(self):
        for local in self.living:
            local.end_now()
        if self.book is not None:
            self.book._ledger.store.close()


def golden(scale):
    import numpy as np

    return Canary({"x": np.ones((1, 4), np.float32)}, {"y": np.full((1, 4), 2 * scale, np.float32)})


def in_loop(work):
    """Run a coroutine on a loop of its own; tasks that a "killed" coordinator left are dropped, as its process is."""
    result, failure = [], []

    def main():
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda loop, context: None)
        try:
            result.append(loop.run_until_complete(work))
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            failure.append(error)
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def prepared(world):
    return {local.replica.state.prepared for local in world.living}


async def all_is_well(world, version, scale):
    """Every replica answers alike, a new one joins there, and a refit goes through."""
    epoch = world.book.target.epoch
    assert world.answers() == {(scale, version, epoch)}
    assert prepared(world) == {None}
    await world.join()
    assert world.answers() == {(scale, version, epoch)}
    assert set(world.coordinator.status()["replicas"]) == {local.member.name for local in world.living}
    report = await world.refit(9.0, "afterwards", canary=golden(9))
    assert world.answers() == {(9.0, report.version, report.target.epoch)}
    assert report.target.epoch > epoch
