"""Errors of the server, and which status each error of the library becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onnx_refit.errors import (
    CanaryError,
    EngineError,
    InputError,
    OnnxRefitError,
    PlanError,
    RefitError,
    RefitRejectedError,
    StoreError,
    StoreLockedError,
    VersionError,
    WeightsError,
)
from onnx_refit.files import WriteError


class SettingsError(OnnxRefitError):
    """The settings contradict each other or are not safe."""


class ServeError(OnnxRefitError):
    """A request that the server refuses.

    Args:
        status: the HTTP status.
        message: what was wrong, a sentence without a final stop.
        hint: what the caller can do about it.
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(self, status: int, message: str, *, hint: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.retry_after = retry_after


class DeadlineError(ServeError):
    """The request's time was up before an answer was there."""

    def __init__(self, message: str = "the deadline passed before an answer was there") -> None:
        super().__init__(504, message)


class OverloadedError(ServeError):
    """The model's queue is full."""

    def __init__(self, waiting: int) -> None:
        super().__init__(
            429, f"too many requests: {waiting} are waiting already", hint="Try again in a moment", retry_after=1
        )


class DrainingError(ServeError):
    """The server is shutting down, or the model was taken offline."""

    def __init__(self, message: str) -> None:
        super().__init__(503, message, retry_after=5)


# The first class that fits decides, so the special ones stand before the general ones.
_STATUS: tuple[tuple[type[OnnxRefitError], int], ...] = (
    (InputError, 400),
    (VersionError, 404),
    (RefitRejectedError, 422),
    (CanaryError, 422),
    (RefitError, 409),
    (WeightsError, 422),
    (StoreLockedError, 503),
    (StoreError, 507),
    (WriteError, 507),
    (PlanError, 500),
)

# How ONNX Runtime says that the values of the inputs are at fault (onnxruntime/core/common/status.h, the code of a
# failed check), as with an index outside an embedding table.
_INPUTS_AT_FAULT = ("INVALID_ARGUMENT", "out of data bounds", "must be within the inclusive range")


@dataclass(frozen=True)
class Failure:
    """An error as a client sees it.

    Attributes:
        status: the HTTP status.
        body: the JSON object to answer with.
        retry_after: seconds after which trying again makes sense.
    """

    status: int
    body: dict[str, Any]
    retry_after: int | None = None


def status_of(error: BaseException) -> int:
    """The HTTP status that an error becomes; 500 for what no request should be able to cause."""
    if isinstance(error, ServeError):
        return error.status
    if isinstance(error, EngineError) and any(text in str(error) for text in _INPUTS_AT_FAULT):
        return 400
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def failure_of(error: BaseException) -> Failure:
    """An error as a client sees it; an unforeseen one is not described, the log has it."""
    status = status_of(error)
    body: dict[str, Any]
    body = {"error": str(error) if isinstance(error, OnnxRefitError) else "internal error; the server's log has it"}
    if isinstance(error, RefitRejectedError):
        body["report"] = error.report.to_json()  # type: ignore[attr-defined]
    return Failure(status, body, getattr(error, "retry_after", None))
