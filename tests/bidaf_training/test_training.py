"""Training on a CPU: it learns, it resumes bit for bit, teachers teach, and what goes wrong is said clearly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import load_file  # noqa: E402

from onnx_refit.files import WriteError  # noqa: E402
from onnx_refit.samples.bidaf import checkpoints  # noqa: E402
from onnx_refit.samples.bidaf.text import tokenize  # noqa: E402
from onnx_refit.samples.bidaf.training import files, loop  # noqa: E402
from onnx_refit.samples.bidaf.training.batches import DeviceSplit, epoch_order, length_order  # noqa: E402
from onnx_refit.samples.bidaf.training.curve import draw_curve  # noqa: E402
from onnx_refit.samples.bidaf.training.errors import (  # noqa: E402
    DataError,
    DeviceError,
    StateError,
    TrainingError,
)
from onnx_refit.samples.bidaf.training.evaluation import MAX_ANSWER, best_spans, predict_spans  # noqa: E402
from onnx_refit.samples.bidaf.training.labels import average_labels, label, save_labels, soft_loss  # noqa: E402
from onnx_refit.samples.bidaf.training.loop import Trainer, choose_device  # noqa: E402
from onnx_refit.samples.bidaf.training.model import Bidaf  # noqa: E402
from onnx_refit.samples.bidaf.training.preprocess import PreprocessSettings, preprocess  # noqa: E402
from onnx_refit.samples.bidaf.training.settings import Settings  # noqa: E402
from onnx_refit.samples.bidaf.training.squad import Glove, Row  # noqa: E402
from onnx_refit.samples.bidaf.training.weights import mean_weights  # noqa: E402

from .support import Witness, sample_corpus, sample_glove, sample_rows, seen_corpus, whole_corpus  # noqa: E402

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")
QUICK = Settings(epochs=2, batch=32, warmup=2, limit=64, dev_limit=8, evaluate_every=1, state_every=1000)
SCRIPT = Path(__file__).parents[2] / "samples" / "bidaf" / "train.py"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trainer(folder, settings=QUICK, corpus=None, observer=None):
    folder.mkdir(exist_ok=True)
    return Trainer(corpus or sample_corpus(), settings, CPU, folder, observer or Witness())


def test_the_smoke_run_on_200_examples_writes_everything(tmp_path):
    settings = Settings(epochs=1, batch=20, warmup=2, dev_limit=16)
    run = trainer(tmp_path, settings, whole_corpus())
    assert len(run.train_split) == 199  # the place of one answer is only guessed
    score = run.run()
    assert score.questions == 16
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"snapshot-{number}.safetensors" for number in range(1, 7)),
        "weights.safetensors",
        "state.safetensors",
        "log.json",
    }
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["final"]["step"] == 10
    assert log["sessions"][0]["device"] == "CPU"
    assert log["settings"]["batch"] == 20
    assert load_file(tmp_path / "weights.safetensors")["word_emb"].dtype == np.float16
    snapshot = load_file(tmp_path / "snapshot-1.safetensors")
    assert len(snapshot["word_emb"]) == whole_corpus().tuned
    draw_curve([log, log], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_it_learns_what_it_sees(tmp_path):
    settings = Settings(
        epochs=90, batch=12, warmup=10, average=0.95, evaluate_every=1000, dropout=0.1, learning_rate=3e-3
    )
    score = trainer(tmp_path, settings, seen_corpus()).run()
    assert score.exact_match >= 80


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    settings = Settings(epochs=2, batch=16, warmup=2, limit=48, dev_limit=4, evaluate_every=1000)
    whole = trainer(tmp_path / "whole", settings)
    whole.run()
    for stop in (2, 4):
        folder = tmp_path / f"cut-{stop}"
        trainer(folder, settings).run(stop_after=stop)
        assert json.loads((folder / "log.json").read_text())["final"]["step"] == stop
        torch.manual_seed(99)
        resumed = trainer(folder, settings)
        resumed.resume()
        assert resumed.progress.step == stop
        resumed.run()
        for name, value in load_file(tmp_path / "whole" / "weights.safetensors").items():
            np.testing.assert_array_equal(load_file(folder / "weights.safetensors")[name], value, err_msg=name)
        assert len(json.loads((folder / "log.json").read_text())["sessions"]) == 2


def test_an_interruption_leaves_a_checkpoint(tmp_path, monkeypatch):
    run = trainer(tmp_path, Settings(epochs=2, batch=16, limit=48, dev_limit=4, evaluate_every=1000))
    step = run._step

    def interrupted(batch, share):
        if run.progress.step == 2:
            raise KeyboardInterrupt
        return step(batch, share)

    monkeypatch.setattr(run, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    again = trainer(tmp_path, run.settings)
    again.resume()
    assert again.progress.step == 2


def test_students_learn_from_the_mean_of_teachers(tmp_path):
    corpus = sample_corpus()
    paths = []
    for seed in (1, 2):
        teacher = trainer(tmp_path / f"teacher-{seed}", Settings(epochs=0, seed=seed, limit=24, dev_limit=2))
        teacher.run()
        with teacher.averaged() as model:
            labels = label(model, teacher.train_split)
        paths.append(tmp_path / f"{seed}.safetensors")
        save_labels(paths[-1], labels)
    split = DeviceSplit(corpus.train, CPU, 24)
    mean = average_labels(paths, split)
    assert mean.shape == (split.label_rows, 2)
    first = mean[: int(split.context_length[0])].float()
    np.testing.assert_allclose(first.sum(0), 1.0, atol=5e-3)
    settings = Settings(
        epochs=8, batch=8, warmup=1, limit=24, dev_limit=2, soft_weight=1.0, evaluate_every=1000, dropout=0
    )
    student = trainer(tmp_path / "student", settings)
    student.start_from(mean_weights([tmp_path / "teacher-1" / "weights.safetensors"]))
    student.learn_from(mean)

    def distance():
        student.model.eval()
        batch = split.batch(np.arange(24))
        with torch.no_grad():
            start, _ = student.model(batch)
        place = batch.padded_place[: batch.context_tokens]
        student.model.train()
        return float(soft_loss(start, mean.index_select(0, batch.label_place)[:, 0].float(), place))

    before = distance()
    student.run()
    assert distance() < before


def test_labels_of_another_corpus_are_refused(tmp_path):
    split = DeviceSplit(sample_corpus().train, CPU, 8)
    save_labels(tmp_path / "labels.safetensors", torch.zeros(5, 2).half())
    with pytest.raises(DataError, match="5 words"):
        average_labels([tmp_path / "labels.safetensors"], split)
    with pytest.raises(DataError, match="cannot be read"):
        average_labels([tmp_path / "nowhere.safetensors"], split)


def test_the_mean_of_weights(tmp_path):
    for number in (1, 3):
        files.write_tensors(tmp_path / f"{number}", {"a": np.full(3, number, np.float16)}, {})
    files.write_tensors(tmp_path / "other", {"b": np.zeros(3, np.float16)}, {})
    np.testing.assert_array_equal(mean_weights([tmp_path / "1", tmp_path / "3"])["a"], np.full(3, 2, np.float32))
    with pytest.raises(StateError, match="other weights"):
        mean_weights([tmp_path / "1", tmp_path / "other"])
    (tmp_path / "1").write_bytes(b"noise")
    with pytest.raises(StateError, match="cannot be read"):
        mean_weights([tmp_path / "1"])


@pytest.mark.parametrize("how", ["missing", "cut", "noise", "other file", "other settings"])
def test_a_checkpoint_that_cannot_be_resumed_is_named(tmp_path, how):
    settings = Settings(epochs=1, batch=16, limit=16, dev_limit=2, evaluate_every=1000)
    state = tmp_path / "state.safetensors"
    if how != "missing":
        trainer(tmp_path, settings).run()
    content = state.read_bytes() if state.exists() else b""
    if how == "cut":
        state.write_bytes(content[: len(content) // 2])
    elif how == "noise":
        state.write_bytes(b"noise" * 100)
    elif how == "other file":
        state.write_bytes((tmp_path / "weights.safetensors").read_bytes())
    elif how == "other settings":
        settings = Settings(epochs=1, batch=8, limit=16, dev_limit=2, evaluate_every=1000)
    again = trainer(tmp_path, settings)
    before = [parameter.detach().clone() for parameter in again.model.parameters()]
    with pytest.raises(StateError, match=r"state\.safetensors") as caught:
        again.resume()
    if how == "other settings":
        assert "batch: 16 then, 8 now" in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, again.model.parameters(), strict=True))


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    settings = Settings(epochs=0, dev_limit=2)
    trainer(tmp_path, settings).run()
    rows = sample_rows()
    other = preprocess(rows[:60], rows[60:70], sample_glove(), PreprocessSettings(min_char=20, glove_rank=0))
    with pytest.raises(StateError, match="does not fit"):
        trainer(tmp_path, settings, other).resume()


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    settings = Settings(epochs=1, batch=16, limit=16, dev_limit=2, evaluate_every=1000)
    trainer(tmp_path, settings).run()
    before = (tmp_path / "state.safetensors").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(WriteError, match="the disk is full"):
        trainer(tmp_path, settings).run()
    assert (tmp_path / "state.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_LOG_STEPS", 1)
    run = trainer(tmp_path, QUICK)
    with torch.no_grad():
        run.model.start.bias.fill_(torch.nan)
    with pytest.raises(TrainingError, match="nan"):
        run.run()


def test_devices_that_are_not_there_are_named():
    with pytest.raises(DeviceError, match="quantum"):
        choose_device("quantum")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="NVIDIA GPU"):
            choose_device("cuda")
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize("wrong", [{"dropout": 1.0}, {"soft_weight": 1.5}, {"batch": 0}, {"evaluate_every": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(TrainingError):
        Settings(**wrong)


def test_an_epoch_holds_every_example_once_and_is_repeatable():
    lengths = np.random.default_rng(0).integers(5, 400, 1000)
    order = epoch_order(lengths, 32, seed=1, epoch=3)
    assert sorted(np.concatenate(order)) == list(range(1000))
    for ours, again in zip(order, epoch_order(lengths, 32, 1, 3), strict=True):
        np.testing.assert_array_equal(ours, again)
    assert any(not np.array_equal(a, b) for a, b in zip(order, epoch_order(lengths, 32, 1, 4), strict=True))
    assert sorted(np.concatenate(list(length_order(lengths, 64)))) == list(range(1000))


def test_a_batch_gives_each_example_the_logits_it_has_alone():
    corpus = sample_corpus()
    torch.manual_seed(0)
    model = Bidaf(corpus).eval()
    split = DeviceSplit(corpus.train, CPU)
    batch = split.batch(np.array([3, 50, 120, 7]))
    with torch.no_grad():
        together = model(batch)
        for row, example in enumerate(batch.examples):
            alone = model(split.batch(np.array([example])))
            length = int(split.context_length[example])
            for ours, expected in zip(together, alone, strict=True):
                np.testing.assert_allclose(ours[row, :length], expected[0], atol=1e-5)
                assert (ours[row, length:] < -1e29).all()


def test_the_best_span_is_the_best_of_all_pairs():
    random = np.random.default_rng(5)
    start, end = random.standard_normal((2, 6, 40)).astype(np.float32)
    first, last = best_spans(torch.from_numpy(start), torch.from_numpy(end))
    for row in range(6):
        pairs = [(s, e) for s in range(40) for e in range(s, min(40, s + MAX_ANSWER))]
        assert (first[row], last[row]) == max(pairs, key=lambda pair: start[row, pair[0]] + end[row, pair[1]])


def test_the_shipped_weights_answer_the_samples_question():
    words, chars = checkpoints.load_vocabulary()
    weights = checkpoints.load_checkpoint()
    glove = Glove(words[2:], weights["word_emb"][2:])
    row = Row("fox", "A quick brown fox jumps over the lazy dog.", "What color is the fox?", 8, 13, ("brown",), True)
    corpus = preprocess([row], [row], glove, PreprocessSettings(min_tuned=1, min_char=1, glove_rank=0))
    # the corpus numbers its own few words: take their rows of the shipped tables
    word_rows = [0, 1, *(words.index(word) for word in corpus.words[2:])]
    char_rows = [0, 1, *(chars.index(char) for char in corpus.chars[2:])]
    model = Bidaf(corpus)
    model.load(weights | {"word_emb": weights["word_emb"][word_rows], "char_emb": weights["char_emb"][char_rows]})
    spans = predict_spans(model, DeviceSplit(corpus.dev, CPU))
    assert [token.text for token in tokenize(row.context)][spans[0, 0] : spans[0, 1] + 1] == ["brown"]


def script(*options):
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2] / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", *map(str, options)],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def test_the_script_trains_resumes_and_says_what_is_wrong(tmp_path):
    missing = script("--corpus", tmp_path / "corpus.npz", "--out", tmp_path / "run")
    assert missing.returncode == 1
    assert "preprocess.py" in missing.stderr
    assert "Traceback" not in missing.stderr
    corpus = tmp_path / "corpus.npz"
    sample_corpus().save(corpus)
    options = (
        "--corpus",
        corpus,
        "--out",
        tmp_path / "run",
        "--limit",
        16,
        "--dev-limit",
        2,
        "--epochs",
        1,
        "--batch",
        8,
    )
    labels = tmp_path / "labels.safetensors"
    trained = script(*options, "--write-labels", labels)
    assert trained.returncode == 0, trained.stderr
    assert "final: exact match" in trained.stderr
    assert labels.is_file()
    assert (tmp_path / "run" / "curve.png").is_file()
    resumed = script(*options, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step 2" in resumed.stderr
    (tmp_path / "run" / "state.safetensors").write_bytes(b"noise" * 50)
    damaged = script(*options, "--resume")
    assert damaged.returncode == 1
    assert "damaged" in damaged.stderr
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    assert "part of the path is a file" in script(*options, "--out", in_the_way / "run").stderr
