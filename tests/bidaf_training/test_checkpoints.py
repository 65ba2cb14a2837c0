"""The weights that ship: whole, of one shape, rising in score, and clear errors where a file is missing or damaged."""

import json
import shutil

import numpy as np
import pytest

from onnx_refit.errors import WeightsError, WeightsFormatError
from onnx_refit.samples.bidaf import checkpoints
from onnx_refit.samples.bidaf.training.pack import encode, write_checkpoint, write_trained

MEGABYTE = 1e6


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The bundled files, writable, read instead of the bundled ones."""
    folder = tmp_path / "data"
    shutil.copytree(checkpoints.DATA, folder)
    monkeypatch.setattr(checkpoints, "DATA", folder)
    checkpoints._index.cache_clear()
    yield folder
    checkpoints._index.cache_clear()


def test_there_are_at_least_five_earlier_checkpoints_with_rising_scores():
    names = checkpoints.checkpoint_names()
    assert names[-1] == checkpoints.FINAL
    assert len(names) >= 6
    matches = [checkpoints.scores(name)[0] for name in names]
    assert matches == sorted(matches)
    assert checkpoints.scores() >= (68.1, 76.5)


def test_the_files_are_as_small_as_promised():
    files = {path.name: path.stat().st_size for path in checkpoints.DATA.iterdir()}
    assert files["weights.safetensors"] <= 18 * MEGABYTE
    assert max(files.values()) <= 16 * MEGABYTE
    assert sum(files.values()) <= 34 * MEGABYTE


def test_every_checkpoint_gives_the_whole_network():
    final = checkpoints.load_checkpoint()
    words, chars = checkpoints.load_vocabulary()
    assert final["word_emb"].shape == (len(words), 50)
    assert final["char_emb"].shape[0] == len(chars)
    assert words[0] == chars[0] == ""
    assert len(set(words)) == len(words)
    assert len(set(chars)) == len(chars)
    assert not final["word_emb"][0].any()
    for name in checkpoints.checkpoint_names()[:-1]:
        weights = checkpoints.load_checkpoint(name)
        assert {key: value.shape for key, value in weights.items()} == {key: v.shape for key, v in final.items()}
        assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in weights.values())
        assert not np.array_equal(weights["mod1.weight_ih_l0"], final["mod1.weight_ih_l0"])
        np.testing.assert_array_equal(weights["word_emb"][-1], final["word_emb"][-1])


def test_loading_does_not_share_arrays():
    first = checkpoints.load_checkpoint("step-00679")
    first["att"][:] = 0
    assert checkpoints.load_checkpoint("step-00679")["att"].any()


def test_encoding_loses_little(tmp_path):
    random = np.random.default_rng(3)
    base = {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in {"word_emb": (9, 5), "hw.0.bias": (7,), "conv.weight": (4, 3, 2)}.items()
    }
    weights = {name: value + 0.1 * random.standard_normal(value.shape) for name, value in base.items()}
    weights["word_emb"] = weights["word_emb"][:6]
    weights["conv.weight"][2] = base["conv.weight"][2]
    decoded = checkpoints.decode(encode(weights, base), base)
    np.testing.assert_allclose(decoded["conv.weight"], weights["conv.weight"], atol=0.01)
    np.testing.assert_allclose(decoded["word_emb"][:6], weights["word_emb"], atol=0.03)
    np.testing.assert_array_equal(decoded["word_emb"][6:], base["word_emb"][6:])
    np.testing.assert_array_equal(decoded["conv.weight"][2], base["conv.weight"][2])
    write_checkpoint(tmp_path / "a.safetensors.xz", weights, base)
    write_trained(tmp_path / "b.safetensors", base, {"model": "test"})
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors.xz", "b.safetensors"}


def test_a_checkpoint_of_another_network_is_refused():
    base = {"a": np.zeros((2, 2), np.float32)}
    for other in ({"b": base["a"]}, {"a": np.zeros((2, 3), np.float32)}, {"a": np.zeros((3, 2), np.float32)}):
        with pytest.raises(Exception, match=r"network|shape"):
            encode(other, base)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(WeightsError, match="step-00679"):
        checkpoints.load_checkpoint("step-1")


@pytest.mark.parametrize("name", ["weights.safetensors", "step-04659.safetensors.xz", "words.txt.xz", "chars.json"])
@pytest.mark.parametrize("how", ["cut", "noise", "gone"])
def test_a_file_that_is_not_whole_is_named(copy, name, how):
    path = copy / name
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut" else b"noise" * 100)
    vocabulary = name in ("words.txt.xz", "chars.json")
    with pytest.raises(WeightsError if how == "gone" else WeightsFormatError, match=name):
        checkpoints.load_vocabulary() if vocabulary else checkpoints.load_checkpoint("step-04659")


@pytest.mark.parametrize("content", ["", "{", "[1]", '[{"name": "final"}]', "null"])
def test_a_damaged_index_is_named(copy, content):
    (copy / "checkpoints.json").write_text(content)
    with pytest.raises(WeightsFormatError, match=r"checkpoints\.json"):
        checkpoints.checkpoint_names()


def test_a_checkpoint_that_does_not_fit_is_refused(copy):
    index = json.loads((copy / "checkpoints.json").read_text())
    base = {"a": np.zeros((2, 2), np.float32)}
    write_checkpoint(copy / index[0]["file"], base, base)
    with pytest.raises(WeightsFormatError, match="damaged"):
        checkpoints.load_checkpoint(index[0]["name"])
