"""The coordinator ends, wherever the test says, and the next one finds out what was decided."""

import pytest

from onnx_refit.errors import (
    StoreError,
)
from tests.serve.cluster.support import Killed, all_is_well


def kill_while_deciding(world):
    """The process ends with the transaction noted and the store's line not written."""

    def killed(*_, **__):
        raise Killed

    world.book._ledger.commit_arrays = world.book._ledger.rollback = killed


def kill_in(command):
    def arm(world):
        world.living[1].faults[command] = "coordinator"

    return arm


def kill_at(phase):
    def arm(world):
        world.kill_at = phase

    return arm


DEATHS = {
    "while preparing": (kill_in("Prepare"), False),
    "all prepared": (kill_at("prepared"), False),
    "while deciding": (kill_while_deciding, False),
    "decided": (kill_at("decided"), True),
    "while publishing": (kill_in("Publish"), True),
    "all published": (kill_at("published"), True),
}


@pytest.mark.parametrize("when", DEATHS)
@pytest.mark.parametrize("verb", ["refit", "rollback"])
@pytest.mark.parametrize("also", ["", "a replica ends", "a replica is deaf"])
def test_the_next_coordinator_finds_out_what_was_decided(play, when, verb, also):
    arm, decided = DEATHS[when]

    async def story(world):
        await world.refit(2.0, "first")
        arm(world)
        with pytest.raises(Killed):
            await (world.refit(3.0) if verb == "refit" else world.coordinator.rollback(1, "t"))
        answers = world.answers()
        old, new = (2.0, 2), ((3.0, 3) if verb == "refit" else (1.0, 1))
        assert {answer[:2] for answer in answers} <= {old, new}, "replicas go on answering"
        if also == "a replica ends":
            world.living[0].end_now()
        if also == "a replica is deaf":
            world.living[0].faults["Report"] = "deaf"
        world.start()
        await world.coordinator.settle()
        outcome = await world.coordinator.outcome("t")
        assert (outcome is not None) == decided
        version, scale = (new if decided else old)[::-1]
        if decided:
            assert outcome.version == version
        assert len(world.living) == (3 if not also else 2)
        assert {answer[:2] for answer in world.answers()} == {(scale, version)}
        await all_is_well(world, version, scale)

    play(story)


def test_a_coordinator_may_end_again_and_again(play):
    async def story(world):
        scale = 1.0
        for step in range(12):
            arm, decided = list(DEATHS.values())[step % len(DEATHS)]
            arm(world)
            with pytest.raises(Killed):
                await world.refit(10.0 + step, f"t{step}")
            world.start()
            await world.coordinator.settle()
            scale = 10.0 + step if decided else scale
            assert {answer[0] for answer in world.answers()} == {scale}
        assert len(world.living) == 3

    play(story)


def test_a_store_that_refuses_stops_all(play, monkeypatch):
    async def story(world):
        def refuse(*_, **__):
            raise StoreError("the disk is full")

        with monkeypatch.context() as patched:
            patched.setattr(world.book._ledger, "commit_arrays", refuse)
            with pytest.raises(StoreError, match="full"):
                await world.refit(2.0)
        assert {answer[:2] for answer in world.answers()} == {(1.0, 1)}
        await world.coordinator.look()
        await all_is_well(world, 1, 1.0)

    play(story)
