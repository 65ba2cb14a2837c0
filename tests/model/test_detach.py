"""A model read without its tensors is the model, and its tensors are where it says."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_refit.errors import ModelError
from onnx_refit.model.detach import read_detached
from onnx_refit.model.graph import all_graphs

SIZE = 24


def example() -> onnx.ModelProto:
    """Weights as initializers, in Constant nodes and in branches; small tensors, typed tensors, strings, a function."""
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    def branch(tag: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node("Constant", [], [f"{tag}_c"], value=tensor("", SIZE, SIZE)),
            helper.make_node("MatMul", ["x", f"{tag}_c"], [f"{tag}_m"]),
            helper.make_node("MatMul", [f"{tag}_m", f"{tag}_w"], [f"{tag}_o"]),
        ]
        outputs = [helper.make_tensor_value_info(f"{tag}_o", TensorProto.FLOAT, None)]
        return helper.make_graph(nodes, tag, [], outputs, [tensor(f"{tag}_w", SIZE, SIZE)])

    typed = helper.make_tensor("typed", TensorProto.FLOAT, [SIZE, SIZE], rng.standard_normal(SIZE * SIZE))
    graph = helper.make_graph(
        [
            helper.make_node("If", ["cond"], ["a"], then_branch=branch("then"), else_branch=branch("else")),
            helper.make_node("MatMul", ["a", "w"], ["b"]),
            helper.make_node("MatMul", ["b", "typed"], ["c"]),
            helper.make_node("Gemm", ["c", "w", "bias"], ["y"], alpha=0.5),
        ],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", SIZE]),
            helper.make_tensor_value_info("cond", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [tensor("w", SIZE, SIZE), typed, tensor("bias", SIZE)],
        doc_string="a model",
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model.metadata_props.add(key="k", value="v")
    return model


def tensors(model: onnx.ModelProto) -> list[TensorProto]:
    found = []
    for graph in all_graphs(model.graph):
        found.extend(graph.initializer)
        found.extend(a.t for node in graph.node if node.op_type == "Constant" for a in node.attribute)
    return found


def reattach(model: onnx.ModelProto, folder: Path) -> int:
    """Read every tensor back from the file; how many there were."""
    count = 0
    for tensor in tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            data = (folder / entries["location"]).read_bytes()
            offset, length = int(entries["offset"]), int(entries["length"])
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = data[offset : offset + length]
            count += 1
    return count


@pytest.mark.parametrize(("smallest", "detached"), [(SIZE * SIZE * 4, 5), (1, 6), (1 << 20, 0)])
def test_the_model_is_whole_again_with_the_tensors_of_its_file(tmp_path: Path, smallest: int, detached: int) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(example().SerializeToString())
    model = read_detached(path, smallest)
    assert reattach(model, tmp_path) == detached
    assert model == example()


def test_memory_is_that_of_the_graph(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = example()
    model.graph.initializer.append(numpy_helper.from_array(np.ones(16 << 20, np.float32), "big"))
    path.write_bytes(model.SerializeToString())
    tracemalloc.start()
    read = read_detached(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert read.ByteSize() < 1 << 20


def test_models_that_are_external_already_stay_so(tmp_path: Path) -> None:
    model = example()
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    expected = onnx.load(path, load_external_data=False)
    assert list(read_detached(path, 64).graph.initializer) == list(expected.graph.initializer)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_are_named_and_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever the damage: an error in words, or the model that protobuf reads too."""
    whole = bytearray(example().SerializeToString())
    if data.draw(st.booleans()):
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if whole:
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.onnx"
    path.write_bytes(whole)
    try:
        read = read_detached(path, 256)
    except ModelError as error:
        assert "damaged.onnx" in str(error)
        return
    plain = onnx.ModelProto()
    plain.ParseFromString(bytes(whole))
    assert read.graph.name == plain.graph.name


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read_detached(tmp_path / "none.onnx")
