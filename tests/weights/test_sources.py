"""Every kind of checkpoint opens, and reads what was written; every lie in one is refused with our own error."""

from __future__ import annotations

import argparse
import io
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from onnx_refit.errors import OnnxRefitError, WeightsError, WeightsFormatError
from onnx_refit.weights.open import open_weights
from onnx_refit.weights.source import WeightSource, read_all
from onnx_refit.weights.sources.safetensors import SafetensorsSource

ARRAYS: dict[str, Any] = {
    "w": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.linspace(-1, 1, 5).astype(np.float16),
    "bf": np.linspace(-2, 2, 6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "f8": np.array([0.5, -1.5], ml_dtypes.float8_e4m3fn),
    "count": np.array(7, np.int64),
    "mask": np.array([True, False]),
    "none": np.zeros((0, 3), np.float32),
}


def same(source: WeightSource, expected: dict[str, Any]) -> None:
    got = dict(read_all(source))
    assert sorted(got) == sorted(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        assert got[name].shape == array.shape == source.specs[name].shape
        assert got[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


def raw_safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


# ---------------------------------------------------------------- safetensors


def test_safetensors_round_trip_is_mapped_and_read_only(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(ARRAYS, path, metadata={"format": "np"})
    source = open_weights(path)
    same(source, ARRAYS)
    assert isinstance(source, SafetensorsSource)
    assert source.metadata == {"format": "np"}
    array = source.read("w")
    assert not array.flags.writeable
    assert not array.flags.owndata
    source.close()
    assert array.sum() == 66  # arrays outlive the source
    with pytest.raises(WeightsError, match="closed"):
        source.read("w")


def test_safetensors_with_an_odd_header_length_gives_aligned_arrays(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2 + 1 - (len(text) % 2 == 1))
    path = tmp_path / "odd.safetensors"
    for pad in range(4):
        path.write_bytes(raw_safetensors(text + b" " * pad, np.array([1, 2], np.float32).tobytes()))
        array = open_weights(path).read("w")
        assert array.flags.aligned
        assert array.tolist() == [1, 2]


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
DATA = b"\0\0\x80?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"1234567", "too few"),
        (raw_safetensors({"w": F32}, DATA, length=1 << 60), "would take"),
        (raw_safetensors({"w": F32}, DATA, length=5000), "header takes"),
        (raw_safetensors(b"[1]", DATA), "no JSON object"),
        (raw_safetensors(b"{", DATA), "no valid JSON"),
        (raw_safetensors(b"{" + b'"a":{' * 100_000, DATA), "nests too deep"),
        (
            raw_safetensors(b'{"w":' + json.dumps(F32).encode() + b',"w":' + json.dumps(F32).encode() + b"}", DATA),
            "twice",
        ),
        (raw_safetensors({"w": {**F32, "dtype": "F99"}}, DATA), "F99"),
        (raw_safetensors({"w": {**F32, "dtype": ["F32"]}}, DATA), "not supported"),
        (raw_safetensors({"w": {**F32, "more": 1}}, DATA), "not described"),
        (raw_safetensors({"w": {**F32, "shape": [-1]}}, DATA), "no valid shape"),
        (raw_safetensors({"w": {**F32, "shape": [True]}}, DATA), "no valid shape"),
        (raw_safetensors({"w": {**F32, "shape": [1.0]}}, DATA), "no valid shape"),
        (raw_safetensors({"w": {**F32, "shape": [1] * 100}}, DATA), "no valid shape"),
        (raw_safetensors({"w": {**F32, "data_offsets": [0]}}, DATA), "no valid data_offsets"),
        (raw_safetensors({"w": {**F32, "data_offsets": [4, 0]}}, DATA), "does not take"),
        (raw_safetensors({"w": {**F32, "data_offsets": [4, 8]}}, DATA * 2), "hole"),
        (raw_safetensors({"w": F32, "v": F32}, DATA), "overlaps"),
        (raw_safetensors({"w": F32}, DATA * 2), "the file has 8"),
        (raw_safetensors({"w": F32}, DATA[:2]), "the file has 2"),
        (raw_safetensors({"__metadata__": {"a": 1}}), "__metadata__"),
        (
            raw_safetensors({"w": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}, DATA),
            "does not take",
        ),
    ],
)
def test_a_lying_safetensors_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsFormatError, match=message) as caught:
        open_weights(path)
    assert str(path) in str(caught.value)


def test_bool_bytes_other_than_0_and_1_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bool.safetensors"
    path.write_bytes(raw_safetensors({"m": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\x01\x02"))
    with pytest.raises(WeightsFormatError, match="other than 0 and 1"):
        open_weights(path).read("m")


def test_a_file_cut_short_after_opening_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_file({"w": np.zeros(100_000, np.float32)}, path)
    source = open_weights(path)
    os.truncate(path, 1000)
    with pytest.raises(WeightsFormatError, match="ends at byte 1000"):
        source.read("w")


# ---------------------------------------------------------------- sharded, directories


def write_shards(directory: Path) -> Path:
    save_file({"a": ARRAYS["w"]}, directory / "model-1.safetensors")
    save_file({"b": ARRAYS["half"]}, directory / "model-2.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    )
    return index


def test_sharded_by_index_and_by_directory(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    for where in (index, tmp_path, str(tmp_path)):
        same(open_weights(where), {"a": ARRAYS["w"], "b": ARRAYS["half"]})


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "sub/../../evil.safetensors", "", "a\\b", "link"]
)
def test_an_index_cannot_lead_out_of_its_directory(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    save_file({"a": ARRAYS["w"]}, tmp_path / "evil.safetensors")
    (inside / "link").symlink_to(tmp_path / "evil.safetensors")
    index = inside / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsFormatError, match=r"leads out|no file name"):
        open_weights(index)


def test_the_cache_layout_of_the_hub_opens(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_shards(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    same(open_weights(snapshot), {"a": ARRAYS["w"], "b": ARRAYS["half"]})


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "z": "model-2.safetensors"}}))
    with pytest.raises(WeightsFormatError, match="different checkpoints"):
        open_weights(index)


def test_a_directory_with_nothing_or_too_much_says_so(tmp_path: Path) -> None:
    with pytest.raises(WeightsFormatError, match="no checkpoint"):
        open_weights(tmp_path)
    save_file({"a": ARRAYS["w"]}, tmp_path / "x.safetensors")
    same(open_weights(tmp_path), {"a": ARRAYS["w"]})
    save_file({"a": ARRAYS["w"]}, tmp_path / "y.safetensors")
    with pytest.raises(WeightsFormatError, match=r"2 files \*\.safetensors"):
        open_weights(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(WeightsFormatError, match="LoRA"):
        open_weights(tmp_path)


# ---------------------------------------------------------------- npz

NPZ = {k: v for k, v in ARRAYS.items() if k not in ("bf", "f8")}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_round_trip(tmp_path: Path, save) -> None:
    path = tmp_path / "a.npz"
    extra = {"fortran": np.asfortranarray(ARRAYS["w"]), "big": ARRAYS["w"].astype(">f4")}
    save(path, **NPZ, **extra)
    source = open_weights(path)
    same(source, {**NPZ, "fortran": ARRAYS["w"], "big": ARRAYS["w"]})
    assert source.read("w").flags.owndata is False or save is np.savez_compressed


def test_npz_with_objects_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    path = tmp_path / "bomb.npz"
    np.savez(path, w=np.array([Bomb()], dtype=object))
    with pytest.raises(WeightsFormatError, match="objects"):
        open_weights(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("array", [np.array(["a"]), np.zeros(2, [("x", "f4")]), np.zeros(2, ml_dtypes.bfloat16)])
def test_npz_of_something_else_than_numbers_is_refused(tmp_path: Path, array) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, w=array)
    with pytest.raises(WeightsFormatError, match="not numeric"):
        open_weights(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_npz_checksums_are_verified(tmp_path: Path, compression: int) -> None:
    path = tmp_path / "a.npz"
    payload = io.BytesIO()
    np.save(payload, np.random.default_rng(0).random(1000))
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("w.npy", payload.getvalue())
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsFormatError, match=r"checksum|CRC|cannot be read"):
        open_weights(path).read("w")


def test_npz_whose_header_promises_too_much_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    payload = io.BytesIO()
    np.lib.format.write_array_header_1_0(payload, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 40)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", payload.getvalue() + b"1234")
    with pytest.raises(WeightsFormatError, match="does not fill"):
        open_weights(path)


def test_npz_with_foreign_members_or_repeats_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(WeightsFormatError, match=r"no \.npy"):
        open_weights(path)
    payload = io.BytesIO()
    np.save(payload, np.zeros(1))
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("w.npy", payload.getvalue())
        archive.writestr("w.npy", payload.getvalue())
    with pytest.raises(WeightsFormatError, match="twice"):
        open_weights(path)


# ---------------------------------------------------------------- ONNX


def onnx_model(**external: str) -> onnx.ModelProto:
    w = numpy_helper.from_array(ARRAYS["w"], "w")
    typed = helper.make_tensor("typed", TensorProto.FLOAT, [2], [1.5, 2.5])
    half = helper.make_tensor("half", TensorProto.FLOAT16, [2], np.array([1, 2], np.float16))
    packed = helper.make_tensor("packed", TensorProto.INT4, [3], [1, -2, 3])
    text = numpy_helper.from_array(np.array(["hello"], object), "text")
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["branch"], value=numpy_helper.from_array(np.ones(2, np.float32)))],
        "then",
        [],
        [helper.make_tensor_value_info("branch", TensorProto.FLOAT, [2])],
    )
    nodes = [
        helper.make_node("Constant", [], ["const"], value=numpy_helper.from_array(np.full((2, 2), 3, np.float32))),
        helper.make_node("Constant", [], ["floats"], value_floats=[1.0, 2.0]),
        helper.make_node("Constant", [], ["shape"], value_ints=[2, 3]),
        helper.make_node("ConstantOfShape", ["shape"], ["filled"], value=helper.make_tensor("v", 1, [1], [5.0])),
        helper.make_node("If", ["cond"], ["out"], then_branch=inner, else_branch=inner),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [w, typed, half, packed, text],
    )
    return helper.make_model(graph)


