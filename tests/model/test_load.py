import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from onnx_refit.errors import ModelError, UnsupportedModelError
from onnx_refit.model.load import load_model
from onnx_refit.model.prepare import prepare
from tests.model.builders import model, node, operators

SHAPE = ("float32", [2, 3])


def simple(**arguments):
    weights = {"w": np.arange(3, dtype=np.float32)}
    return model([node("Add", ["x", "w"], ["y"], name="add")], {"x": SHAPE}, {"y": SHAPE}, weights, **arguments)


def saved(tmp_path, proto, name="m.onnx"):
    path = tmp_path / name
    path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    return path


def test_a_good_model(tmp_path):
    assert load_model(saved(tmp_path, simple())) == simple()
    assert load_model(str(saved(tmp_path, simple()))) == simple()
    proto = simple()
    assert load_model(proto) is proto


def test_no_file(tmp_path):
    with pytest.raises(ModelError, match=r"none\.onnx: no such file"):
        load_model(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="a directory"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"hello, I am a text file\n" * 20, "not an ONNX model"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not an ONNX model"),
        (b"PK\x03\x04" + bytes(100), "not an ONNX model"),
        (b"\x08\x07", "it has no graph"),
        (simple().SerializeToString()[:-40], "not an ONNX model"),
        (onnx.GraphProto(name="g").SerializeToString(), "not an ONNX model"),
    ],
    ids=["empty", "text", "png", "zip", "version only", "cut", "graph only"],
)
def test_what_is_not_onnx(tmp_path, content, message):
    with pytest.raises(ModelError, match=message):
        load_model(saved(tmp_path, content))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
@example(b":\x00")
def test_any_bytes_give_a_model_error(tmp_path, content):
    with pytest.raises(ModelError):
        load_model(saved(tmp_path, content))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_models_give_a_model_error_or_load(tmp_path, data):
    content = bytearray(simple().SerializeToString())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    try:
        load_model(saved(tmp_path, bytes(content)))
    except ModelError as error:
        assert str(error)


def test_missing_parts():
    for field in ("graph", "opset_import", "ir_version"):
        proto = simple()
        proto.ClearField(field)
        with pytest.raises(ModelError, match="not an ONNX model"):
            load_model(proto)
    proto = simple()
    del proto.graph.output[:]
    with pytest.raises(ModelError, match="no output"):
        load_model(proto)


def test_an_opset_of_the_future(tmp_path):
    proto = simple()
    proto.opset_import[0].version = 999
    with pytest.raises(UnsupportedModelError, match="opset 999 is newer than"):
        load_model(saved(tmp_path, proto))
    proto = simple()
    proto.ir_version = 999
    with pytest.raises(UnsupportedModelError, match="IR version 999"):
        load_model(proto)


def test_unknown_operators(tmp_path):
    proto = model([node("Frobnicate", ["x"], ["y"], name="odd")], {"x": SHAPE}, {"y": SHAPE})
    with pytest.raises(UnsupportedModelError, match="the operator Frobnicate is not known") as caught:
        load_model(saved(tmp_path, proto))
    assert "node odd" in str(caught.value)
    proto = model([node("Frobnicate", ["x"], ["y"], domain="my.ops")], {"x": SHAPE}, {"y": SHAPE})
    with pytest.raises(ModelError, match="its domain has no opset"):
        load_model(proto)
    proto.opset_import.append(onnx.helper.make_opsetid("my.ops", 1))
    with pytest.raises(UnsupportedModelError, match=r"my\.ops\.Frobnicate"):
        load_model(proto)


def test_an_operator_newer_than_the_opset():
    proto = model([node("Gelu", ["x"], ["y"])], {"x": SHAPE}, {"y": SHAPE}, opset=13)
    with pytest.raises(UnsupportedModelError, match="opset 13 has no operator Gelu"):
        load_model(proto)
    proto = model([node("Upsample", ["x"], ["y"])], {"x": SHAPE}, {"y": SHAPE}, opset=13)
    with pytest.raises(UnsupportedModelError, match="withdrawn"):
        load_model(proto)


def test_operators_of_onnx_runtime_and_functions_are_known():
    proto = model([node("Gelu", ["x"], ["y"], domain="com.microsoft")], {"x": SHAPE}, {"y": SHAPE})
    proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    load_model(proto)
    proto = model([node("Twice", ["x"], ["y"], domain="my.ops")], {"x": SHAPE}, {"y": SHAPE})
    proto.opset_import.append(onnx.helper.make_opsetid("my.ops", 1))
    body = [node("Add", ["a", "a"], ["b"])]
    opsets = [onnx.helper.make_opsetid("", 13)]
    proto.functions.append(onnx.helper.make_function("my.ops", "Twice", ["a"], ["b"], body, opsets))
    load_model(proto)


