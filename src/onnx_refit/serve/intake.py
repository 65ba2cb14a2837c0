"""What the verbs that bring weights in have in common: how they may be described, and the way from bytes to staged."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from functools import partial

from starlette.responses import Response

from onnx_refit.errors import InputError
from onnx_refit.serve.context import Context
from onnx_refit.serve.json_response import JsonResponse
from onnx_refit.serve.model import ServedModel
from onnx_refit.serve.spool import Upload
from onnx_refit.serve.staging import StageOptions

FLAGS = ("partial", "allow_nonfinite", "allow_rounding", "measure")
"""The fields of ``StageOptions``, as clients say them."""

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_LABEL = re.compile(r"[\w .,:+@=/-]{1,120}")

Receive = Callable[[Callable[[int], None]], Awaitable[Upload]]
"""Brings the bytes into the spool; called with what is to be told how many there are so far."""


async def receive_and_stage(
    context: Context, model: ServedModel, receive: Receive, options: StageOptions, label: str, total: int | None
) -> Response:
    """Receive weights, stage them, and say what became of it.

    Args:
        context: the server's.
        model: whose weights they are.
        receive: see ``Receive``.
        options: how strict the check is.
        label: what the version is to be called.
        total: how many bytes there will be, if that is known.

    Raises:
        ServeError, WriteError: they could not be received; see ``Spool``.
        WeightsError, RefitRejectedError, EngineError: see ``RefitDesk.stage``.
    """
    upload = await receive(lambda done: model.events.publish("upload", label=label, bytes=done, total=total))
    try:
        context.metrics.upload_bytes.labels(model.name).inc(upload.nbytes)
        account, fresh = await context.staging(partial(model.desk.stage, upload, options, label))
    finally:
        context.spool.remove(upload)
    return JsonResponse(account, 201 if fresh else 200)


def parse_label(value: object) -> str:
    """A label; InputError if it cannot stand in a log line."""
    if not isinstance(value, str) or not _LABEL.fullmatch(value):
        raise InputError("the label may hold up to 120 letters, digits, spaces and . , : + @ = / - _")
    return value


def parse_sha256(value: object, name: str) -> str | None:
    """A sha256 in hex, None where there is none; InputError, which calls it by its name, if it is no such thing."""
    if value is None:
        return None
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise InputError(f"{name} is no sha256 in hex")
    return value
