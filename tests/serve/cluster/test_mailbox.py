"""Commands for replicas that have to ask for them."""

import asyncio

import pytest

from onnx_refit.serve.cluster.errors import ReplicaLostError
from onnx_refit.serve.cluster.mailbox import Answer, Carrier, Mailbox
from onnx_refit.serve.cluster.messages import Discard, Member, ReplicaState, Reply, Report, Target

STATE = ReplicaState(Target(1, 1), (1,))
REPLY = Reply(STATE)
OTHER = Reply(STATE, seconds={"late": 1.0})


@pytest.fixture
def box():
    lives = [True]

    async def alive(member):
        return lives[0]

    async def end(member):
        lives[0] = False

    return Mailbox(Member("r"), Carrier(alive, end), look_every=0.01)


def run(story):
    return asyncio.run(asyncio.wait_for(story, 20))


def test_a_command_waits_until_it_is_asked_for(box):
    async def story():
        asked = asyncio.create_task(box.ask(Report()))
        await asyncio.sleep(0)
        letter = await box.poll(None, 5)
        assert letter.command == Report()
        assert await box.poll(None, 5) == letter, "a poll that broke off lost nothing"
        assert await box.poll(Answer(letter.key, REPLY), 0.01) is None
        assert await asked is REPLY

    run(story())


def test_a_poll_waits_for_a_command(box):
    async def story():
        poll = asyncio.create_task(box.poll(None, 5))
        await asyncio.sleep(0)
        asked = asyncio.create_task(box.ask(Report()))
        letter = await poll
        await box.poll(Answer(letter.key, REPLY), 0.01)
        assert await asked is REPLY
        assert await box.poll(None, 0.01) is None

    run(story())


def test_an_answer_that_comes_late_or_twice_is_no_other_commands(box):
    async def story():
        first = asyncio.create_task(box.ask(Report()))
        given_up = await box.poll(None, 5)
        first.cancel()
        second = asyncio.create_task(box.ask(Discard("t")))
        await asyncio.sleep(0)
        letter = await box.poll(Answer(given_up.key, OTHER), 5)
        assert letter.command == Discard("t"), "the first was given up"
        assert not second.done()
        for _ in range(2):
            await box.poll(Answer(letter.key, REPLY), 0.01)
        assert await second is REPLY
        third = asyncio.create_task(box.ask(Report()))
        await asyncio.sleep(0)
        assert (await box.poll(Answer(letter.key, OTHER), 5)).command == Report()
        assert not third.done()
        third.cancel()

    run(story())


def test_commands_go_one_after_the_other(box):
    async def story():
        asked = [asyncio.create_task(box.ask(Discard(str(n)))) for n in range(3)]
        answer = None
        for n in range(3):
            letter = await box.poll(answer, 5)
            assert letter.command == Discard(str(n))
            answer = Answer(letter.key, REPLY)
        assert await box.poll(answer, 0.01) is None
        assert await asyncio.gather(*asked) == [REPLY] * 3

    run(story())


def test_a_replica_that_has_ended_answers_no_more(box):
    async def story():
        asked = asyncio.create_task(box.ask(Report()))
        await asyncio.sleep(0)
        await box.end()
        with pytest.raises(ReplicaLostError):
            await asked
        assert not await box.alive()

    run(story())
