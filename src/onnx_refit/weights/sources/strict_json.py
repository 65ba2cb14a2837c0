"""JSON as a checkpoint may hold it: bounded, without repeated keys, without NaN."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnx_refit.errors import WeightsFormatError
from onnx_refit.weights.sources.mapped import unreadable

MAX_JSON_BYTES = 100_000_000
"""The longest header or index that is read (the limit of the safetensors format)."""


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} occurs twice")
            seen.add(key)
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def parse_object(data: bytes, *, what: str, where: object) -> dict[str, Any]:
    """Parse a JSON object strictly.

    Args:
        data: UTF-8 text.
        what: what it is, for messages ("the header").
        where: where it is, for messages.

    Raises:
        WeightsFormatError: it is no JSON object, repeats a key, or nests too deep.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_repeats, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "it nests too deep" if isinstance(error, RecursionError) else str(error)
        raise WeightsFormatError(f"{what} is no valid JSON: {reason}", where=where) from error
    if not isinstance(value, dict):
        raise WeightsFormatError(f"{what} is no JSON object", where=where)
    return value


def read_object(path: Path, *, what: str) -> dict[str, Any]:
    """Read a small JSON file strictly; WeightsError if it cannot be read, WeightsFormatError if it is no object."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(data) > MAX_JSON_BYTES:
        raise WeightsFormatError(f"{what} is longer than {MAX_JSON_BYTES} bytes", where=path)
    return parse_object(data, what=what, where=path)
