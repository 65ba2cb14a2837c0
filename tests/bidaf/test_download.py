"""Fetching the model, from a server of our own that can misbehave in every way we know."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from onnx_refit.files import WriteError
from onnx_refit.samples.bidaf.download import DownloadError, Remote, download

CONTENT = np.random.default_rng(0).integers(0, 256, 1_000_000, np.uint8).tobytes()
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    content = CONTENT
    cuts: list[int]
    ranges: list[str | None]
    knows_ranges = True
    status: int | None = None


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        if self.server.status is not None:
            self.send_error(self.server.status)
            return
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.knows_ranges else 0
        body = self.server.content[first:]
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(body)))
        if first:
            self.send_header(
                "Content-Range", f"bytes {first}-{len(self.server.content) - 1}/{len(self.server.content)}"
            )
        self.end_headers()
        if self.server.cuts:
            body = body[: self.server.cuts.pop(0)]
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(**settings) -> Iterator[tuple[Server, Remote]]:
    server = Server(("127.0.0.1", 0), Handler)
    server.cuts, server.ranges = [], []
    for name, value in settings.items():
        setattr(server, name, value)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield (
            server,
            Remote(f"http://127.0.0.1:{server.server_port}/bidaf-9.onnx", "bidaf-9.onnx", len(CONTENT), DIGEST),
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_the_whole_file(tmp_path):
    seen: list[tuple[int, int]] = []
    with serving() as (server, remote):
        path = download(tmp_path / "new" / "dir", remote, progress=lambda *state: seen.append(state))
        assert path.read_bytes() == CONTENT
        assert names(path.parent) == ["bidaf-9.onnx"]
        assert seen[-1] == (len(CONTENT), len(CONTENT))
        assert server.ranges == [None]
        assert download(path.parent, remote) == path
        assert server.ranges == [None], "a file that is there is not fetched again"


def test_a_cut_connection_is_resumed_at_once(tmp_path):
    with serving(cuts=[300_000, 200_000]) as (server, remote):
        assert download(tmp_path, remote).read_bytes() == CONTENT
        assert server.ranges == [None, "bytes=300000-", "bytes=500000-"]


def test_a_connection_cut_again_and_again_leaves_what_came_for_the_next_attempt(tmp_path):
    with serving(cuts=[100_000] * 3) as (server, remote):
        with pytest.raises(DownloadError, match="broke 3 times"):
            download(tmp_path, remote)
        assert names(tmp_path) == ["bidaf-9.onnx.part"]
        assert (tmp_path / "bidaf-9.onnx.part").read_bytes() == CONTENT[:300_000]
        assert download(tmp_path, remote).read_bytes() == CONTENT
        assert server.ranges[-1] == "bytes=300000-"
    assert names(tmp_path) == ["bidaf-9.onnx"]


def test_a_server_that_knows_no_ranges(tmp_path):
    (tmp_path / "bidaf-9.onnx.part").write_bytes(CONTENT[:10_000])
    with serving(knows_ranges=False) as (_, remote):
        assert download(tmp_path, remote).read_bytes() == CONTENT


def test_wrong_content_is_refused_and_removed(tmp_path):
    wrong = bytes([CONTENT[0] ^ 1]) + CONTENT[1:]
    with serving(content=wrong) as (_, remote), pytest.raises(DownloadError, match="not the published file"):
        download(tmp_path, remote)
    assert names(tmp_path) == []


def test_a_wrong_beginning_is_found_out(tmp_path):
    (tmp_path / "bidaf-9.onnx.part").write_bytes(bytes(10_000))
    with serving() as (_, remote):
        with pytest.raises(DownloadError, match="not the published file"):
            download(tmp_path, remote)
        assert download(tmp_path, remote).read_bytes() == CONTENT


def test_too_much_content_is_refused(tmp_path):
    with serving(content=CONTENT + b"more") as (_, remote), pytest.raises(DownloadError, match="not the published"):
        download(tmp_path, remote)


def test_a_part_that_is_too_long_is_thrown_away(tmp_path):
    (tmp_path / "bidaf-9.onnx.part").write_bytes(CONTENT + b"x")
    with serving() as (_, remote):
        assert download(tmp_path, remote).read_bytes() == CONTENT


def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "bidaf-9.onnx").write_bytes(b"old")
    with serving(cuts=[10] * 3) as (_, remote):
        with pytest.raises(DownloadError):
            download(tmp_path, remote)
        assert (tmp_path / "bidaf-9.onnx").read_bytes() == b"old"
        assert download(tmp_path, remote).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [404, 403, 500])
def test_the_servers_refusal(tmp_path, status):
    with serving(status=status) as (_, remote), pytest.raises(DownloadError, match=str(status)):
        download(tmp_path, remote)


def test_a_refused_range_starts_anew(tmp_path):
    (tmp_path / "bidaf-9.onnx.part").write_bytes(CONTENT[:10])
    with serving(status=416) as (server, remote):
        with pytest.raises(DownloadError):
            download(tmp_path, remote)
        assert server.ranges == ["bytes=10-", None]


def test_no_network(tmp_path):
    with serving() as (_, remote):
        pass  # now nobody listens at this address
    with pytest.raises(DownloadError, match=r"cannot be reached.*Check the network"):
        download(tmp_path, remote)
    nowhere = Remote("http://host.invalid/x", "bidaf-9.onnx", len(CONTENT), DIGEST)
    with pytest.raises(DownloadError, match="cannot be reached"):
        download(tmp_path, nowhere)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with serving() as (_, remote), pytest.raises(WriteError):
        download(tmp_path / "file", remote)


def test_a_full_disk(tmp_path, monkeypatch):
    import errno

    from onnx_refit.samples.bidaf import download as module

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_sync", full)
    with serving() as (_, remote), pytest.raises(WriteError, match="the disk is full"):
        download(tmp_path, remote)
    assert not (tmp_path / "bidaf-9.onnx").exists()
