"""Two phases over replicas in this process, each of which, and the coordinator, ends wherever the test says."""

import asyncio
import shutil

import numpy as np
import pytest

from onnx_refit.errors import (
    CanaryError,
    RefitRejectedError,
    VersionError,
)
from onnx_refit.refit.check import CheckOptions
from onnx_refit.refit.check_report import CheckReport
from onnx_refit.serve.cluster.book import FILE
from onnx_refit.serve.cluster.errors import ClusterError
from onnx_refit.serve.cluster.messages import Publish, RefitOrder, Target
from onnx_refit.serve.cluster.parcel import pack
from onnx_refit.serve.cluster.roster import Patience
from tests.serve.cluster.support import Killed, Local, all_is_well, golden


def test_the_whole_way(play):
    async def story(world):
        assert world.answers() == {(1.0, 1, 1)}
        report = await world.refit(2.0, canary=golden(2))
        assert (report.version, report.previous, report.changed, report.lost) == (2, 1, ("b", "w"), ())
        assert set(report.replicas) == set(world.replicas)
        assert world.answers() == {(2.0, 2, 2)}
        back = await world.coordinator.rollback(None, "back")
        assert (back.version, back.previous, back.target.epoch) == (1, 2, 3)
        assert world.answers() == {(1.0, 1, 3)}
        assert world.phases == ["checked", "prepared", "decided", "published", *["prepared", "decided", "published"]]
        with pytest.raises(VersionError, match="answers already"):
            await world.coordinator.rollback(1, "again")
        with pytest.raises(VersionError):
            await world.coordinator.rollback(7, "nowhere")
        await all_is_well(world, 1, 1.0)

    play(story)


def test_a_transaction_is_done_once(play):
    async def story(world):
        first = await world.refit(2.0, "once")
        again = await world.coordinator.refit(world.order(5.0, "once"))
        assert again.target == first.target
        back = await world.coordinator.rollback(1, "back once")
        assert (await world.coordinator.rollback(None, "back once")).target == back.target
        assert world.answers() == {(1.0, 1, 3)}
        assert (await world.coordinator.outcome("once")).version == 2
        assert (await world.coordinator.outcome("back once")).target == back.target
        assert await world.coordinator.outcome("never") is None

    play(story)


def test_what_the_check_refuses_reaches_no_replica(play):
    async def story(world):
        with pytest.raises(RefitRejectedError) as refused:
            await world.refit(2.0, w=np.eye(3, dtype=np.float32))
        report = refused.value.report
        assert isinstance(report, CheckReport)
        assert [rejected.name for rejected in report.rejected] == ["w"]
        with pytest.raises(RefitRejectedError):
            await world.refit(2.0, b=np.full(4, np.nan, np.float32))
        assert all("Prepare" not in local.asked for local in world.living)
        await all_is_well(world, 1, 1.0)

    play(story)


def test_a_canary_that_one_replica_refuses_stops_all(play):
    async def story(world):
        with pytest.raises(CanaryError, match="differs") as refused:
            await world.refit(2.0, canary=golden(3))
        assert "replica-" in str(refused.value)
        assert world.phases[-1] == "aborted"
        await all_is_well(world, 1, 1.0)

    play(story)


def test_partial_refits_are_made_of_what_answers(play, world):
    async def story(world):
        await world.refit(2.0, "whole")
        weights = pack({"b": np.full(4, 6, np.float32)})
        order = RefitOrder("part", weights, "bias", options=CheckOptions(partial=True))
        report = await world.coordinator.refit(order)
        assert report.changed == ("b",)
        for local in world.living:
            answer = local.replica.infer({"x": np.ones((1, 4), np.float32)})
            np.testing.assert_array_equal(answer["y"], np.full((1, 4), 8, np.float32))
        await world.join()
        answer = world.living[-1].replica.infer({"x": np.ones((1, 4), np.float32)})
        np.testing.assert_array_equal(answer["y"], np.full((1, 4), 8, np.float32))

    play(story)


# ---------------------------------------------------------------------- replicas that end, fall silent, lose replies


