import hashlib

import pytest

from onnx_refit.errors import InputError
from onnx_refit.samples.bidaf import original
from onnx_refit.samples.bidaf.original import VARIABLE, find_original


def test_nothing_given_says_how_to_give_it():
    with pytest.raises(InputError) as caught:
        find_original(None, {})
    for part in ("no data directory", "-d DIR", VARIABLE, "bidaf download", "--bundled"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["bidaf-9.onnx", "bidaf-original.onnx", "samples/bidaf/bidaf-original.onnx"])
def test_the_directory_and_the_variable(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    assert find_original(tmp_path, {}).path == path
    assert find_original(None, {VARIABLE: str(tmp_path)}).path == path
    assert find_original(tmp_path, {VARIABLE: "/somewhere/else"}).path == path


def test_the_published_name_comes_first(tmp_path):
    for name in ("bidaf-9.onnx", "bidaf-original.onnx"):
        (tmp_path / name).write_bytes(b"x")
    assert find_original(tmp_path, {}).path.name == "bidaf-9.onnx"


def test_another_checksum_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "bidaf-9.onnx").write_bytes(b"x")
    found = find_original(tmp_path, {})
    assert not found.published
    warning = found.warning()
    assert warning is not None
    assert found.sha256 in warning
    monkeypatch.setattr(original, "PUBLISHED_SHA256", hashlib.sha256(b"x").hexdigest())
    assert find_original(tmp_path, {}).warning() is None


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="holds neither"):
        find_original(tmp_path, {})
    with pytest.raises(InputError, match="is not there"):
        find_original(tmp_path / "none", {})
    with pytest.raises(InputError, match="no data directory"):
        find_original(None, {VARIABLE: ""})
