import pytest

import onnx_refit
from tests.serve.cluster.support import World, in_loop
from tests.serve.models import affine


@pytest.fixture(scope="session")
def affine_plan():
    return onnx_refit.build(affine(1.0))


@pytest.fixture
def world(affine_plan, tmp_path):
    """A store; replicas and coordinators come in the test."""
    world = World(affine_plan, tmp_path / "store")
    yield world
    world.close()


@pytest.fixture
def play(world):
    """Run a story with three replicas on an event loop."""

    def play(story, replicas=3):
        async def whole():
            world.start()
            await world.join(replicas)
            return await story(world)

        return in_loop(whole())

    return play
