"""Memory of one case, in a process of its own: ``python -m benchmarks.memory MODEL.onnx`` prints JSON."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import resource
import sys
import threading
import time
from pathlib import Path

import numpy as np

import onnx_refit
from benchmarks.growth import chain


def resident() -> int:
    """Bytes resident now that are not shared with files (Linux)."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss")
    )
    return int(fields["RssAnon"].split()[0]) * 1024


def peak() -> int:
    """Largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def settled() -> int:
    """As ``resident``, once what is free was given back.

    The engine keeps spare buffers three seconds for a next refit; the C library keeps what the caller's own arrays
    took and do not take any more.
    """
    gc.collect()
    time.sleep(4)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident()


class Watch:
    """The largest anonymous resident size while a block runs, looked at every millisecond."""

    def __enter__(self) -> Watch:
        self.start = self.largest = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self.largest = max(self.largest, resident())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def main(path: str) -> None:
    """Build, load from the file, refit twice, and print what each took."""
    target = Path(path).with_suffix(".plan")
    # What is imported only when it is used is no memory of the model.
    with onnx_refit.load(onnx_refit.build(chain(1, 16, 16))):
        pass
    gc.collect()
    with Watch() as build:
        plan = onnx_refit.build(path)
        plan.save(target)
    weights = plan.weight_bytes
    del plan
    before = settled()
    with onnx_refit.load(target) as engine:
        engine.full_speed.wait()
        one = settled() - before
        for factor in (1.5, 0.75):
            given = {name: np.array(engine.weights().read(name)) for name in engine.refittable}
            for array in given.values():
                array *= array.dtype.type(factor)
            engine.refit(given).full_speed.wait()
            del given, array
            gc.collect()
        two = settled() - before
    figures = {
        "weight_bytes": weights,
        "build_peak_over_weights": (build.largest - build.start) / weights,
        "one_version_over_weights": one / weights,
        "two_versions_over_weights": two / weights,
    }
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
