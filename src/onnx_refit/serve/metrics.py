"""What the server counts and times, in Prometheus' form and by its naming conventions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnx_refit.errors import MissingExtraError

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
except ImportError as error:
    raise MissingExtraError("prometheus-client", "serve", "the server") from error

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LONG_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Any:
            return Counter(f"onnx_refit_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Any:
            return Histogram(f"onnx_refit_{name}", text, labels, registry=registry, buckets=buckets)

        def gauge(name: str, text: str, *labels: str) -> Any:
            return Gauge(f"onnx_refit_{name}", text, labels, registry=registry)

        self.requests = counter("requests_total", "Inference requests.", "model", "protocol", "code")
        self.request_seconds = histogram(
            "request_duration_seconds", "From the whole request to the whole answer.", _SECONDS, "model", "protocol"
        )
        self.queue_seconds = histogram("queue_duration_seconds", "Time in the queue.", _SECONDS, "model")
        self.inference_seconds = histogram("inference_duration_seconds", "Time in the engine.", _SECONDS, "model")
        self.batch_rows = histogram("batch_rows", "Rows of an inference.", _ROWS, "model")
        self.answers = counter("answers_total", "Inferences answered by a version.", "model", "version")
        self.queue_depth = gauge("queue_depth", "Requests that wait.", "model")
        self.running = gauge("running_inferences", "Inferences that run.", "model")
        self.version = gauge("version", "The version that answers now.", "model")
        self.weight_bytes = gauge("weight_bytes", "Bytes of the refittable weights.", "model")
        self.staged = gauge("staged", "Weight sets that are staged.", "model")
        self.refits = counter("refits_total", "Refits by how they ended.", "model", "result")
        self.refit_seconds = histogram(
            "refit_stage_duration_seconds", "Stages of a refit: open, check, ...", _LONG_SECONDS, "model", "stage"
        )
        self.upload_bytes = counter("upload_bytes_total", "Bytes of weights received.", "model")
        self.canaries = counter("canaries_total", "Canary inferences by result.", "model", "result")
        self.canary_seconds = histogram("canary_duration_seconds", "Canary inferences.", _SECONDS, "model")
        self.http = counter("http_requests_total", "HTTP requests by method and status.", "method", "code")
        self.ready = gauge("ready", "1 while the server takes requests.")

    def watch(self, model: str, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Read the queue of a model whenever metrics are asked for."""
        self.queue_depth.labels(model).set_function(waiting)
        self.running.labels(model).set_function(running)

    def forget_versions(self, model: str, held: set[str]) -> None:
        """Drop the series of versions that can answer no more, so that their number stays bounded."""
        for sample in next(iter(self.answers.collect())).samples:
            labels = sample.labels
            if sample.name.endswith("_total") and labels["model"] == model and labels["version"] not in held:
                self.answers.remove(model, labels["version"])

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        rendered: bytes = generate_latest(self.registry)
        return rendered
