"""Refits, rollbacks, deaths of replicas and of coordinators in any order, and what must hold after each step."""

import random

import pytest

from onnx_refit.errors import OnnxRefitError
from onnx_refit.serve.cluster.roster import Patience
from tests.serve.cluster.support import Killed, golden
from tests.serve.cluster.test_coordinator_ends import DEATHS

FAULTS = ["before", "after", "deaf", "lost reply"]


class Walk:
    """One story; ``told`` is what clients were told: the version that their refit became."""

    def __init__(self, world, seed):
        self.world, self.rng = world, random.Random(seed)
        self.step = 0
        self.seen = {}  # a client per replica and one that asks all: the largest epoch it has seen

    async def go(self, steps):
        for self.step in range(steps):
            await self.rng.choice([self.refit, self.refit, self.rollback, self.replica_ends, self.join])()
            await self.holds()

    def maybe_faults(self):
        """Whether the coordinator is to end in what follows."""
        rng, world = self.rng, self.world
        if rng.random() < 0.4 and world.living:
            rng.choice(world.living).faults[rng.choice(["Prepare", "Publish", "Discard"])] = rng.choice(FAULTS)
        if rng.random() < 0.4 and len(world.living) > 1:
            rng.choice(list(DEATHS.values()))[0](world)

    async def attempt(self, work, name):
        """Do it; afterwards the version that it became, or None. A dead coordinator is followed by another."""
        world = self.world
        told = None
        try:
            told = (await work).version
        except OnnxRefitError:
            found = await world.coordinator.outcome(name)
            assert found is None, "who was told that nothing was published must be able to rely on it"
        except Killed:
            # What was about to end the process, and did not come to it, goes with it.
            world.kill_at = None
            world.start()
            await world.coordinator.settle()
            found = await world.coordinator.outcome(name)
            told = None if found is None else found.version
        for local in world.living:
            local.faults.clear()
        return told

    async def refit(self):
        world, name, scale = self.world, f"t{self.step}", float(self.step + 10)
        before = world.book.target.version
        self.maybe_faults()
        canary = golden(scale if self.rng.random() < 0.8 else scale + 1)
        told = await self.attempt(world.coordinator.refit(world.order(scale, name, canary)), name)
        if told is None:
            assert world.book.target.version == before
        else:
            world.scales[told] = scale
            assert world.book.target.version == told

    async def rollback(self):
        world, name = self.world, f"t{self.step}"
        before = world.book.target.version
        choices = [record.number for record in world.book.records]
        self.maybe_faults()
        to = self.rng.choice([None, *choices])
        told = await self.attempt(world.coordinator.rollback(to, name), name)
        assert world.book.target.version == (before if told is None else told)
        if told is not None and to is not None:
            assert told == to

    async def replica_ends(self):
        if self.world.living:
            self.rng.choice(self.world.living).end_now()

    async def join(self):
        if len(self.world.living) < 4:
            await self.world.join()

    async def holds(self):
        world = self.world
        world.kill_at = None
        if world.book._ledger.commit_arrays.__qualname__.startswith("kill"):
            world.start()
        await world.coordinator.settle()
        target = world.book.target
        for local in world.living:
            assert local.replica.state.prepared is None
            scale, version, epoch = local.infer()
            assert (version, epoch) == (target.version, target.epoch)
            assert scale == world.scales[version]
            assert epoch >= self.seen.get("anyone", 0)
            self.seen["anyone"] = epoch
        assert set(world.coordinator.status()["replicas"]) == {local.member.name for local in world.living}


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens(play, world, seed):
    world.patience = Patience(prepare=0.15, publish=0.05, report=0.05)
    play(lambda world: Walk(world, seed).go(25))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 150))
def test_whatever_happens_many_times(play, world, seed):
    world.patience = Patience(prepare=0.15, publish=0.05, report=0.05)
    play(lambda world: Walk(world, seed).go(40))
