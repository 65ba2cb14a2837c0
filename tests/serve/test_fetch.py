"""Weights that a client points to: only from places of the operator's, and by no trick from anywhere else."""

import contextlib
import hashlib
import http.server
import os
import ssl
import subprocess
import threading

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("uvicorn")
from click.testing import CliRunner

from onnx_refit.errors import InputError
from onnx_refit.serve.client import RefitClient, ServerError
from onnx_refit.serve.errors import SettingsError
from onnx_refit.serve.origins import DirectoryOrigin, NoSuchFileError, UrlOrigin, parse_name, parse_origins
from tests.serve.conftest import TOKEN
from tests.serve.models import affine_weights

pytestmark = pytest.mark.serve
FETCH = "/v2/models/affine/refit/fetch"


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def place(tmp_path):
    """A directory that weights may come from, with a secret next to it."""
    root = tmp_path / "place"
    (root / "epoch7").mkdir(parents=True)
    save_file(affine_weights(2.0), root / "two.safetensors")
    save_file(affine_weights(3.0), root / "epoch7" / "model.safetensors")
    save_file(affine_weights(9.0), tmp_path / "secret.safetensors")
    (tmp_path / "elsewhere").mkdir()
    save_file(affine_weights(9.0), tmp_path / "elsewhere" / "secret.safetensors")
    return root


