"""A server with a store: killed at any moment, it comes back with the last version that it said was committed."""

import contextlib
import random
import threading
import time

import pytest

pytest.importorskip("uvicorn")
from onnx_refit.serve.client import RefitClient, ServerError
from tests.serve.conftest import TOKEN

pytestmark = pytest.mark.serve


@pytest.fixture
def begin(start, plan, tmp_path):
    def begin():
        return start(plan, "--store", tmp_path / "deep" / "store", "--no-access-log")

    return begin


def kill(running):
    running.process.kill()
    running.process.wait()


def test_what_was_committed_answers_after_kill_9(begin, weights):
    running = begin()
    client = RefitClient(running.url, TOKEN)
    for scale in (2, 3):
        client.commit("affine", client.stage("affine", weights(scale))["id"])
    client.stage("affine", weights(4))
    kill(running)
    running = begin()
    assert running.infer() == (3.0, 3)
    client = RefitClient(running.url, TOKEN)
    assert client.status("affine")["staged"] == [], "what was only staged is gone"
    assert client.rollback("affine", 2)["version"] == 2, "a stored version can be rolled back to after a restart"
    kill(running)
    running = begin()
    assert running.infer() == (2.0, 2)
    client = RefitClient(running.url, TOKEN)
    assert client.commit("affine", client.stage("affine", weights(5))["id"])["version"] == 4, "numbers are not reused"
    assert [v["number"] for v in client.status("affine")["versions"]] == [1, 2, 3, 4]
    client.delete("affine", 3)
    assert running.stop() == 0
    running = begin()
    assert running.infer() == (5.0, 4)
    with pytest.raises(ServerError):
        RefitClient(running.url, TOKEN).rollback("affine", 3)


def test_a_version_was_committed_when_it_was(begin, weights):
    """Not when a server that was started again read it."""

    def moments():
        return {
            version["number"]: version["committed"]
            for version in RefitClient(running.url, TOKEN).status("affine")["versions"]
        }

    running = begin()
    client = RefitClient(running.url, TOKEN)
    client.commit("affine", client.stage("affine", weights(2))["id"])
    client.rollback("affine")
    before = moments()
    assert before[1] < before[2]
    for _ in range(2):
        kill(running)
        running = begin()
        assert moments() == before
        RefitClient(running.url, TOKEN).rollback("affine", 3 - running.infer()[1])
        assert moments() == before


def test_a_client_that_asks_again_after_a_restart_learns_what_became_of_it(begin, weights):
    running = begin()
    client = RefitClient(running.url, TOKEN)
    done = client.stage("affine", weights(2))
    committed = client.commit("affine", done["id"])
    only_staged = client.stage("affine", weights(3))["id"]
    kill(running)
    running = begin()
    client = RefitClient(running.url, TOKEN)
    again = client.commit("affine", done["id"])
    assert again["repeated"] is True
    assert again["version"] == committed["version"] == 2
    assert client.stage("affine", weights(2))["state"] == "committed", "it answers already"
    for ask in (client.staged, client.commit, client.discard):
        with pytest.raises(ServerError, match="before the server was restarted, and is gone") as gone:
            ask("affine", only_staged)
        assert gone.value.status == 410
    assert client.stage("affine", weights(3))["id"] == only_staged, "the same weights get the same id"
    assert client.commit("affine", only_staged)["version"] == 3
    with pytest.raises(ServerError, match="does not outlive the server") as unknown:
        client.staged("affine", "0" * 16)
    assert unknown.value.status == 404


def test_a_commit_that_the_server_did_not_survive_is_found_out(tmp_path):
    """The journal holds a beginning without an end: the next version's number tells whether it happened."""
    from onnx_refit.serve.memory import DeskMemory

    path = tmp_path / "desk.jsonl"
    memory = DeskMemory(path)
    for identifier, newest in (("happened", 4), ("did-not", 7), ("failed", 7)):
        memory.staged(identifier, {"label": identifier, "report": {}, "changed": ["w"]})
        memory.committing(identifier, newest)
    memory.not_committed("failed")
    with path.open("ab") as file:
        file.write(b'{"id":"torn","stag')
    memory = DeskMemory(path)
    memory.settle({5: {"version": 5}}.get)
    assert memory.known["happened"].committed == {"version": 5}
    assert memory.known["happened"].summary == {"label": "happened"}
    assert memory.known["did-not"].committed is None
    assert "torn" not in memory.known
    # Another one's version 8, made later, is nobody else's.
    again = DeskMemory(path)
    again.settle({5: {"version": 5}, 8: {"version": 8}}.get)
    assert again.known["happened"].committed == {"version": 5}
    assert again.known["did-not"].committed is None
    assert again.known["failed"].committed is None
    many = DeskMemory(tmp_path / "many.jsonl")
    for number in range(400):
        many.staged(str(number), {})
    assert list(DeskMemory(tmp_path / "many.jsonl").known) == [str(number) for number in range(144, 400)]


def test_a_second_server_on_the_store_is_refused(begin):
    running = begin()
    with pytest.raises(AssertionError, match="StoreLockedError"):
        begin()
    assert running.infer() == (1.0, 1)


def test_another_plan_on_the_store_is_refused(start, begin, tmp_path):
    import onnx_refit
    from tests.serve.models import affine

    begin().stop()
    other = onnx_refit.build(affine(1.0, width=6)).save(tmp_path / "affine.plan")
    with pytest.raises(AssertionError, match="another plan"):
        start(other, "--store", tmp_path / "deep" / "store")


@pytest.mark.parametrize("seed", range(6))
def test_kill_9_in_the_middle_of_commits(begin, weights, seed):
    rng = random.Random(seed)
    running = begin()
    client = RefitClient(running.url, TOKEN, timeout=60)
    told = [(1, 1.0)]

    def commit_all_the_time():
        with contextlib.suppress(ServerError):
            for step in range(1000):
                scale = 2 + step % 3
                done = client.commit("affine", client.stage("affine", weights(scale))["id"])
                told.append((done["version"], float(scale)))

    thread = threading.Thread(target=commit_all_the_time)
    thread.start()
    deadline = time.monotonic() + 60
    target = rng.randrange(2, 8)
    while len(told) < target and time.monotonic() < deadline:
        time.sleep(rng.random() * 0.004)
    time.sleep(rng.random() * 0.02)
    kill(running)
    thread.join()
    running = begin()
    scale, version = running.infer()
    last, last_scale = told[-1]
    # The one in flight may have been written down without the client hearing of it.
    assert version in (last, last + 1)
    expected = last_scale if version == last else {1.0: 2.0, 2.0: 3.0, 3.0: 4.0, 4.0: 2.0}[last_scale]
    assert scale == expected
    assert RefitClient(running.url, TOKEN).status("affine")["version"] == version