ONNX_ARRAYS: dict[str, Any] = {
    "w": ARRAYS["w"],
    "typed": np.array([1.5, 2.5], np.float32),
    "half": np.array([1, 2], np.float16),
    "packed": np.array([1, -2, 3], ml_dtypes.int4),
    "const": np.full((2, 2), 3, np.float32),
    "floats": np.array([1, 2], np.float32),
    "shape": np.array([2, 3]),
    "filled": np.full((2, 3), 5, np.float32),
    "branch": np.ones(2, np.float32),
}


def test_onnx_initializers_constants_and_branches(tmp_path: Path) -> None:
    onnx.save(onnx_model(), tmp_path / "m.onnx")
    for source in (open_weights(tmp_path / "m.onnx"), open_weights(onnx_model())):
        same(source, ONNX_ARRAYS)


def external_model(directory: Path) -> Path:
    path = directory / "m.onnx"
    onnx.save(onnx_model(), path, save_as_external_data=True, location="m.data", size_threshold=0)
    return path


def test_onnx_external_data_is_mapped(tmp_path: Path) -> None:
    source = open_weights(external_model(tmp_path))
    same(source, ONNX_ARRAYS)
    assert not source.read("w").flags.owndata


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "../m.data", "leads out"),
        ("location", "/etc/passwd", "leads out"),
        ("location", "absent", "no such file"),
        ("offset", "99999", "ends at byte"),
        ("offset", "-8", "are no"),
        ("offset", "abc", "cannot be read"),
        ("length", "1", "are no"),
    ],
)
def test_onnx_external_data_that_lies_is_refused(tmp_path: Path, key: str, value: str, message: str) -> None:
    path = external_model(tmp_path)
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "w")
    kept = {e.key: e.value for e in tensor.external_data} | {key: value}
    del tensor.external_data[:]
    for k, v in kept.items():
        tensor.external_data.add(key=k, value=v)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(WeightsError, match=message):
        open_weights(path).read("w")


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x08", b"\xff" * 100, b"\x0a" * 1000, onnx.ModelProto().SerializeToString()]
)
def test_what_is_no_onnx_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(WeightsFormatError):
        open_weights(path)