class Files(http.server.SimpleHTTPRequestHandler):
    """Files of a directory, and answers that no good server gives."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self):
        self.server.asked.append(self.path)
        name = self.path.rpartition("/")[2]
        if name.startswith("redirect"):
            self.send_response(302)
            self.send_header("Location", self.server.elsewhere)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif name.startswith("short"):
            self.answer(b"x" * 100, 1000)
            self.close_connection = True
        elif name.startswith("huge"):
            self.answer(b"", 1 << 40)
            self.close_connection = True
        elif name.startswith("endless"):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x" * (1 << 20))
            self.close_connection = True
        elif name.startswith("packed"):
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", "3")
            self.end_headers()
            self.wfile.write(b"abc")
        elif name.startswith("broken"):
            self.send_error(500, "an error that says too much")
        else:
            super().do_GET()

    def answer(self, data, announced):
        self.send_response(200)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Remembers what it was asked for."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asked: list[str] = []
        self.elsewhere = "http://127.0.0.1:1/"
        self.url = ""


@contextlib.contextmanager
def web(directory, certificate=None):
    def handler(*arguments):
        return Files(*arguments, directory=str(directory))

    with Server(("127.0.0.1", 0), handler) as server:
        scheme = "http"
        if certificate is not None:
            scheme = "https"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        server.url = f"{scheme}://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def refusal(client, *arguments, **options):
    with pytest.raises(ServerError) as refused:
        client.fetch("affine", *arguments, **options)
    return refused.value


def test_from_a_directory(start, plan, place):
    running = start(plan, "--weights-from", f"s={place}")
    client = RefitClient(running.url, TOKEN)
    assert client.places("affine") == ["s"]
    staged = client.fetch("affine", "s", "epoch7/model.safetensors", sha256=digest(place / "epoch7/model.safetensors"))
    assert (staged["state"], staged["label"]) == ("staged", "s:epoch7/model.safetensors")
    assert running.infer() == (1.0, 1)
    client.commit("affine", staged["id"])
    assert running.infer() == (3.0, 2)
    again = client.stage("affine", place / "epoch7" / "model.safetensors")
    assert again["id"] == staged["id"], "the same content, however it came"
    assert client.status("affine")["versions"][1]["source"] == "s:epoch7/model.safetensors"
    assert str(place) not in running.output.partition("serving")[2]


def test_from_the_command_line(start, plan, place):
    from onnx_refit.cli.serving import push_command

    running = start(plan, "--weights-from", f"s={place}")
    runner = CliRunner(env={"ONNX_REFIT_TOKEN": TOKEN})
    done = runner.invoke(push_command, ["two.safetensors", "--from", "s", "--commit", "--url", running.url])
    assert done.exit_code == 0, done.output
    assert running.infer() == (2.0, 2)
    wrong = runner.invoke(push_command, ["two.safetensors", "--sha256", "0" * 64, "--url", running.url])
    assert wrong.exit_code == 2


def test_nothing_may_be_fetched_unless_the_operator_says_from_where(server):
    client = RefitClient(server.url, TOKEN)
    assert client.places("affine") == []
    for place in ("s", "", "/etc", "https://example.org/", "file:///"):
        assert refusal(client, place, "passwd").status == 404


def test_the_verb_needs_the_token(start, plan, place):
    running = start(plan, "--weights-from", f"s={place}")
    body = {"from": "s", "name": "two.safetensors"}
    assert running.ask("POST", FETCH, body, token=None)[0] == 401
    assert running.ask("POST", FETCH, body, token="wrong" * 5)[0] == 403
    assert running.ask("GET", FETCH, token=None)[0] == 401
    assert running.ask("POST", FETCH, body)[0] == 201


ATTACKS = [
    "../secret.safetensors",
    "epoch7/../../secret.safetensors",
    "epoch7/..",
    "./two.safetensors",
    ".hidden",
    "/etc/passwd",
    "//etc/passwd",
    "two.safetensors/",
    "epoch7//model.safetensors",
    "..%2fsecret.safetensors",
    "%2e%2e/secret.safetensors",
    "..\\secret.safetensors",
    "two.safetensors\x00.npz",
    "two.safetensors\n",
    "two safetensors",
    "two.safetensors?x=1",
    "two.safetensors#x",
    "@evil.example/two",
    "http://evil.example/x",
    "file:///etc/passwd",
    "C:two",
    "\u2025/secret.safetensors",
    "\uff0e\uff0e/secret.safetensors",
    "~root",
    "$HOME",
    "/".join("a" * 17),
    "a" * 201,
    "",
    None,
    7,
    ["two.safetensors"],
    {"a": 1},
]


@pytest.mark.parametrize("name", ATTACKS, ids=[repr(name)[:30] for name in ATTACKS])
def test_a_name_that_is_not_plain_is_no_name(name):
    # "@evil" and the like would be harmless in a path and are taken out all the same, but for "@" inside a name.
    with pytest.raises(InputError):
        parse_name(name)


def test_attacks_on_a_directory(start, plan, place):
    (place / "link.safetensors").symlink_to(place.parent / "secret.safetensors")
    (place / "inside.safetensors").symlink_to(place / "two.safetensors")
    (place / "out").symlink_to(place.parent / "elsewhere")
    (place / "loop").symlink_to(place / "loop")
    os.mkfifo(place / "fifo")
    (place / "unreadable").mkdir()
    running = start(plan, "--weights-from", f"s={place}", "--max-upload-mb", "1")
    client = RefitClient(running.url, TOKEN, timeout=30)
    for name in ATTACKS:
        status, _, body = running.ask("POST", FETCH, {"from": "s", "name": name})
        assert status == 400, (name, body)
    for name in (
        "link.safetensors",
        "inside.safetensors",
        "out/secret.safetensors",
        "loop",
        "loop/x",
        "fifo",
        "epoch7",
        "unreadable",
        "missing",
        "two.safetensors/x",
    ):
        refused = refusal(client, "s", name)
        assert refused.status == 404, name
        assert str(place.parent) not in str(refused.body)
    (place / "large").write_bytes(b"x" * 1_000_001)
    assert refusal(client, "s", "large").status == 413
    (place / "empty").write_bytes(b"")
    assert refusal(client, "s", "empty").status == 400
    assert refusal(client, "s", "two.safetensors", sha256="0" * 64).status == 422
    assert refusal(client, "s", "two.safetensors", sha256="0" * 63).status == 400
    assert running.ask("POST", FETCH, {"from": "s", "name": "two.safetensors", "path": "/etc"})[0] == 400
    assert running.ask("POST", FETCH, {"from": "s", "name": "two.safetensors", "partial": "yes"})[0] == 400
    assert running.ask("POST", FETCH, {"from": "s", "name": "two.safetensors", "label": "<b>"})[0] == 400
    assert client.status("affine")["staged"] == []
    assert client.fetch("affine", "s", "two.safetensors")["state"] == "staged"


def test_a_pickled_checkpoint_and_a_model_with_external_data_are_refused_here_too(start, plan, place):
    import onnx

    from tests.serve.models import affine

    (place / "pickle.pt").write_bytes(b"\x80\x04K\x01.")
    model = affine(4.0, width=64)
    onnx.save(model, place / "m.onnx", save_as_external_data=True, location="data.bin", size_threshold=16)
    running = start(plan, "--weights-from", f"s={place}")
    client = RefitClient(running.url, TOKEN)
    assert refusal(client, "s", "pickle.pt").status == 415
    assert refusal(client, "s", "m.onnx").status == 422, "the file that it names is not fetched with it"


def test_a_directory_that_is_swapped_for_a_link_meanwhile(place, monkeypatch):
    """Between looking and opening there is nothing to swap: what was opened is what is read."""
    origin = DirectoryOrigin(place)
    real = os.open
    swapped: list[bool] = []

    def swap(path, flags, *rest, **options):
        if path == "model.safetensors" and not swapped:
            swapped.append(True)
            (place / "epoch7").rename(place / "old")
            (place / "epoch7").symlink_to(place.parent / "elsewhere")
            (place.parent / "elsewhere" / "model.safetensors").write_bytes(b"secret")
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", swap)
    opened = origin.open(("epoch7", "model.safetensors"), 5)
    assert b"".join(opened.blocks) == (place / "old" / "model.safetensors").read_bytes()
    opened.close()
    assert swapped
    with pytest.raises(NoSuchFileError):
        origin.open(("epoch7", "model.safetensors"), 5)


def test_from_a_url(start, plan, place):
    with web(place.parent) as files:
        running = start(
            plan, "--weights-from", f"web={files.url}/place", "--weights-from", f"s={place}", "--max-upload-mb", "1"
        )
        client = RefitClient(running.url, TOKEN, timeout=60)
        assert client.places("affine") == ["s", "web"]
        good = digest(place / "two.safetensors")
        assert "without TLS" in str(refusal(client, "web", "two.safetensors"))
        assert files.asked == []
        staged = client.fetch("affine", "web", "two.safetensors", sha256=good)
        client.commit("affine", staged["id"])
        assert running.infer() == (2.0, 2)
        assert files.asked == ["/place/two.safetensors"]

        files.asked.clear()
        for name in ATTACKS:
            assert running.ask("POST", FETCH, {"from": "web", "name": name, "sha256": good})[0] == 400, name
        assert files.asked == [], "nobody was asked for any of these"
        with web(place.parent / "elsewhere") as elsewhere:
            files.elsewhere = f"{elsewhere.url}/secret.safetensors"
            refused = refusal(client, "web", "redirect", sha256=good)
            assert (refused.status, elsewhere.asked) == (502, [])
            assert "redirect" in str(refused)
        for name, status in (
            ("missing", 404),
            ("short", 502),
            ("huge", 413),
            ("endless", 413),
            ("packed", 502),
            ("broken", 502),
        ):
            refused = refusal(client, "web", name, sha256=good)
            assert refused.status == status, (name, str(refused))
            assert "too much" not in str(refused.body)
            assert files.url not in str(refused.body)
        assert refusal(client, "web", "two.safetensors", sha256="0" * 64).status == 422
    refused = refusal(client, "web", "two.safetensors", sha256=good)
    assert refused.status == 502
    assert client.status("affine")["staged"] == []
    assert not [entry for entry in running.log if entry["level"] == "error" and "traceback" in entry]


def test_from_a_url_over_tls(start, plan, place, tmp_path):
    certificate = (tmp_path / "cert.pem", tmp_path / "key.pem")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-out", certificate[0], "-keyout", certificate[1]),
        ],
        check=True,
        capture_output=True,
    )
    with web(place, certificate) as files:
        trusting = start(plan, "--weights-from", f"web={files.url}", env={"SSL_CERT_FILE": str(certificate[0])})
        client = RefitClient(trusting.url, TOKEN, timeout=60)
        assert client.fetch("affine", "web", "epoch7/model.safetensors")["state"] == "staged"
        doubting = start(plan, "--weights-from", f"web={files.url}")
        refused = refusal(RefitClient(doubting.url, TOKEN, timeout=60), "web", "two.safetensors")
        assert refused.status == 502
        assert "certificate" in str(refused)


def test_proxies_of_the_environment_are_not_used(place, monkeypatch):
    with web(place) as files:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        opened = UrlOrigin(files.url + "/").open(("two.safetensors",), 5)
        assert len(b"".join(opened.blocks)) == opened.nbytes == (place / "two.safetensors").stat().st_size
        opened.close()


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "=x",
        "s=",
        "bad alias=/tmp",
        "a/b=/tmp",
        "s=/no/such/directory",
        "s=ftp://host/",
        "s=https://",
        "s=https://user:secret@host/",
        "s=https://host/?key=1",
        "s=https://host/#x",
        "s=https://host:port/",
        "s=https://host/a b",
        "s=file:///etc",
    ],
)
def test_places_that_make_no_sense_are_refused_at_the_start(text):
    with pytest.raises(SettingsError):
        parse_origins((text,))


def test_places_are_parsed(tmp_path):
    found = parse_origins((f"a={tmp_path}", "b=https://host/x", "c=http://host:8000"))
    assert found == {
        "a": DirectoryOrigin(tmp_path),
        "b": UrlOrigin("https://host/x/"),
        "c": UrlOrigin("http://host:8000/"),
    }
    assert [origin.needs_digest for origin in found.values()] == [False, False, True]
    with pytest.raises(SettingsError, match="two places"):
        parse_origins((f"a={tmp_path}", f"a={tmp_path}"))


def test_nothing_is_left_of_a_fetch_that_failed(start, plan, place, tmp_path):
    spool = tmp_path / "spool"
    (place / "bad").write_bytes(np.zeros(100_000, np.uint8).tobytes())
    running = start(plan, "--weights-from", f"s={place}", "--spool", spool)
    client = RefitClient(running.url, TOKEN)
    assert refusal(client, "s", "bad").status == 422
    assert refusal(client, "s", "two.safetensors", sha256="0" * 64).status == 422
    assert running.stop() == 0
    assert [path.name for path in spool.iterdir()] == ["lock"]
