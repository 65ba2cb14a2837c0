"""Every datatype through both codecs."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnx_refit.errors import InputError
from onnx_refit.tensors import numpy_dtype

pytest.importorskip("orjson")
from onnx_refit.serve import grpc_codec, rest_codec
from onnx_refit.serve.datatypes import array_from_bytes, array_from_list, bytes_of, datatype_of_array
from onnx_refit.serve.proto import messages
from onnx_refit.serve.request import InferRequest, InferResponse, WantedOutput

pytestmark = pytest.mark.serve
ARRAYS = {
    "BOOL": np.array([[True, False]]),
    "UINT8": np.array([[0, 255]], np.uint8),
    "UINT16": np.array([[0, 65535]], np.uint16),
    "UINT32": np.array([[0, 2**32 - 1]], np.uint32),
    "UINT64": np.array([[0, 2**64 - 1]], np.uint64),
    "INT8": np.array([[-128, 127]], np.int8),
    "INT16": np.array([[-32768, 32767]], np.int16),
    "INT32": np.array([[-(2**31), 2**31 - 1]], np.int32),
    "INT64": np.array([[-(2**63), 2**63 - 1]], np.int64),
    "FP16": np.array([[1.5, -65504]], np.float16),
    "FP32": np.array([[1e-45, -3.4e38]], np.float32),
    "FP64": np.array([[1e-320, -1.7e308]], np.float64),
    "BF16": np.array([[1.5, -2.0]], numpy_dtype("bfloat16")),
    "BYTES": np.array([["", "grün 🦊"]], object),
}


@pytest.mark.parametrize("datatype", ARRAYS)
@pytest.mark.parametrize("binary", [True, False])
def test_rest_both_ways(datatype, binary):
    array = ARRAYS[datatype]
    asked = InferRequest({}, outputs=(WantedOutput("t", binary),), id="7")
    body, length = rest_codec.encode_response(asked, InferResponse("m", 3, {"t": array}))
    head = json.loads(body[:length])
    assert (head["model_version"], head["id"]) == ("3", "7")
    # What went out is what must come in, under the other key.
    request = json.dumps({"inputs": head["outputs"]}).encode()
    tail = b"" if length is None else body[length:]
    back = rest_codec.decode_request(request + tail, str(len(request)) if binary else None).inputs["t"]
    assert back.dtype == array.dtype
    assert back.tolist() == array.tolist()


@pytest.mark.parametrize("datatype", ARRAYS)
def test_grpc_both_ways(datatype):
    array = ARRAYS[datatype]
    sent = grpc_codec.encode_response(InferRequest({}, id="7"), InferResponse("m", 3, {"t": array}))
    message = messages.ModelInferRequest(raw_input_contents=list(sent.raw_output_contents))
    message.inputs.add(name="t", datatype=sent.outputs[0].datatype, shape=sent.outputs[0].shape)
    back = grpc_codec.decode_request(message).inputs["t"]
    assert back.dtype == array.dtype
    assert back.tolist() == array.tolist()


@pytest.mark.parametrize("datatype", [name for name in ARRAYS if name not in ("FP16", "BF16")])
def test_grpc_typed_contents(datatype):
    array = ARRAYS[datatype]
    message = messages.ModelInferRequest()
    tensor = message.inputs.add(name="t", datatype=datatype, shape=array.shape)
    values = array.reshape(-1).tolist()
    field = getattr(tensor.contents, grpc_codec._CONTENTS[datatype])
    field.extend([value.encode() for value in values] if datatype == "BYTES" else values)
    back = grpc_codec.decode_request(message).inputs["t"]
    assert back.dtype == array.dtype
    assert back.tolist() == array.tolist()


@pytest.mark.parametrize(
    "datatype,data",
    [
        ("INT8", [128, 0]), ("INT8", [1.0, 2]), ("INT8", [True, 1]), ("UINT8", [-1, 0]), ("UINT64", [2**64, 0]),
        ("BOOL", [0, 1]), ("FP16", [70000, 0]), ("BF16", [1e39, 0]), ("FP32", ["1", "2"]), ("BYTES", [1, 2]),
        ("BYTES", [None, "x"]), ("FP64", [10**400, 0]), ("FP32", [[1], [2, 3]]), ("FP32", [[], []]),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_are_refused(datatype, data):
    with pytest.raises(InputError):
        array_from_list(data, datatype, (2,), "t")


def test_empty_tensors():
    assert array_from_list([], "FP32", (0, 4), "t").shape == (0, 4)
    assert array_from_bytes(b"", "BYTES", (0,), "t").shape == (0,)
    assert bytes_of(np.zeros((0, 4), np.float32)) == b""


def test_text_next_to_numbers_takes_no_memory():
    # NumPy would make every element as wide as the longest text: 4 TB here.
    with pytest.raises(InputError):
        array_from_list(["x" * 1_000_000] + [1] * 1_000_000, "INT32", (1_000_001,), "t")


@given(st.binary(max_size=200), st.sampled_from([*ARRAYS, "FP8"]), st.lists(st.integers(0, 9), max_size=4))
def test_any_bytes_are_a_tensor_or_refused(data, datatype, shape):
    try:
        array = array_from_bytes(data, datatype, tuple(shape), "t")
    except InputError:
        return
    assert array.shape == tuple(shape)
    assert datatype_of_array(array) == datatype
    assert bytes(bytes_of(array)) == data


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)
field = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("t") | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "datatype": st.sampled_from([*ARRAYS]) | json_values,
        "data": json_values,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-2, 40) | json_values})
        | json_values,
    },
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.fixed_dictionaries(
        {}, optional={"inputs": st.lists(field, max_size=3) | json_values, "outputs": json_values, "id": json_values,
                      "parameters": json_values}
    ),
    st.binary(max_size=64),
    st.integers(-3, 3) | st.none(),
)  # fmt: skip
def test_any_request_is_read_or_refused(request, tail, shift):
    from onnx_refit.errors import VersionError

    head = json.dumps(request).encode()
    length = None if shift is None else str(len(head) + shift)
    with contextlib.suppress(InputError, VersionError):
        rest_codec.decode_request(head + tail, length)


@given(st.binary(max_size=300))
def test_any_grpc_message_is_read_or_refused(data):
    from google.protobuf.message import DecodeError

    from onnx_refit.errors import VersionError

    with contextlib.suppress(InputError, VersionError, DecodeError):
        grpc_codec.decode_request(messages.ModelInferRequest.FromString(data))
