"""What a coordinator writes down: the store, one small file, and who may write there."""

import numpy as np
import pytest

import onnx_refit
from onnx_refit.errors import (
    StoreError,
    StoreLockedError,
    VersionError,
)
from onnx_refit.serve.cluster.book import FILE, Book
from onnx_refit.serve.cluster.messages import RefitOrder, Target
from onnx_refit.serve.cluster.parcel import pack
from tests.serve.cluster.support import in_loop
from tests.serve.models import affine


def test_the_store_is_an_ordinary_one(play, world, affine_plan):
    async def story(world):
        await world.refit(2.0)
        await world.refit(3.0, "u")
        await world.coordinator.forget(2)
        with pytest.raises(VersionError):
            await world.coordinator.rollback(2, "v")
        with pytest.raises(VersionError, match="current"):
            await world.coordinator.forget(3)

    play(story)
    world.close()
    with onnx_refit.load(affine_plan, store=world.path) as engine:
        assert engine.version == 3
        assert [info.number for info in engine.versions] == [1, 3]
        assert engine.run({"x": np.ones((1, 4), np.float32)})["y"][0, 0] == 6.0


def test_one_coordinator_at_a_time_and_one_plan(world, affine_plan):
    world.start()
    with pytest.raises(StoreLockedError):
        Book(world.path, affine_plan)
    world.close()
    with pytest.raises(StoreError, match="another plan"):
        Book(world.path, onnx_refit.build(affine(1.0, width=6)))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1}', '{"format": 9}', "\x00"])
def test_a_damaged_book_is_refused_and_gives_its_lock_back(world, affine_plan, text):
    world.start()
    world.close()
    (world.path / FILE).write_text(text)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"damaged|format"):
            Book(world.path, affine_plan)


def test_the_weights_are_shipped_once(affine_plan, tmp_path):
    from onnx_refit.serve.cluster.coordinator import Coordinator
    from onnx_refit.serve.cluster.incoming import Transport
    from tests.serve.cluster.support import World

    world = World(affine_plan, tmp_path / "store")
    shipped = []

    def ship(parcel):
        shipped.append(parcel)
        return parcel

    async def story():
        world.start()
        world.coordinator = Coordinator(
            affine_plan,
            world.book,
            lambda member: world.replicas[member.name],
            transport=Transport(ship=ship),
        )
        await world.join(3)
        assert len(shipped) == 1, "for all that join"
        await world.refit(2.0)
        assert len(shipped) == 1, "the client has shipped them already"
        half = RefitOrder("half", pack({"w": np.eye(4, dtype=np.float16), "b": np.ones(4, np.float16)}), "half")
        await world.coordinator.refit(half)
        assert len(shipped) == 2, "the check had to cast them"
        assert world.book.target == Target(3, 3)

    in_loop(story())
    world.close()