def test_the_checkers_words():
    proto = model([node("Add", ["x", "nobody"], ["y"])], {"x": SHAPE}, {"y": SHAPE})
    with pytest.raises(ModelError, match=r"not valid ONNX: .*nobody"):
        load_model(proto)
    load_model(proto, check=False)


def external(tmp_path):
    path = tmp_path / "m.onnx"
    weights = {"w": np.arange(3000, dtype=np.float32)}
    wide = ("float32", [2, 3000])
    proto = model([node("Add", ["x", "w"], ["y"])], {"x": wide}, {"y": wide}, weights)
    onnx.save(proto, path, save_as_external_data=True, location="m.data", size_threshold=0)
    return path


@pytest.mark.parametrize("missing", [1, 1197, 1200])
def test_a_large_tensor_with_too_few_bytes(missing):
    weights = {"w": np.zeros(300, np.float32)}
    wide = ("float32", [2, 300])
    proto = model([node("Add", ["x", "w"], ["y"])], {"x": wide}, {"y": wide}, weights)
    load_model(proto)
    proto.graph.initializer[0].raw_data = bytes(1200 - missing)
    with pytest.raises(ModelError, match=r"not valid ONNX: .*w"):
        load_model(proto)


def test_external_data(tmp_path):
    path = external(tmp_path)
    read = load_model(path)
    array = onnx.numpy_helper.to_array(read.graph.initializer[0])
    np.testing.assert_array_equal(array, np.arange(3000, dtype=np.float32))
    left = load_model(path, load_external_data=False)
    assert left.graph.initializer[0].data_location == onnx.TensorProto.EXTERNAL


def test_small_external_tensors_are_read_in_any_case(tmp_path):
    path = tmp_path / "m.onnx"
    weights = {"shape": np.array([-1]), "w": np.ones(3000, np.float32)}
    nodes = [node("Add", ["x", "w"], ["a"]), node("Reshape", ["a", "shape"], ["y"])]
    proto = model(nodes, {"x": ("float32", [2, 3000])}, {"y": ("float32", ["n"])}, weights)
    onnx.save(proto, path, save_as_external_data=True, location="m.data", size_threshold=0)
    shape, w = load_model(path, load_external_data=False).graph.initializer
    assert onnx.numpy_helper.to_array(shape).tolist() == [-1]
    assert w.data_location == onnx.TensorProto.EXTERNAL
    assert onnx.load(path, load_external_data=False).graph.initializer[0].data_location == onnx.TensorProto.EXTERNAL


def test_a_model_with_external_data_can_be_prepared(tmp_path):
    """A Compress by a condition that lies in another file, too large to be read with the model."""
    path = tmp_path / "m.onnx"
    weights = {"c": np.arange(3000) % 2 == 0, "w": np.ones(3000, np.float32)}
    nodes = [node("Add", ["x", "w"], ["a"]), node("Compress", ["a", "c"], ["y"], axis=0)]
    proto = model(nodes, {"x": ("float32", [3000])}, {"y": ("float32", ["n"])}, weights)
    onnx.save(proto, path, save_as_external_data=True, location="m.data", size_threshold=0)
    prepared = prepare(load_model(path, load_external_data=False))
    assert "Compress" not in operators(prepared.model)
    made = tmp_path / "prepared.onnx"
    made.write_bytes(prepared.model.SerializeToString())
    session = onnxruntime.InferenceSession(made)
    (got,) = session.run(None, {"x": np.arange(3000, dtype=np.float32)})
    np.testing.assert_array_equal(got, np.arange(0, 3000, 2) + 1)


def test_external_data_missing(tmp_path):
    path = external(tmp_path)
    (tmp_path / "m.data").unlink()
    for load in (True, False):
        with pytest.raises(ModelError, match=r"external data of w is missing: .*m\.data"):
            load_model(path, load_external_data=load)


def test_external_data_cut_short(tmp_path):
    path = external(tmp_path)
    (tmp_path / "m.data").write_bytes(bytes(100))
    with pytest.raises(ModelError, match="cut short: w needs 12000 bytes, the file has 100"):
        load_model(path)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "", "a/../../b", "C:\\x"])
def test_external_data_elsewhere(tmp_path, location):
    path = external(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="not in the model's folder"):
        load_model(path)


def test_external_data_with_a_length_that_is_no_number(tmp_path):
    path = external(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == "length":
            entry.value = "many"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="is no number"):
        load_model(path)
