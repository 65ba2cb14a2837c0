"""What a source may be: mappings, files by content, URLs; and what is refused, with the known kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from onnx_refit import build
from onnx_refit.errors import OnnxRefitError, WeightsError, WeightsFormatError
from onnx_refit.weights.open import open_weights
from tests.support.models import mlp
from tests.weights.source_support import ARRAYS, ONNX_ARRAYS, external_model, onnx_model, same, write_shards


class Dlpack:
    """A tensor of another library."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: object) -> object:
        return self._array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def test_a_mapping_shares_memory() -> None:
    array = np.ones(3, np.float32)
    source = open_weights({"a": array, "b": Dlpack(array), "c": np.float32(2)})
    assert np.shares_memory(source.read("a"), array)
    assert np.shares_memory(source.read("b"), array)
    assert source.read("c").shape == ()
    assert open_weights(source) is source


@pytest.mark.parametrize(
    "value", [[1.0], "text", None, np.array(["a"]), np.array([object()]), np.zeros(1, "datetime64[s]")]
)
def test_what_is_no_tensor_is_refused(value: object) -> None:
    with pytest.raises(WeightsError, match=r"mapping\['a'\]"):
        open_weights({"a": value})


def test_names_must_be_text() -> None:
    with pytest.raises(WeightsError, match="no text"):
        open_weights({1: np.zeros(1)})  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz", "a.onnx", "a", "a.safetensors.index.json"])
def test_what_is_not_there_is_said_to_be_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        open_weights(tmp_path / name)


def test_unknown_files_are_refused_with_the_known_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello there, this is text")
    with pytest.raises(WeightsFormatError, match="safetensors"):
        open_weights(tmp_path / "a.txt")
    with pytest.raises(WeightsError, match="int"):
        open_weights(3)  # type: ignore[arg-type]
    with pytest.raises(OnnxRefitError, match="no regular file"):
        open_weights("/dev/null")


def test_a_plan_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    build(mlp()).save(tmp_path / "m.plan")
    with pytest.raises(WeightsFormatError, match=r"a plan, not a checkpoint.*require_weights"):
        open_weights(tmp_path / "m.plan")


def test_files_are_recognised_without_their_suffix(tmp_path: Path) -> None:
    save_file({"w": ARRAYS["w"]}, tmp_path / "one")
    np.savez(tmp_path / "two.npz", w=ARRAYS["w"])
    (tmp_path / "two.npz").rename(tmp_path / "two")
    onnx.save(onnx_model(), tmp_path / "three")
    for name in ("one", "two", "three"):
        assert open_weights(tmp_path / name).read("w").tobytes() == ARRAYS["w"].tobytes()


def test_urls_are_fetched_with_what_they_need_and_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    memory = fsspec.filesystem("memory")
    local = tmp_path / "local"
    local.mkdir()
    write_shards(local)
    external_model(local)
    for file in local.iterdir():
        memory.pipe(f"/bucket/model/{file.name}", file.read_bytes())
    seen: list[tuple[int, str]] = []
    for url, expected in (
        ("memory://bucket/model/model.safetensors.index.json", {"a": ARRAYS["w"], "b": ARRAYS["half"]}),
        ("memory://bucket/model", {"a": ARRAYS["w"], "b": ARRAYS["half"]}),
        ("memory://bucket/model/m.onnx", ONNX_ARRAYS),
    ):
        source = open_weights(url, progress=lambda done, name: seen.append((done, name)))
        same(source, expected)
        array = source.read(next(iter(expected)))
        source.close()
        assert array.size  # still readable
        assert [p.name for p in tmp_path.iterdir()] == ["local"]
    assert seen
    with pytest.raises(WeightsError, match="cannot be fetched"):
        open_weights("memory://bucket/absent.safetensors")
    with pytest.raises(WeightsError, match="cannot be fetched"):
        open_weights("nosuchscheme://x/y")
    assert [p.name for p in tmp_path.iterdir()] == ["local"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://a/b.safetensors", r"https:// URLs needs the package 'aiohttp'.*pip install 'onnx-refit\[remote\]'"),
        ("s3://a/b.npz", "needs the package 's3fs', which is not installed. Install it with: pip install s3fs"),
        ("simplecache::gs://a/b.npz", "needs the package 'gcsfs'"),
        ("odd://a/b.npz", "cannot be fetched: Install oddfs. Install the package that it names"),
    ],
)
def test_the_package_that_a_kind_of_url_needs_is_named(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")

    def refuse(url: str) -> None:
        raise ImportError("Install oddfs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    with pytest.raises(OnnxRefitError, match=message):
        open_weights(url)
