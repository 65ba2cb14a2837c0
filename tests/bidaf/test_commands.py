"""The commands, as a user runs them: words, exit codes, files."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_refit
from onnx_refit.cli.main import main
from onnx_refit.samples.bidaf import bundle, live
from onnx_refit.samples.bidaf.live import LiveRow, plot_rows, refit_series
from tests.support.models import mlp

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory; TRT_DATA_DIR is not set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRT_DATA_DIR", raising=False)
    return tmp_path


@pytest.fixture
def links(here, sample):
    """The sample's files in the working directory."""
    for path in sample.directory.iterdir():
        (here / path.name).symlink_to(path)
    return here


def test_prepare_and_build_with_the_users_own_directory(here, sample, capsys, monkeypatch):
    monkeypatch.setenv("TRT_DATA_DIR", str(sample.directory))
    assert main(["bidaf", "prepare"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == list(sample.prepare_lines)
    assert err.startswith("warning: ")
    assert "is not the published bidaf-9.onnx" in err
    assert main(["bidaf", "build"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Loading ONNX file from path bidaf-modified.onnx..."
    assert lines[-6:] == [
        "Completed creating Engine",
        *["Refitting engine...", "Doing inference..."] * 2,
        "Passed",
    ]
    assert main(["bidaf", "build"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Reading engine from file bidaf.plan",
        *["Refitting engine...", "Doing inference..."] * 2,
        "Passed",
    ]


@pytest.mark.parametrize(
    "command", [["ask", "--question", "who?", "--context", "A fox."], ["live", "--no-plot"], ["evaluate"]]
)
def test_a_plan_of_another_model(here, capsys, command):
    onnx_refit.build(mlp()).save(here / "mlp.plan")
    assert main(["bidaf", *command, "--plan", "mlp.plan"]) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert "mlp.plan: the plan is of another model: it takes x and gives y" in err


def test_prepare_without_a_model_says_how(here, capsys):
    assert main(["bidaf", "prepare"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--bundled" in err
    assert "Traceback" not in err
    assert list(here.iterdir()) == []


def test_build_without_a_model_says_how(here, capsys):
    assert main(["bidaf", "build"]) == 1
    assert "onnx-refit bidaf prepare" in capsys.readouterr().err


def test_build_with_the_wrong_weights_fails(here, sample, capsys):
    """The weights in the model are changed: the right ones do not answer rightly any more."""
    for path in sample.directory.glob("*.json"):
        (here / path.name).write_bytes(path.read_bytes())
    model = onnx.load(sample.modified)
    for tensor in model.graph.initializer:
        if tensor.name in ("start_W", "end_W"):
            zeros = onnx.numpy_helper.from_array(np.zeros((1000, 1), np.float32), tensor.name)
            tensor.CopyFrom(zeros)
    onnx.save(model, here / "bidaf-modified.onnx")
    assert main(["bidaf", "build"]) == 1
    out, err = capsys.readouterr()
    assert "Passed" not in out
    assert "expected: not 'brown' with the fake weights" in err


def test_ask(links, capsys):
    words = ["--context", "Ann lives in Oslo. Bob lives in Rome.", "--question", "Where does Bob live?"]
    assert main(["bidaf", "ask", *words]) == 0
    out = capsys.readouterr().out
    assert "A: Rome   (probability 0." in out
    assert main(["bidaf", "ask", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == "Rome"
    assert words[1][found["start"] : found["end"]] == "Rome"


def test_ask_with_a_file_and_the_bundled_model(here, capsys):
    (here / "context.txt").write_text("Ann lives in Oslo. Bob lives in Rome.\n")
    assert main(["bidaf", "ask", "--context-file", "context.txt", "--question", "Where does Ann live?"]) == 0
    assert "A: Oslo" in capsys.readouterr().out


def test_ask_nonsense(links, capsys):
    assert main(["bidaf", "ask", "--context", " ", "--question", "What?"]) == 1
    assert "the context holds no words" in capsys.readouterr().err
    assert main(["bidaf", "ask", "--question", "What?"]) == 2
    assert main(["bidaf", "ask", "--context", "a", "--context-file", "b", "--question", "What?"]) == 2
    (links / "latin1.txt").write_bytes(b"caf\xe9")
    assert main(["bidaf", "ask", "--context-file", "latin1.txt", "--question", "What?"]) == 1
    assert "not UTF-8" in capsys.readouterr().err
    assert main(["bidaf", "ask", "--context", "a b", "--question", "What?", "--plan", "none.plan"]) == 1
    assert "none.plan" in capsys.readouterr().err


def test_evaluate(links, capsys):
    arguments = ["bidaf", "evaluate", "--split", "dev", "--limit", "20", "--threads", "2", "--json"]
    assert main([*arguments, "--predictions", "answers.json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["questions"] == 20
    assert found["exact_match"] > 40
    assert len(json.loads((links / "answers.json").read_text())) == 20
    assert main(["bidaf", "evaluate", "--data", "none.json"]) == 1
    assert "there is no data set here" in capsys.readouterr().err
    assert main(["bidaf", "evaluate", "--limit", "0"]) == 2


def test_export(here, capsys):
    assert main(["bidaf", "export", "-o", "own.onnx", "--checkpoint", bundle.checkpoint_names()[0]]) == 0
    assert "own.onnx" in capsys.readouterr().out
    assert len(onnx.load(here / "own.onnx").graph.output) == 4
    assert main(["bidaf", "export", "-o", "two.onnx", "--published-outputs", "--json"]) == 0
    assert len(onnx.load(here / "two.onnx").graph.output) == 2
    assert main(["bidaf", "export", "--checkpoint", "none"]) == 1
    assert "there is no checkpoint none" in capsys.readouterr().err


def test_download_needs_a_directory(here, capsys):
    assert main(["bidaf", "download"]) == 2
    assert main(["bidaf", "download", "-d", str(here), "--url", "http://127.0.0.1:9/x"]) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_the_demo(here, capsys):
    assert main(["bidaf", "demo", "--bundled", "--limit", "6"]) == 0
    out = capsys.readouterr().out
    for part in ("Modified ONNX model saved as", "Completed creating Engine", "Reading engine from file", "Passed"):
        assert part in out
    for name in bundle.checkpoint_names():
        assert name in out
    names = {path.name for path in (here / "out").iterdir()}
    assert {"bidaf-original.onnx", "bidaf-modified.onnx", "bidaf.plan", "CategoryMapper_4.json"} <= names


def test_a_series_of_checkpoints_into_one_engine(engine, questions):
    names = bundle.checkpoint_names()
    series = [(name, lambda name=name: bundle.checkpoint_weights(name)) for name in (names[0], names[-1])]
    seen: list[LiveRow] = []
    rows = refit_series(engine, series, questions, threads=2, report=seen.append)
    assert rows == seen
    assert [row.checkpoint for row in rows] == [names[0], names[-1]]
    assert rows[0].f1 < rows[1].f1 - 20, "the score rises"
    assert rows[1].answer == "brown"
    assert rows[1].version > rows[0].version


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [LiveRow(f"step-{n}", n, 1.0, 10.0 * n, 12.0 * n, 50, "brown") for n in range(1, 6)]
    png, svg = plot_rows(rows, tmp_path / "live")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    assert "<svg" in text
    assert "matplotlib.pyplot" not in sys.modules


def test_no_matplotlib(tmp_path, monkeypatch):
    from onnx_refit.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"onnx-refit\[plot\]"):
        live.plot_rows([], tmp_path / "live")


@pytest.mark.parametrize("script", ["prepare_model", "build_and_refit_engine", "export"])
def test_the_scripts_are_the_commands(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "samples" / "bidaf" / f"{script}.py"), run_name="__main__")
    assert stop.value.code == 0
    assert "Usage: onnx-refit bidaf" in capsys.readouterr().out
