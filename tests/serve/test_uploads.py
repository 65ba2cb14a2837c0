"""Uploads, whichever way they come: past the event loop where the connection allows it, through it elsewhere."""

import asyncio
import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

pytest.importorskip("uvicorn")
import onnx_refit
from onnx_refit.serve.client import RefitClient
from onnx_refit.serve.direct import Body
from onnx_refit.serve.errors import ServeError
from onnx_refit.serve.priority import background_pool
from onnx_refit.serve.receiver import Receiver
from tests.serve.conftest import TOKEN
from tests.serve.models import affine, affine_weights

pytestmark = pytest.mark.serve
WIDTH = 1024
STAGE = "/v2/models/wide/refit/stage"


@pytest.fixture(scope="module")
def wide_plan(tmp_path_factory):
    """A model whose weights take 4 MB: several blocks."""
    return onnx_refit.build(affine(1.0, WIDTH)).save(tmp_path_factory.mktemp("wide") / "wide.plan")


@pytest.fixture
def running(start, wide_plan, tmp_path):
    return start(wide_plan, "--spool", tmp_path / "spool")


def head(length, *lines, path=STAGE):
    text = [
        f"POST {path} HTTP/1.1", "host: x", f"authorization: Bearer {TOKEN}", *lines,
        *([] if length is None else [f"content-length: {length}"]), "", "",
    ]  # fmt: skip
    return "\r\n".join(text).encode()


def answer(connection):
    """Everything until the server closes."""
    connection.settimeout(60)
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            received += piece
    return received


def left_over(tmp_path):
    return list((tmp_path / "spool").glob("upload-*"))


