"""OpenTelemetry traces, if its API is installed; nothing otherwise.

Spans go to whatever exporter the process has configured (``OTEL_*`` variables and ``opentelemetry-instrument``). A
request's span is the child of the client's ``traceparent``; what a refit does on other threads is a child of its
request's span.
"""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

try:
    from opentelemetry import propagate, trace
except ImportError:
    trace = None

Result = TypeVar("Result")
# The API looks into the environment each time it is asked for its provider.
_ASK_SECONDS = 0.5
SetAttribute = Callable[[str, Any], None]
"""Sets an attribute of a span: a name within ``onnx_refit.``, and a string, number or boolean."""


def _ignore(name: str, value: object) -> None:
    """Set no attribute."""


class _Watch:
    """Whether spans go anywhere, asked again now and then: a provider is set once, at any time."""

    def __init__(self) -> None:
        self._yes = False
        self._again = 0.0

    def __call__(self) -> bool:
        if self._yes or trace is None:
            return self._yes
        now = time.monotonic()
        if now >= self._again:
            self._again = now + _ASK_SECONDS
            self._yes = not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
        return self._yes


tracing = _Watch()
"""Whether spans go anywhere; without a provider, making them would cost as much as decoding a request."""


@contextlib.contextmanager
def request_span(name: str, carrier: Mapping[str, str], **attributes: object) -> Iterator[SetAttribute]:
    """Trace the answering of a request.

    Args:
        name: of the span.
        carrier: the request's headers or metadata by lower-case name; they may name a parent.
        attributes: of the span.
    """
    if not tracing():
        yield _ignore
        return
    with _started(name, attributes, context=propagate.extract(carrier), kind=trace.SpanKind.SERVER) as setter:
        yield setter


@contextlib.contextmanager
def work_span(name: str, **attributes: object) -> Iterator[SetAttribute]:
    """Trace a piece of work within a request."""
    if not tracing():
        yield _ignore
        return
    with _started(name, attributes) as setter:
        yield setter


@contextlib.contextmanager
def _started(name: str, attributes: Mapping[str, object], **options: Any) -> Iterator[SetAttribute]:
    named = {f"onnx_refit.{key}": value for key, value in attributes.items()}
    with trace.get_tracer("onnx_refit").start_as_current_span(name, attributes=named, **options) as current:
        yield lambda key, value: current.set_attribute(f"onnx_refit.{key}", value)


def in_context(work: Callable[[], Result]) -> Callable[[], Result]:
    """The same work, for another thread: its spans are children of the current one."""
    return partial(contextvars.copy_context().run, work) if tracing() else work


def text_headers(headers: Mapping[bytes, bytes]) -> dict[str, str]:
    """HTTP headers as a carrier."""
    return {key.decode("latin-1"): value.decode("latin-1") for key, value in headers.items()} if tracing() else {}
