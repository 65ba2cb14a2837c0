"""OpenTelemetry spans of inferences over HTTP and gRPC, and of every step of a refit."""

import asyncio
import json

import numpy as np
import pytest
from safetensors.numpy import save

pytest.importorskip("uvicorn")
pytest.importorskip("opentelemetry.sdk")
import onnx_refit
from onnx_refit.serve.tracing import tracing
from tests.serve.conftest import TOKEN
from tests.serve.models import affine_weights

pytestmark = pytest.mark.serve
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
TENSOR = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1] * 4}
REFIT = "/v2/models/affine/refit"


@pytest.fixture(scope="module")
def exporter():
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    trace.set_tracer_provider(provider)
    tracing._again = 0.0  # or it may have looked a moment ago, on behalf of another test
    return kept


@pytest.fixture
def talk(plan, exporter):
    """Run a conversation with a server in this process; the spans it leaves, by name."""
    from onnx_refit.serve.app import make_app
    from onnx_refit.serve.server import Server
    from onnx_refit.serve.settings import Settings

    def talk(story):
        exporter.clear()

        async def run():
            context = Server(
                {"affine": onnx_refit.load(plan, keep=4)},
                Settings(access_log=False, admin_token=TOKEN, grpc_port=0),
            ).context
            context.serving = True
            app = make_app(context)

            async def ask(method, path, data=b"", **headers):
                sent = []
                named = {"traceparent": TRACEPARENT, "authorization": f"Bearer {TOKEN}", **headers}
                scope = {
                    "type": "http", "method": method, "path": path, "query_string": b"", "root_path": "",
                    "headers": [(key.encode(), value.encode()) for key, value in named.items()]
                    + [(b"content-length", str(len(data)).encode())],
                }  # fmt: skip

                async def receive():
                    return {"type": "http.request", "body": data, "more_body": False}

                async def send(message):
                    sent.append(message)

                await app(scope, receive, send)
                return sent[0]["status"], json.loads(sent[1]["body"])

            try:
                await story(ask, context)
            finally:
                await asyncio.to_thread(context.close)

        asyncio.run(run())
        spans = exporter.get_finished_spans()
        return {span.name: span for span in spans}

    return talk


def attributes(span):
    return {key.removeprefix("onnx_refit."): value for key, value in span.attributes.items()}


def test_an_inference_over_http(talk):
    async def story(ask, _):
        status, _ = await ask("POST", "/v2/models/affine/infer", json.dumps({"inputs": [TENSOR]}).encode())
        assert status == 200

    span = talk(story)["infer"]
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.kind.name == "SERVER"
    assert attributes(span) == {"model": "affine", "version": 1, "protocol": "http"}


def test_a_failed_inference(talk):
    async def story(ask, _):
        assert (await ask("POST", "/v2/models/affine/infer", b"{}"))[0] == 400

    span = talk(story)["infer"]
    assert span.status.status_code.name == "ERROR"
    assert "version" not in attributes(span)


def test_an_inference_over_grpc(talk):
    grpc = pytest.importorskip("grpc")
    from onnx_refit.serve.grpc_server import start_grpc
    from onnx_refit.serve.proto import messages

    async def story(_, context):
        server, port = await start_grpc(context)
        message = messages.ModelInferRequest(model_name="affine")
        message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
        message.raw_input_contents.append(np.ones(4, np.float32).tobytes())
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            infer = channel.unary_unary(
                f"/{messages.SERVICE}/ModelInfer",
                messages.ModelInferRequest.SerializeToString,
                messages.ModelInferResponse.FromString,
            )
            assert (await infer(message, metadata=(("traceparent", TRACEPARENT),), timeout=20)).model_version == "1"
        await server.stop(None)

    span = talk(story)["infer"]
    assert f"{span.context.trace_id:032x}" == TRACE
    assert attributes(span) == {"model": "affine", "version": 1, "protocol": "grpc"}


def test_every_step_of_a_refit(talk):
    weights = save(affine_weights(2.0))

    async def story(ask, _):
        status, staged = await ask("POST", REFIT + "/stage", weights)
        assert status == 201
        place = f"{REFIT}/staged/{staged['id']}"
        assert (await ask("POST", place + "/canary", json.dumps({"inputs": [TENSOR]}).encode()))[0] == 200
        assert (await ask("POST", place + "/commit"))[0] == 200
        assert (await ask("POST", REFIT + "/rollback"))[0] == 200

    spans = talk(story)
    stage, canary, commit, rollback = (spans[f"refit.{step}"] for step in ("stage", "canary", "commit", "rollback"))
    requests = (spans["POST stage"], spans["POST canary"], spans["POST commit"], spans["POST rollback"])
    for step, request in zip((stage, canary, commit, rollback), requests, strict=True):
        assert f"{step.context.trace_id:032x}" == TRACE
        assert step.parent.span_id == request.context.span_id, "work on another thread is a child of its request"
        assert f"{request.parent.span_id:016x}" == PARENT
        assert attributes(step)["model"] == "affine"
    identifier = attributes(stage)["id"]
    assert attributes(stage) == {
        "model": "affine", "bytes": len(weights), "id": identifier, "result": "staged", "changed": 2,
    }  # fmt: skip
    assert attributes(canary) == {"model": "affine", "id": identifier, "result": "passed"}
    assert attributes(commit) == {
        "model": "affine", "id": identifier, "result": "committed", "version": 2, "previous": 1,
    }  # fmt: skip
    assert attributes(rollback) == {"model": "affine", "result": "rolled_back", "version": 1, "previous": 2}


def test_a_rejected_refit(talk):
    async def story(ask, _):
        assert (await ask("POST", REFIT + "/stage", save({"w": np.zeros((4, 4), np.float32)})))[0] == 422

    span = talk(story)["refit.stage"]
    assert attributes(span)["result"] == "rejected"
    assert span.status.status_code.name == "ERROR"


def test_reading_is_not_traced(talk):
    async def story(ask, _):
        assert (await ask("GET", REFIT))[0] == 200

    assert not talk(story)