def test_onnx_tensors_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    for change in ("dims", "type", "raw"):
        model = onnx_model()
        tensor = model.graph.initializer[0]
        if change == "dims":
            tensor.dims[0] = 1 << 50
        elif change == "type":
            tensor.data_type = 77
        else:
            tensor.raw_data = tensor.raw_data[:-1]
        with pytest.raises(WeightsFormatError, match="'w' cannot be read"):
            open_weights(model).read("w")


# ---------------------------------------------------------------- mappings, unknown things


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


def test_files_are_recognised_without_their_suffix(tmp_path: Path) -> None:
    save_file({"w": ARRAYS["w"]}, tmp_path / "one")
    np.savez(tmp_path / "two.npz", w=ARRAYS["w"])
    (tmp_path / "two.npz").rename(tmp_path / "two")
    onnx.save(onnx_model(), tmp_path / "three")
    for name in ("one", "two", "three"):
        assert open_weights(tmp_path / name).read("w").tobytes() == ARRAYS["w"].tobytes()


# ---------------------------------------------------------------- URLs


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


# ---------------------------------------------------------------- PyTorch


@pytest.mark.torch
def test_torch_checkpoints(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    state = {
        "w": torch.arange(12, dtype=torch.float32).reshape(3, 4).t(),
        "bf": torch.linspace(-2, 2, 6).to(torch.bfloat16),
        "f8": torch.tensor([0.5]).to(torch.float8_e4m3fn),
        "n": torch.tensor(3),
    }
    expected = {
        "w": ARRAYS["w"].T,
        "bf": np.linspace(-2, 2, 6).astype(np.float32).astype(ml_dtypes.bfloat16),
        "f8": np.array([0.5], ml_dtypes.float8_e4m3fn),
        "n": np.array(3),
    }
    same(open_weights(state), expected)
    torch.save(state, tmp_path / "a.pt")
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, tmp_path / "b.ckpt")
    for name in ("a.pt", "b.ckpt"):
        same(open_weights(tmp_path / name), expected)
    torch.save({"w": state["w"]}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    same(open_weights(tmp_path / "old.pth"), {"w": expected["w"]})
    (tmp_path / "a.pt").rename(tmp_path / "a")
    same(open_weights(tmp_path / "a"), expected)


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.torch
def test_torch_checkpoints_that_would_run_code_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"w": Evil(str(tmp_path / "exploded"))}, tmp_path / "evil.pt")
    with pytest.raises(WeightsFormatError, match=r"it holds [\w.]+, which is no tensor\. .* would run code"):
        open_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "exploded").exists()
    torch.save({"w": torch.zeros(2), "args": argparse.Namespace(x=1)}, tmp_path / "args.pt")
    with pytest.raises(WeightsFormatError, match=r"it holds argparse.Namespace, which is no tensor"):
        open_weights(tmp_path / "args.pt")
    for content in (b"PK\x03\x04 not really", b"\x80\x02garbage", b"hello", (tmp_path / "args.pt").read_bytes()[:-40]):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(WeightsFormatError) as caught:
            open_weights(tmp_path / "bad.pt")
        text = str(caught.value)
        assert "weights_only" not in text
        assert "\x1b" not in text
        assert ".." not in text
        assert len(text) < 250 + len(str(tmp_path))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightsFormatError, match="not a state dict"):
        open_weights(tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="not dense"):
        open_weights({"s": torch.zeros(2, 2).to_sparse()}).read("s")
