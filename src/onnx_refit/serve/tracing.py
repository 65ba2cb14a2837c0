"""OpenTelemetry traces, if its API is installed; nothing otherwise.

Spans go to whatever exporter the process has configured (``OTEL_*`` variables and ``opentelemetry-instrument``); a
``traceparent`` header of the client becomes their parent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

try:
    from opentelemetry import propagate, trace
except ImportError:
    trace = None

SetAttribute = Callable[[str, Any], None]


def _ignore(name: str, value: object) -> None:
    """Set no attribute."""


@contextlib.contextmanager
def span(name: str, scope: MutableMapping[str, Any], **attributes: object) -> Iterator[SetAttribute]:
    """Trace a block; yields a function that sets an attribute of the span."""
    # Without a provider spans go nowhere, and making them would cost as much as decoding the request.
    if trace is None or isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        yield _ignore
        return
    carrier = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
    tracer = trace.get_tracer("onnx_refit")
    named = {f"onnx_refit.{key}": value for key, value in attributes.items()}
    with tracer.start_as_current_span(
        name, propagate.extract(carrier), kind=trace.SpanKind.SERVER, attributes=named
    ) as current:
        yield current.set_attribute
