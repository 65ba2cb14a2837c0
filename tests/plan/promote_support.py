"""An input, and where a weight came from."""

from __future__ import annotations

from onnx_refit.plan.compile import Compilation
from tests.plan.support import array

X = array(0, 3, 4)


def origin_of(compilation: Compilation, name: str) -> str:
    return next(s.origin for s in compilation.compiled.sources if s.spec.name == name)