@pytest.mark.parametrize("fault", ["before", "after", "deaf", "lost reply"])
def test_a_replica_that_fails_before_the_decision_stops_all(play, world, fault):
    world.patience = Patience(prepare=0.2, publish=0.2, report=0.2)

    async def story(world):
        world.living[1].faults["Prepare"] = fault
        with pytest.raises(ClusterError, match="nothing was published"):
            await world.refit(2.0)
        assert {answer[:2] for answer in world.answers()} == {(1.0, 1)}
        assert await world.coordinator.outcome("t") is None
        assert world.replicas["replica-1"].ended == (fault != "lost reply"), "a deaf one is no use"
        await all_is_well(world, 1, 1.0)

    play(story)


def test_a_replica_that_ended_before_is_not_waited_for(play):
    async def story(world):
        world.living[1].end_now()
        report = await world.refit(2.0)
        assert len(report.replicas) == 2
        await all_is_well(world, 2, 2.0)

    play(story)


@pytest.mark.parametrize("fault", ["before", "after", "deaf", "lost reply"])
@pytest.mark.parametrize("verb", ["refit", "rollback"])
def test_a_replica_that_fails_after_the_decision_is_ended_and_the_others_go_on(play, fault, verb):
    async def story(world):
        version, scale = 2, 2.0
        if verb == "rollback":
            await world.refit(2.0, "first")
            version, scale = 1, 1.0
        failing = world.living[1]
        failing.faults["Publish"] = fault
        done = world.refit(2.0) if verb == "refit" else world.coordinator.rollback(1, "t")
        report = await done
        assert report.version == version
        assert report.lost == (failing.member.name,)
        assert failing.ended, "it would answer with the old version"
        await all_is_well(world, version, scale)

    play(story)


def test_a_replica_that_no_longer_has_what_it_prepared_is_sent_it_anew(play):
    async def story(world):
        forgetful = world.living[1]

        def forget():
            forgetful.replica._discard("t")

        forgetful.faults["Publish"] = forget
        report = await world.refit(2.0)
        assert report.lost == ()
        await all_is_well(world, 2, 2.0)

    play(story)


def test_every_replica_may_end(play):
    async def story(world):
        for local in world.living:
            local.faults["Publish"] = "before"
        report = await world.refit(2.0)
        assert len(report.lost) == 3
        with pytest.raises(ClusterError, match="no replica"):
            await world.refit(3.0, "nobody")
        await world.join(2)
        await all_is_well(world, 2, 2.0)

    play(story)


def test_a_replica_that_joins_meanwhile_comes_in_at_what_was_decided(play, world):
    world.patience = Patience(prepare=30.0, publish=0.2, report=0.2)

    async def story(world):
        gate = asyncio.Event()
        local = world.living[0]
        ask = local.ask

        async def slow(command):
            if type(command).__name__ == "Prepare":
                await gate.wait()
            return await ask(command)

        welcome = await world.coordinator.hello()
        local.ask = slow
        refit = asyncio.create_task(world.refit(2.0))
        await asyncio.sleep(0)
        late = world.replicas["late"] = Local(world.plan, welcome, "late")
        admission = asyncio.create_task(world.coordinator.admit(late.member, late.replica.state))
        joining = asyncio.create_task(world.join())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not admission.done(), "nobody comes in while it is open what is decided"
        gate.set()
        await refit
        assert await admission is None, "it stands at version 1, so it is sent away"
        late.end_now()
        await joining
        await all_is_well(world, 2, 2.0)

    play(story)


def test_a_replica_that_joins_after_a_rollback_to_what_it_has_loaded_takes_the_new_epoch(play):
    async def story(world):
        welcome = await world.coordinator.hello()
        await world.refit(2.0)
        await world.coordinator.rollback(1, "back")
        late = world.replicas["late"] = Local(world.plan, welcome, "late")
        target = await world.coordinator.admit(late.member, late.replica.state)
        assert target == Target(1, 3)
        late.replica.carry_out(Publish("join", target))
        await all_is_well(world, 1, 1.0)

    play(story)


