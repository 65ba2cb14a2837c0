"""Refits as verbs of a running server: staged, tried, committed, rolled back, followed."""

import io
import json
import os
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import save, save_file

pytest.importorskip("uvicorn")
from onnx_refit.serve.client import RefitClient, ServerError
from tests.serve.conftest import TOKEN
from tests.serve.models import affine, affine_weights

pytestmark = pytest.mark.serve
REFIT = "/v2/models/affine/refit"


@pytest.fixture
def fresh(start, plan):
    return start(plan, "--keep", "3")


@pytest.fixture
def client(fresh):
    return RefitClient(fresh.url, TOKEN)


def golden(scale):
    ones = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1.0] * 4}
    return [ones], [{"name": "y", "shape": [1, 4], "datatype": "FP32", "data": [2.0 * scale] * 4}]


def test_the_whole_way(fresh, client, weights):
    assert fresh.infer() == (1.0, 1)
    seen = []
    staged = client.stage("affine", weights(2), progress=lambda done, total: seen.append((done, total)))
    assert (staged["state"], staged["changed"], staged["report"]["ok"]) == ("staged", ["b", "w"], True)
    assert seen[-1][0] == seen[-1][1] == staged["bytes"] == weights(2).stat().st_size
    assert fresh.infer() == (1.0, 1), "staging must not be seen by requests"
    assert client.canary("affine", staged["id"], *golden(2))["ok"]
    committed = client.commit("affine", staged["id"], require_canary=True)
    assert (committed["version"], committed["previous"], committed["repeated"]) == (2, 1, False)
    assert fresh.infer() == (2.0, 2)
    assert fresh.infer(version=1) == (1.0, 1)
    assert fresh.infer(headers={"onnx-refit-version": "1"}) == (1.0, 1)
    assert client.rollback("affine") == {"version": 1, "previous": 2, "repeated": False}
    assert fresh.infer() == (1.0, 1)
    assert client.rollback("affine", 2)["version"] == 2
    assert client.rollback("affine", 2)["repeated"] is True
    assert fresh.infer() == (2.0, 2)
    status = client.status("affine")
    assert [(v["number"], v["current"], v["held"]) for v in status["versions"]] == [(1, False, True), (2, True, True)]
    assert status["versions"][1]["source"] == "scale2.safetensors"
    assert status["staged"] == []


def test_the_same_again_does_nothing_twice(fresh, client, weights):
    first = client.stage("affine", weights(2))
    again = client.stage("affine", weights(2))
    assert again["id"] == first["id"]
    assert len(client.status("affine")["staged"]) == 1
    committed = client.commit("affine", first["id"])
    repeated = client.commit("affine", first["id"])
    assert repeated["repeated"]
    assert repeated["version"] == committed["version"] == fresh.infer()[1] == 2
    assert client.stage("affine", weights(2))["state"] == "committed", "it answers already"
    client.rollback("affine")
    assert client.stage("affine", weights(2))["state"] == "staged", "it no longer answers, so it can be staged anew"
    assert client.discard("affine", first["id"])["state"] == "discarded"
    assert client.discard("affine", first["id"])["state"] == "discarded"
    with pytest.raises(ServerError, match="discarded") as refused:
        client.commit("affine", first["id"])
    assert refused.value.status == 409


def test_rejected_weights_come_with_the_report(fresh, client, tmp_path):
    bad = affine_weights(2.0)
    bad["w"] = bad["w"][:3]
    bad["bias"] = bad.pop("b")
    bad["w"][0, 0] = np.nan
    save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(ServerError) as refused:
        client.stage("affine", tmp_path / "bad.safetensors")
    assert refused.value.status == 422
    report = refused.value.body["report"]
    assert [(r["name"], r["reason"]) for r in report["rejected"]] == [("w", "shape")]
    assert [m["name"] for m in report["missing"]] == ["b"]
    assert report["missing"][0]["candidates"][0]["name"] == "bias"
    assert fresh.infer() == (1.0, 1)
    assert client.status("affine")["staged"] == []


def test_partial_refits_need_their_base(fresh, client, weights, tmp_path):
    save_file({"b": np.full(4, 5, np.float32)}, tmp_path / "bias.safetensors")
    with pytest.raises(ServerError):
        client.stage("affine", tmp_path / "bias.safetensors")
    partial = client.stage("affine", tmp_path / "bias.safetensors", partial=True)
    assert partial["changed"] == ["b"]
    client.commit("affine", client.stage("affine", weights(3))["id"])
    with pytest.raises(ServerError) as refused:
        client.commit("affine", partial["id"])
    assert refused.value.status == 409
    assert fresh.infer() == (3.0, 2)


