"""Tensors bound to an engine: looked at once, for refit after refit from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onnx_refit.refit.check import CheckOptions


class BoundWeights(Mapping[str, object]):
    """What ``Engine.bind`` gives, and ``Engine.refit`` takes: the tensors, and what is known of them.

    Their values may change between refits, and are read at each. Where their addresses, dtypes, shapes or orders of
    elements change, the refit looks at them anew. Their memory is kept as long as this lives. Another engine takes it
    as the mapping it was made of.

    Attributes:
        source: what it was made of.
        known: what the engine knows of the tensors.
        tensors: those that weights are made of.
        owner: who knows it.

    Args:
        values: name -> tensor.
        source: see above.
        known: see above.
        tensors: see above.
        owner: see above.
    """

    def __init__(
        self, values: Mapping[str, object], source: Any, known: Any, tensors: Sequence[object], owner: object
    ) -> None:
        self._values = values
        self.source = source
        self.known = known
        self.tensors = tensors
        self.owner = owner

    def __getitem__(self, name: str) -> object:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"<BoundWeights of {len(self.known.names)} weights>"


def unbound(source: Any, options: CheckOptions | None) -> tuple[Any, CheckOptions]:
    """What was bound, or the source as it is; and how strict its check is to be."""
    if not isinstance(source, BoundWeights):
        return source, options or CheckOptions()
    return source.source, options or source.known.options
