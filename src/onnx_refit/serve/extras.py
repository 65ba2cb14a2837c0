"""Whether what the server needs is installed."""

from __future__ import annotations

import importlib

from onnx_refit.errors import MissingExtraError

_NEEDED = {
    "starlette": "starlette",
    "uvicorn": "uvicorn",
    "httptools": "httptools",
    "orjson": "orjson",
    "grpc": "grpcio",
    "prometheus_client": "prometheus-client",
}


def require_serve() -> None:
    """MissingExtraError for the first package of the extra ``serve`` that is not installed."""
    for module, package in _NEEDED.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise MissingExtraError(package, "serve", "the server") from error
