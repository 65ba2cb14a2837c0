"""Which TensorRT there is: found at run time, never imported before it is asked for."""

from __future__ import annotations

import importlib
import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

from onnx_refit.errors import EngineError, MissingExtraError

PACKAGES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
"""Modules that offer TensorRT's Python API, the fullest first."""

# TensorRT's names of the dtypes that it has, by ours.
_DATA_TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "float8e4m3fn": "FP8",
    "int8": "INT8",
    "int4": "INT4",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
    "uint8": "UINT8",
}

_log = logging.getLogger("onnx_refit.tensorrt")
_log.addHandler(logging.NullHandler())  # silent unless the application wants it


@dataclass(frozen=True)
class Bindings:
    """TensorRT's Python bindings, as found.

    Attributes:
        module: the module; everything of TensorRT is reached through it.
        name: the module's name.
        version: its version, ``"11.3.0.99"``.
    """

    module: Any
    name: str
    version: str

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT-RTX."""
        return "rtx" in self.name

    @property
    def major(self) -> int:
        """The first number of the version."""
        head = self.version.split(".")[0]
        return int(head) if head.isdecimal() else 0

    @property
    def label(self) -> str:
        """Name and version for people and for plans; the two import names of RTX are one package."""
        return f"{'tensorrt_rtx' if self.is_rtx else 'tensorrt'} {self.version}"

    def has(self, *path: str) -> bool:
        """Whether the bindings have this attribute, ``has("BuilderFlag", "REFIT_INDIVIDUAL")``."""
        value = self.module
        for step in path:
            value = getattr(value, step, None)
            if value is None:
                return False
        return True

    def data_type(self, dtype: str, where: str | None = None) -> Any:
        """TensorRT's ``DataType`` of a dtype; EngineError for one it lacks (float64, strings, ...)."""
        name = _DATA_TYPES.get(dtype)
        if name is None or not self.has("DataType", name):
            raise EngineError(f"{self.label} has no tensors of {dtype}", where=where)
        return getattr(self.module.DataType, name)

    def logger(self) -> Any:
        """A logger of TensorRT's own type that also keeps the last messages; see ``last_errors``."""
        return _logger_class(self.module)()


def find_bindings(package: str | None = None) -> Bindings:
    """The TensorRT bindings of this environment.

    Args:
        package: the one module to take; None takes the first of ``PACKAGES`` that can be imported.

    Raises:
        MissingExtraError: none is installed.
        EngineError: one is installed but cannot be loaded (a library it needs is missing).
    """
    broken: list[str] = []
    for name in PACKAGES if package is None else (package,):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError) as error:
            broken.append(f"{name}: {error}")
            continue
        return Bindings(module, name, str(getattr(module, "__version__", "0")))
    if broken:
        raise EngineError("TensorRT is installed but cannot be loaded", hint="; ".join(broken))
    raise MissingExtraError(package or "tensorrt", "tensorrt", "the engine 'tensorrt'")


_classes: dict[int, type] = {}
_classes_lock = threading.Lock()


def _logger_class(module: Any) -> type:
    with _classes_lock:
        found = _classes.get(id(module))
        if found is None:
            found = _classes[id(module)] = _make_logger_class(module)
        return found


def _make_logger_class(module: Any) -> type:
    severity = module.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
        severity.VERBOSE: logging.DEBUG,
    }

    class KeepingLogger(module.ILogger):  # type: ignore[misc]
        """Hands TensorRT's messages to Python's logging, and keeps the last errors for exceptions."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=8)

        def log(self, level: Any, message: str) -> None:
            """Take one message; TensorRT calls this from its own threads."""
            wanted = levels.get(level, logging.DEBUG)
            if wanted >= logging.ERROR:
                # An exception carries these; whoever catches it decides whether they are worth a line in a log.
                self.errors.append(" ".join(message.split()))
                wanted = logging.DEBUG
            _log.log(wanted, "%s", message)

    return KeepingLogger


def last_errors(logger: Any) -> str:
    """TensorRT's own words about what just went wrong, and forget them."""
    words = "; ".join(logger.errors)
    logger.errors.clear()
    return words or "TensorRT gave no reason"
