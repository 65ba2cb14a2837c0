"""gRPC where clients do not look: errors, deadlines, bounds, versions, tokens."""

import numpy as np
import pytest

pytest.importorskip("uvicorn")
grpc = pytest.importorskip("grpc")
from onnx_refit.serve.client import RefitClient  # noqa: E402
from onnx_refit.serve.proto import messages  # noqa: E402
from tests.serve.conftest import TOKEN  # noqa: E402

pytestmark = pytest.mark.serve


@pytest.fixture
def call(server):
    with grpc.insecure_channel(server.grpc) as channel:

        def call(method, request, *, timeout=60.0, metadata=()):
            made = channel.unary_unary(
                f"/{messages.SERVICE}/{method}",
                type(request).SerializeToString,
                getattr(messages, f"{method}Response").FromString,
            )
            return made(request, timeout=timeout, metadata=metadata)

        yield call


def request(values=(1, 1, 1, 1), *, version="", shape=(1, 4), raw=None):
    made = messages.ModelInferRequest(model_name="affine", model_version=version, id="g1")
    tensor = made.inputs.add(name="x", datatype="FP32", shape=shape)
    if raw is None:
        tensor.contents.fp32_contents.extend(values)
    else:
        made.raw_input_contents.append(raw)
    return made


def refused(call, *arguments, **options):
    with pytest.raises(grpc.RpcError) as error:
        call(*arguments, **options)
    return error.value.code(), error.value.details()


def test_answers_name_their_version(call):
    answer = call("ModelInfer", request())
    assert (answer.model_version, answer.id) == ("1", "g1")
    assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == [2.0] * 4
    assert call("ModelInfer", request(), metadata=(("onnx-refit-version", "1"),)).model_version == "1"


@pytest.mark.parametrize(
    "made,code",
    [
        (request(version="7"), "NOT_FOUND"),
        (request(version="x"), "NOT_FOUND"),
        (request(shape=(2, 4)), "INVALID_ARGUMENT"),
        (request(shape=(-1, 4)), "INVALID_ARGUMENT"),
        (request(raw=b"1234"), "INVALID_ARGUMENT"),
        (messages.ModelInferRequest(model_name="affine"), "INVALID_ARGUMENT"),
        (messages.ModelInferRequest(model_name="../affine"), "NOT_FOUND"),
    ],
)
def test_bad_requests(call, made, code):
    got, text = refused(call, "ModelInfer", made)
    assert got.name == code
    assert len(text) > 10


def test_a_message_over_the_bound_is_refused(call):
    got, _ = refused(call, "ModelInfer", request(raw=b"\0" * 65_000_000))
    assert got.name == "RESOURCE_EXHAUSTED"
    assert call("ModelInfer", request()).model_version == "1"


def test_repository_verbs_need_the_token(call):
    assert refused(call, "RepositoryModelUnload", messages.RepositoryModelUnloadRequest(first="affine"))[0].name == (
        "UNAUTHENTICATED"
    )
    metadata = (("authorization", f"Bearer {TOKEN}"),)
    call("RepositoryModelUnload", messages.RepositoryModelUnloadRequest(first="affine"), metadata=metadata)
    assert refused(call, "ModelInfer", request())[0].name == "UNAVAILABLE"
    answer = call("RepositoryModelLoad", messages.RepositoryModelLoadRequest(second="affine"), metadata=metadata)
    assert (answer.model_name, answer.is_loaded) == ("affine", True)
    assert call("ModelInfer", request()).model_version == "1"


def test_a_commit_reaches_grpc_too(server, call, weights):
    client = RefitClient(server.url, TOKEN)
    committed = client.commit("affine", client.stage("affine", weights(7))["id"])
    answer = call("ModelInfer", request())
    assert answer.model_version == str(committed["version"])
    assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == [14.0] * 4
    client.rollback("affine", 1)
    assert call("ModelInfer", request()).model_version == "1"