def wait(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def test_what_comes_in_any_pieces_is_what_is_staged(running, tmp_path):
    data = save(affine_weights(2.0, WIDTH))
    digest = hashlib.sha256(data).hexdigest()
    ways = {
        "at once": [data],
        "with the headers": None,
        "small first": [data[:1], data[1:70_000], data[70_000:]],
        "odd": [data[i : i + 333_333] for i in range(0, len(data), 333_333)],
    }
    for name, pieces in ways.items():
        with running.connect() as connection:
            if pieces is None:
                connection.sendall(head(len(data)) + data)
            else:
                connection.sendall(head(len(data)))
                for piece in pieces:
                    connection.sendall(piece)
                    time.sleep(0.01)  # so that pieces arrive apart; nothing depends on it
            received = answer(connection)
        status, _, body = received.partition(b"\r\n\r\n")
        assert status.split()[1] in (b"200", b"201"), (name, received)
        assert b"connection: close" in status, name
        assert json.loads(body)["sha256"] == digest, name
    wait(lambda: not left_over(tmp_path))


def test_chunked_and_continued_uploads_work_too(running):
    data = save(affine_weights(3.0, WIDTH))
    with running.connect() as connection:
        connection.sendall(head(None, "transfer-encoding: chunked", "connection: close"))
        for at in range(0, len(data), 1 << 20):
            piece = data[at : at + (1 << 20)]
            connection.sendall(b"%x\r\n" % len(piece) + piece + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert b" 201 " in answer(connection).split(b"\r\n")[0]
    with running.connect() as connection:
        connection.sendall(head(len(data), "expect: 100-continue"))
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(data)
        assert b" 200 " in answer(connection).split(b"\r\n")[0], "the same content is staged already"


def test_a_refused_upload_is_told_why(running, tmp_path):
    data = save(affine_weights(2.0, WIDTH))
    with running.connect() as connection:
        connection.sendall(head(len(data), "x-content-sha256: " + "0" * 64) + data)
        received = answer(connection)
    assert b" 422 " in received.split(b"\r\n")[0]
    assert b"announced was 0000" in received
    assert not left_over(tmp_path)
    for path, status in ((STAGE + "?partial=maybe", b"400"), ("/v2/models/none/refit/stage", b"404")):
        with running.connect() as connection:
            connection.sendall(head(len(data), "connection: close", path=path) + data)
            assert answer(connection).split()[1] == status


def test_clients_that_go_away_leave_nothing_and_hold_up_nobody(running, tmp_path):
    data = save(affine_weights(2.0, WIDTH))
    slow = [running.connect() for _ in range(8)]
    for connection in slow:
        connection.sendall(head(len(data)) + data[:300_000])
    wait(lambda: len(left_over(tmp_path)) == len(slow))
    # More of them than there are threads to read with, and still an upload gets through.
    assert RefitClient(running.url, TOKEN).stage("wide", _file(tmp_path, data))["state"] == "staged"
    for connection in slow:
        connection.close()
    wait(lambda: not left_over(tmp_path))
    wait(lambda: len([entry for entry in running.log if entry.get("status") == 400]) == len(slow))
    assert all("went away" in entry["error"] for entry in running.log if entry.get("status") == 400)
    assert not [entry for entry in running.log if entry["level"] == "error"]


def _file(tmp_path, data):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    return path


def test_nothing_waits_for_what_is_being_staged(running, tmp_path):
    """Status, commits and rollbacks go on while a client uploads and stages."""
    client = RefitClient(running.url, TOKEN)
    first = client.stage("wide", _file(tmp_path, save(affine_weights(2.0, WIDTH))))
    with running.connect() as connection:
        connection.sendall(head(90_000_000) + b"x" * 5_000_000)
        wait(lambda: left_over(tmp_path))
        assert client.commit("wide", first["id"])["version"] == 2
        assert client.status("wide")["version"] == 2
        assert client.rollback("wide")["version"] == 1


def test_a_stopping_server_does_not_wait_for_an_upload(start, wide_plan, tmp_path):
    running = start(wide_plan, "--spool", tmp_path / "spool", "--drain-seconds", "1")
    with running.connect() as connection:
        connection.sendall(head(90_000_000) + b"x" * 5_000_000)
        wait(lambda: left_over(tmp_path))
        assert running.stop() == 0
    assert not left_over(tmp_path)


@pytest.fixture
def receiver():
    made = Receiver()
    yield made
    made.close()


def collect(receiver, tmp_path, first, remaining, seconds, feed):
    """Have a body received from a real socket pair while ``feed`` writes to the other end; what its file holds."""
    path = tmp_path / "body"
    told: list[int] = []

    async def run():
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        feeder = threading.Thread(target=feed, args=(theirs,))
        feeder.start()
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            received = await receiver.receive(Body(first, remaining, ours), file, seconds, told.append)
        finally:
            os.close(file)
            feeder.join()
            theirs.close()
            assert ours.fileno() == -1, "the socket must be given back"
        received.release()
        assert told == sorted(told)
        assert told[-1] == received.nbytes
        assert received.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        return path.read_bytes()

    return asyncio.run(run())


def test_a_body_is_read_to_its_end_and_no_further(receiver, tmp_path):
    data = np.random.default_rng(0).bytes(5_000_000)
    for first in (0, 10, 300_000):
        got = collect(
            receiver,
            tmp_path,
            data[:first],
            len(data) - first,
            60,
            lambda end, rest=data[first:]: end.sendall(rest + b"next"),
        )
        assert got == data
        (tmp_path / "body").unlink()


def test_a_body_that_does_not_come_is_given_up(receiver, tmp_path):
    with pytest.raises(ServeError, match="not complete after") as late:
        collect(receiver, tmp_path, b"", 10_000_000, 0.05, lambda end: end.sendall(b"x" * 1000))
    assert late.value.status == 408
    with pytest.raises(ServeError, match="went away") as gone:
        collect(receiver, tmp_path, b"", 10_000_000, 60, lambda end: (end.sendall(b"x" * 1000), end.close()))
    assert gone.value.status == 400


def test_the_end_of_the_process_that_receives_is_told_and_made_good(receiver, tmp_path):
    def cut_short(end):
        end.sendall(b"x" * 300_000)
        receiver._process.kill()
        receiver._process.wait()
        end.shutdown(socket.SHUT_WR)

    with pytest.raises(ServeError, match="ended") as ended:
        collect(receiver, tmp_path, b"", 300_001, 60, cut_short)
    assert ended.value.status == 503
    (tmp_path / "body").unlink()
    assert (
        collect(receiver, tmp_path, b"a", 300_000, 60, lambda end: end.sendall(b"b" * 300_000)) == b"a" + b"b" * 300_000
    )


def test_a_file_that_cannot_be_written_is_the_disks_word(receiver, tmp_path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no disk here that is always full")

    async def run():
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs, full.open("r+b", buffering=0) as file:
            theirs.sendall(b"x" * 100_000)
            await receiver.receive(Body(b"", 100_000, ours), file.fileno(), 60, lambda done: None)

    with pytest.raises(OSError, match="No space left"):
        asyncio.run(run())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads have priorities of their own on Linux")
def test_background_threads_give_way():
    with background_pool(1, "test") as pool:
        inside = pool.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result()
    assert inside > os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) or inside == 19
