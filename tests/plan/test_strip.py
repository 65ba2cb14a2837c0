"""Reading tensors: no copies that are not needed, external data by maps, and clear words where a file is wrong."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnx_refit.errors import ModelError
from onnx_refit.model.detach import read_detached
from onnx_refit.plan.compile import CompileOptions, compile_model
from onnx_refit.plan.strip import read_tensor
from tests.plan.support import array, model, node, run, run_compiled


def external(folder: Path, *, offset: int = 0, size: int = 64) -> ModelProto:
    weights = array(1, size, size)
    with (folder / "weights.bin").open("wb") as file:
        file.write(b"\0" * offset + weights.tobytes())
    proto = model([node("MatMul", ["x", "w"], ["y"])], {"x": [3, size]}, ["y"])
    tensor = proto.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[size, size])
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in (("location", "weights.bin"), ("offset", str(offset)), ("length", str(weights.nbytes))):
        tensor.external_data.add(key=key, value=text)
    return proto


@pytest.mark.parametrize("offset", [0, 4096, 3])
def test_external_data_is_mapped(tmp_path: Path, offset: int) -> None:
    proto = external(tmp_path, offset=offset)
    compilation = compile_model(proto, CompileOptions(base_dir=tmp_path))
    np.testing.assert_array_equal(compilation.weights["w"], array(1, 64, 64))
    assert not compilation.weights["w"].flags.writeable
    if offset % 4 == 0:
        base: object = compilation.weights["w"]
        while not isinstance(base, np.memmap):
            assert isinstance(base, np.ndarray)
            base = base.base
    x = array(0, 3, 64)
    feeds = {"x": x}
    got = run_compiled(compilation.compiled, compilation.weights, feeds)
    loaded = model([node("MatMul", ["x", "w"], ["y"])], {"x": [3, 64]}, ["y"], {"w": array(1, 64, 64)})
    np.testing.assert_array_equal(run(loaded, feeds)[0], got[0])


def test_external_data_of_gigabytes_needs_no_memory(tmp_path: Path) -> None:
    """A sparse file of 3 GB: more than one protobuf can hold."""
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(3 << 30)
    proto = model([node("MatMul", ["x", "w"], ["y"])], {"x": [3, 1 << 15]}, ["y"])
    tensor = proto.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[1 << 15, 3 << 13])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    tracemalloc.start()
    compilation = compile_model(proto, CompileOptions(base_dir=tmp_path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert compilation.weights["w"].nbytes == 3 << 30
    assert peak < 16 << 20


def test_inline_weights_are_copied_once_at_most() -> None:
    size = 1024
    proto = model([node("MatMul", ["x", "w"], ["y"])], {"x": [3, size]}, ["y"], {"w": array(1, size, size)})
    tracemalloc.start()
    compilation = compile_model(proto)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * compilation.weights["w"].nbytes


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "weights.bin").unlink(), "missing"),
        (lambda folder: (folder / "weights.bin").write_bytes(b"short"), "cut short"),
    ],
)
def test_external_data_that_is_wrong(tmp_path: Path, spoil, message: str) -> None:
    proto = external(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ModelError, match=message):
        compile_model(proto, CompileOptions(base_dir=tmp_path))


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    proto = external(tmp_path)
    proto.graph.initializer[0].external_data[0].value = location
    with pytest.raises(ModelError, match="outside the model's folder"):
        compile_model(proto, CompileOptions(base_dir=tmp_path))


def test_external_data_without_a_folder_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="base_dir"):
        compile_model(external(tmp_path))


@pytest.mark.parametrize(
    "dtype",
    [
        np.float32,
        np.float16,
        np.float64,
        np.int8,
        np.uint8,
        np.int32,
        np.int64,
        np.bool_,
        ml_dtypes.bfloat16,
        ml_dtypes.int4,
        ml_dtypes.uint4,
        ml_dtypes.float8_e4m3fn,
    ],
)
@pytest.mark.parametrize("where", ["raw", "typed", "external"])
def test_every_dtype_is_read(tmp_path: Path, dtype, where: str) -> None:
    values = (np.arange(6).reshape(2, 3) % 2).astype(dtype)
    tensor = numpy_helper.from_array(values, "t")
    if where == "typed":
        if np.dtype(dtype) not in (np.dtype(t) for t in (np.float32, np.float64, np.int32, np.int64, np.float16)):
            pytest.skip("helper.make_tensor writes typed fields for the plain dtypes")
        tensor = helper.make_tensor("t", tensor.data_type, [2, 3], values.reshape(-1))
        assert not tensor.raw_data
    elif where == "external":
        (tmp_path / "t.bin").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="t.bin")
    read = read_tensor(tensor, tmp_path)
    assert read.dtype == values.dtype
    np.testing.assert_array_equal(read, values)


def test_strings_are_read() -> None:
    tensor = helper.make_tensor("t", onnx.TensorProto.STRING, [2], np.array(["a", "é"]))
    assert read_tensor(tensor).tolist() == ["a", "é"]


def test_the_compiler_leaves_the_model_alone_and_its_arrays_cannot_be_written() -> None:
    proto = model([node("MatMul", ["x", "w"], ["y"])], {"x": [3, 4]}, ["y"], {"w": array(1, 4, 4)})
    compilation = compile_model(proto)
    with pytest.raises(ValueError, match="read-only"):
        compilation.weights["w"][0, 0] = 1


def test_a_model_read_without_its_tensors_compiles_to_the_same(tmp_path: Path) -> None:
    weights = {"w": array(1, 64, 64), "b": array(2, 64)}
    constant = numpy_helper.from_array(array(3, 64, 64))
    proto = model(
        [
            node("Constant", [], ["c"], value=constant),
            node("Gemm", ["x", "w", "b"], ["h"]),
            node("MatMul", ["h", "c"], ["y"]),
        ],
        {"x": [3, 64]},
        ["y"],
        weights,
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    bare = read_detached(path, 1024)
    assert bare.ByteSize() < 2048
    compilation = compile_model(bare, CompileOptions(base_dir=tmp_path))
    whole = compile_model(proto)
    assert compilation.compiled.program == whole.compiled.program
    assert set(compilation.weights) == {"w", "b", "c"}
    for name, values in whole.weights.items():
        np.testing.assert_array_equal(values, compilation.weights[name])
