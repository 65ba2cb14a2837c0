"""The kernels that TensorRT-RTX compiles where it runs, kept in a file for the next process. **Not run** on a GPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from onnx_refit.engine.tensorrt.bindings import Bindings
from onnx_refit.files import WriteError, write_bytes

_log = logging.getLogger("onnx_refit.tensorrt")


class RuntimeCache:
    """One engine's runtime configuration with its cache; full TensorRT has none, and then this does nothing.

    Args:
        bindings: TensorRT.
        engine: the device engine.
        path: the file; None keeps no cache. A file of another GPU or version is not used (TensorRT-RTX checks it).
    """

    def __init__(self, bindings: Bindings, engine: Any, path: Path | None) -> None:
        self._path = path
        self.config: Any = None
        self._cache: Any = None
        if path is None or not bindings.has("IRuntimeConfig", "create_runtime_cache"):
            return
        self.config = engine.create_runtime_config()
        self._cache = self.config.create_runtime_cache()
        if path.exists() and not self._cache.deserialize(path.read_bytes()):
            _log.info("the kernels in %s belong to another GPU or version; they are compiled anew", path)
        self.config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the kernels compiled so far; a cache that cannot be written is no failure."""
        if self._cache is None or self._path is None:
            return
        data = self._cache.serialize()
        if data is None:
            return
        try:
            write_bytes(self._path, bytes(data))
        except WriteError as error:
            _log.warning("the compiled kernels were not kept: %s", error)