def test_a_canary_that_fails_stops_a_commit_that_asks_for_one(fresh, client, weights):
    staged = client.stage("affine", weights(2))
    with pytest.raises(ServerError, match="no canary"):
        client.commit("affine", staged["id"], require_canary=True)
    with pytest.raises(ServerError, match="differs") as refused:
        client.canary("affine", staged["id"], *golden(3))
    assert refused.value.status == 422
    with pytest.raises(ServerError, match="no canary"):
        client.commit("affine", staged["id"], require_canary=True)
    assert client.staged("affine", staged["id"])["canaries"][0]["ok"] is False
    assert client.canary("affine", staged["id"], *golden(2.1), rtol=0.1)["ok"]
    assert client.commit("affine", staged["id"], require_canary=True)["version"] == 2


def test_versions_are_held_deleted_and_compared(fresh, client, weights):
    for scale in (2, 3, 4):
        client.commit("affine", client.stage("affine", weights(scale))["id"])
    held = [v["number"] for v in client.status("affine")["versions"] if v["held"]]
    assert held == [2, 3, 4]
    assert fresh.ask("POST", "/v2/models/affine/versions/1/infer", {"inputs": golden(1)[0]})[0] == 404
    moved = {entry["name"]: entry for entry in client.diff("affine", 2, 4)["weights"]}
    assert moved["b"]["largest_relative_change"] == 1.0
    assert moved["b"]["norm"] == 8.0
    client.delete("affine", 3)
    assert fresh.infer(version=2) == (2.0, 2)
    assert fresh.ask("POST", "/v2/models/affine/versions/3/infer", {"inputs": golden(1)[0]})[0] == 404
    with pytest.raises(ServerError) as refused:
        client.delete("affine", 4)
    assert refused.value.status == 409
    assert fresh.infer() == (4.0, 4)


def test_traffic_is_split_by_weight_and_by_key(fresh, client, weights):
    client.commit("affine", client.stage("affine", weights(2))["id"])
    client.split("affine", {1: 30, 2: 10})
    assert client.status("affine")["traffic"] == {"1": 0.75, "2": 0.25}
    answers = [fresh.infer() for _ in range(200)]
    assert set(answers) == {(1.0, 1), (2.0, 2)}
    assert 100 <= answers.count((1.0, 1)) <= 190
    by_key = {
        key: {fresh.infer(headers={"onnx-refit-split-key": key})[1] for _ in range(5)} for key in "abcdefghijklmnop"
    }
    assert all(len(versions) == 1 for versions in by_key.values()), "a key must stay with its version"
    assert {version for versions in by_key.values() for version in versions} == {1, 2}
    assert fresh.infer(version=2) == (2.0, 2), "a version that is asked for goes before the split"
    with pytest.raises(ServerError):
        client.split("affine", {1: 1, 9: 1})
    client.rollback("affine")
    assert client.status("affine")["traffic"] is None, "a rollback must take all traffic"
    assert {fresh.infer() for _ in range(20)} == {(1.0, 1)}


def test_every_format(fresh, client, tmp_path):
    import onnx

    onnx.save(affine(5.0), tmp_path / "model.onnx")
    np.savez(tmp_path / "weights.npz", allow_pickle=False, **affine_weights(6.0))
    for scale, name in ((5.0, "model.onnx"), (6.0, "weights.npz")):
        client.commit("affine", client.stage("affine", tmp_path / name)["id"])
        assert fresh.infer()[0] == scale


def test_formats_that_could_run_code_or_are_none(fresh, client, tmp_path):
    torch_like = io.BytesIO()
    import pickle

    pickle.dump({"w": [1.0]}, torch_like)
    for content in (torch_like.getvalue(), b"hello", struct.pack("<Q", 1 << 60) + b"{}", b"PK\x03\x04", b"\x08"):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ServerError) as refused:
            client.stage("affine", tmp_path / "x", label="mine")
        assert refused.value.status in (415, 422), content
        assert "spool" not in str(refused.value), "where the server keeps uploads is nobody's business"
    assert fresh.infer() == (1.0, 1)


def test_an_upload_must_be_what_was_announced(fresh):
    data = save(affine_weights(2.0))
    headers = {"x-content-sha256": "0" * 64}
    assert fresh.ask("POST", REFIT + "/stage", data, headers)[0] == 422
    assert fresh.ask("POST", REFIT + "/stage", data, {"x-content-sha256": "zz"})[0] == 400
    assert fresh.ask("POST", REFIT + "/stage", b"")[0] == 400
    assert fresh.ask("POST", REFIT + "/stage?partial=maybe", data)[0] == 400
    assert fresh.ask("POST", REFIT + "/stage?label=%00", data)[0] == 400


