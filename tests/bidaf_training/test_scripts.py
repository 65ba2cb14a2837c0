"""The scripts in a row, as a reader would run them: corpus, recipe of teachers and students, packed files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

from onnx_refit.samples.bidaf import checkpoints  # noqa: E402

from .support import SAMPLE, sample_glove  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.slow]

SCRIPTS = Path(__file__).parents[2] / "samples" / "bidaf"


def script(name, *options):
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parents[1] / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, str(SCRIPTS / name), *map(str, options)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=600)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glove")
    glove = sample_glove()
    parquet.write_table(pyarrow.table({"index": glove.words}), folder / "glove_6B_index.parquet")
    np.save(folder / "glove_6B_50d_emb.npy", glove.vectors)
    path = folder / "corpus.npz"
    options = ("--train", SAMPLE, "--dev", SAMPLE, "--out", path, "--glove-rank", 20)
    assert script("preprocess.py", *options, "--glove", folder / "nowhere").returncode == 1
    done = script("preprocess.py", *options, "--glove", folder)
    assert done.returncode == 0, done.stderr
    return path


def test_the_recipe_makes_a_network_that_can_be_packed(corpus, tmp_path, monkeypatch):
    options = ["--corpus", corpus, "--out", tmp_path / "recipe", "--teachers", 2, "--students", 2]
    options += ["--teacher-epochs", 1, "--student-epochs", 1, "--per-gpu", 1]
    extra = ["--", "--device", "cpu", "--limit", 16, "--dev-limit", 2, "--batch", 8]
    done = script("recipe.py", *options, *extra)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on GPU 0") == 5
    again = script("recipe.py", *options, *extra)
    assert again.stdout.count("on GPU 0") == 0
    weights = tmp_path / "recipe" / "mean" / "weights.safetensors"
    snapshot = tmp_path / "recipe" / "teacher-1" / "snapshot-1.safetensors"
    packing = ("--corpus", corpus, "--device", "cpu", "--dev-limit", 2, "--out", tmp_path / "data")
    packed = script("pack.py", *packing, "--weights", weights, "--earlier", f"step-1={snapshot}")
    assert packed.returncode == 0, packed.stderr
    assert [entry["name"] for entry in json.loads((tmp_path / "data" / "checkpoints.json").read_text())] == [
        "step-1",
        "final",
    ]
    monkeypatch.setattr(checkpoints, "DATA", tmp_path / "data")
    checkpoints._index.cache_clear()
    try:
        words, _ = checkpoints.load_vocabulary()
        assert checkpoints.load_checkpoint("step-1")["word_emb"].shape == (len(words), 50)
    finally:
        checkpoints._index.cache_clear()


def test_a_run_that_fails_stops_the_recipe(corpus, tmp_path):
    done = script("recipe.py", "--corpus", corpus, "--out", tmp_path / "recipe", "--", "--device", "quantum")
    assert done.returncode == 1
    assert "output.txt" in done.stderr
    assert "quantum" in (tmp_path / "recipe" / "teacher-1" / "output.txt").read_text()