def test_epochs_grow_even_if_the_book_is_lost(play):
    async def story(world):
        for step in range(5):
            await world.refit(2.0 + step, f"t{step}")
        members = [(local.member, local) for local in world.living]
        (world.path / FILE).unlink()
        world.start()
        # One is ahead of the others, as if a second phase had not reached them.
        members[-1][1].replica.carry_out(Publish("more", Target(6, 20)))
        for member, local in members:
            assert world.coordinator.participant(member.name) is None
            local.replica.carry_out(Publish("join", await world.coordinator.admit(member, local.replica.state)))
        await world.coordinator.settle()
        assert {epoch for _, _, epoch in world.answers()} == {21}
        await all_is_well(world, 6, 6.0)

    play(story)


def test_an_old_copy_of_the_store_is_followed_and_epochs_still_grow(play, world):
    async def story(world):
        await world.refit(2.0, "a")
        shutil.copytree(world.path, world.path.with_name("copy"))
        await world.refit(3.0, "b")
        epoch = world.book.target.epoch
        world.path = world.path.with_name("copy")
        world.start()
        await world.coordinator.settle()
        assert {answer[:2] for answer in world.answers()} == {(2.0, 2)}
        assert world.book.target.epoch > epoch
        await all_is_well(world, 2, 2.0)

    play(story)


def test_a_replica_that_does_not_discard_is_ended(play):
    async def story(world):
        world.living[0].faults["Discard"] = "deaf"
        world.kill_at = "prepared"
        with pytest.raises(Killed):
            await world.refit(2.0)
        world.start()
        await world.coordinator.settle()
        assert len(world.living) == 2
        await all_is_well(world, 1, 1.0)

    play(story)


def test_a_late_report_of_a_later_epoch_takes_all_along(play, world):
    world.patience = Patience(prepare=2.0, publish=0.2, report=30.0)

    async def story(world):
        await world.refit(2.0)
        late = world.living[-1]
        late.replica.carry_out(Publish("more", Target(2, 9)))
        ask = late.ask

        async def slowly(command):
            for _ in range(20):
                await asyncio.sleep(0)
            return await ask(command)

        late.ask = slowly
        world.start()
        await world.coordinator.settle()
        assert world.answers() == {(2.0, 2, 10)}

    play(story)


def test_nobody_waits_for_a_replica_that_does_not_say_where_it_stands(play, world):
    world.patience = Patience(prepare=60.0, publish=60.0, report=60.0)

    async def story(world):
        slow = world.living[0]
        world.kill_at = "decided"
        with pytest.raises(Killed):
            await world.refit(2.0)
        gate = asyncio.Event()
        ask = slow.ask

        async def wait(command):
            await gate.wait()
            return await ask(command)

        slow.ask = wait
        world.start()
        settling = asyncio.create_task(world.coordinator.settle())
        while {local.infer()[1] for local in world.living[1:]} != {2}:
            await asyncio.sleep(0.01)
        assert not settling.done()
        gate.set()
        await settling
        assert not slow.ended
        await all_is_well(world, 2, 2.0)

    play(story)


def test_rollback_sends_weights_to_replicas_that_do_not_hold_them(play):
    async def story(world):
        await world.refit(2.0, "a")
        await world.join()
        assert world.living[-1].replica.state.held == (2,)
        report = await world.coordinator.rollback(1, "back")
        assert len(report.replicas) == 4
        await all_is_well(world, 1, 1.0)

    play(story)


def test_what_was_prepared_for_a_rollback_is_published_by_the_next_coordinator(play):
    """Not thrown away and sent again: the store need not be read for it."""

    async def story(world):
        await world.refit(2.0, "a")
        await world.join()
        world.kill_at = "decided"
        with pytest.raises(Killed):
            await world.coordinator.rollback(1, "back")
        late = world.living[-1]
        assert late.replica.state.prepared == "back"
        late.asked.clear()
        world.start()
        await world.coordinator.settle()
        assert late.asked == ["Report", "Publish"]
        await all_is_well(world, 1, 1.0)

    play(story)


def test_nobody_loses_a_refit_by_going_away(play):
    async def story(world):
        refit = asyncio.create_task(world.refit(2.0))
        await asyncio.sleep(0)
        refit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await refit
        outcome = await world.coordinator.outcome("t")
        assert outcome.version == 2
        await all_is_well(world, 2, 2.0)

    play(story)