def test_only_so_many_may_be_staged(fresh, client, weights):
    for scale in (2, 3, 4, 5):
        client.stage("affine", weights(scale))
    with pytest.raises(ServerError, match="staged already") as refused:
        client.stage("affine", weights(6))
    assert refused.value.status == 409


def test_events_tell_the_story(fresh, client, weights):
    client.commit("affine", client.stage("affine", weights(2))["id"])
    got, story = [], threading.Event()

    def follow():
        for event in client.events("affine", after=0):
            got.append(event)
            if event.kind == "rolled_back":
                story.set()

    thread = threading.Thread(target=follow)
    thread.start()
    client.rollback("affine")
    assert story.wait(60)
    assert [event.kind for event in got] == ["upload", "staging", "staged", "committed", "rolled_back"]
    assert [event.number for event in got] == [1, 2, 3, 4, 5]
    assert got[0].data["bytes"] == got[0].data["total"] == weights(2).stat().st_size
    assert fresh.stop() == 0, "a follower must not keep a stopping server alive"
    thread.join(60)
    assert not thread.is_alive()


def test_no_answer_is_mixed_while_versions_change(start, plan, weights):
    """Many clients, a commit or a rollback all the time: every answer is one version's, and the one it names."""
    running = start(plan, "--keep", "4", "--batch", "8", "--instances", "2", "--no-access-log")
    client = RefitClient(running.url, TOKEN)
    scales, wrong, stop = {1: 1.0}, [], threading.Event()

    def ask():
        while not stop.is_set():
            rows = 3
            tensor = {"name": "x", "shape": [rows, 4], "datatype": "FP32", "data": [1.0] * 4 * rows}
            status, _, answer = running.ask("POST", "/v2/models/affine/infer", {"inputs": [tensor]}, token=None)
            if status != 200:
                wrong.append(answer)
                continue
            values = {value / 2 for value in answer["outputs"][0]["data"]}
            answers.append((values, int(answer["model_version"])))

    answers: list[tuple[set[float], int]] = []
    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        for step in range(12):
            scale = 2 + step % 5
            before = len(answers)
            committed = client.commit("affine", client.stage("affine", weights(scale))["id"])["version"]
            scales[committed] = float(scale)
            # However slow the clients are, they see each version.
            deadline = time.monotonic() + 60
            while all(version != committed for _, version in answers[before:]) and not wrong:
                assert time.monotonic() < deadline, "nobody was answered by it"
                time.sleep(0.002)
            if step % 4 == 3:
                client.rollback("affine")
    finally:
        stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert {version for _, version in answers} >= scales.keys() - {1}
    assert all(values == {scales[version]} for values, version in answers)


def run_cli(command, *arguments, code=0):
    script = "import sys; from onnx_refit.cli import serving; getattr(serving, sys.argv[1])(sys.argv[2:])"
    done = subprocess.run(
        [sys.executable, "-c", script, f"{command}_command", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "ONNX_REFIT_TOKEN": TOKEN},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_the_command_line(fresh, weights):
    url = ("--url", fresh.url)
    staged = json.loads(run_cli("push", weights(2), *url, "--json"))["staged"]["id"]
    assert staged in run_cli("status", *url)
    assert "version 2 is committed" in run_cli("commit", staged, *url)
    assert fresh.infer() == (2.0, 2)
    assert "already" in run_cli("push", weights(2), *url)
    assert "version 3 answers now" in run_cli("push", weights(3), *url, "--commit", "--label", "epoch three")
    assert "version 2 answers now" in run_cli("rollback", *url)
    status = run_cli("status", *url)
    assert "epoch three" in status
    assert "version 2 answers" in status
    run_cli("push", weights(3).parent / "none", *url, code=1)


def test_what_is_no_checkpoint_is_told_what_would_be(server):
    status, _, answer = server.ask("POST", "/v2/models/affine/refit/stage?label=notes", b"these are no weights at all")
    assert status == 422
    assert answer["error"] == "notes: it is no checkpoint of a known kind. Send safetensors, npz or ONNX"


def test_any_file_name_can_be_pushed(server, weights, tmp_path):
    path = tmp_path / "epoch 7 (best) \u00e9\u2192.safetensors"
    path.write_bytes(weights(2).read_bytes())
    client = RefitClient(server.url, TOKEN)
    staged = client.stage("affine", path)
    assert staged["label"].startswith("epoch 7 _best_ ")
    client.discard("affine", staged["id"])
