"""Maps between values that ONNX keeps in mapper operators: what a CategoryMapper or LabelEncoder knows, on the host.

A ``VocabularyMap`` is what is left of such an operator once it has left the graph: keys, values and the default for a
key it does not know. It is stored as JSON, in the plan and next to a prepared model.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from onnx_refit.errors import InputError, ModelError
from onnx_refit.files import atomic_write
from onnx_refit.tensors import Array, dtype_name, numpy_dtype

Scalar = str | int | float
"""A key or a value of a map."""

_FORMAT = "onnx-refit vocabulary map"
_VERSION = 1
_INTEGERS = frozenset({"int16", "int32", "int64"})
_FLOATS = frozenset({"float32", "float64"})
_DTYPES = frozenset({"string", *_INTEGERS, *_FLOATS})
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class VocabularyMap:
    """A host-side map from one tensor to another of the same shape, value by value.

    Attributes:
        input: the tensor it reads: a graph input of the user's model, or the output of an earlier map.
        output: the tensor it makes: a graph input of the prepared model (for a postprocessor: a graph output of the
            user's model, read from the prepared model's output ``input``).
        node: the node it was.
        op_type: the operator that node was.
        keys: what it knows, all different.
        values: what each key becomes, as many as there are keys.
        default: what any other key becomes.
        key_dtype: dtype of ``input``.
        value_dtype: dtype of ``output``.
    """

    input: str
    output: str
    node: str
    op_type: str
    keys: tuple[Scalar, ...]
    values: tuple[Scalar, ...]
    default: Scalar
    key_dtype: str
    value_dtype: str

    def __post_init__(self) -> None:
        for dtype in (self.key_dtype, self.value_dtype):
            if dtype not in _DTYPES:
                raise ModelError(f"a vocabulary map cannot hold {dtype}", where=self.node)
        if len(self.keys) != len(self.values):
            raise ModelError(f"{len(self.keys)} keys but {len(self.values)} values", where=self.node)
        _check_all(self.keys, self.key_dtype, "key", self.node)
        _check_all((*self.values, self.default), self.value_dtype, "value", self.node)
        if len(self._table) != len(self.keys):
            raise ModelError("a key is listed more than once", where=self.node)

    @cached_property
    def _table(self) -> dict[Scalar, Scalar]:
        keys = map(self._canonical, self.keys) if self.key_dtype in _FLOATS else self.keys
        return dict(zip(keys, self.values, strict=True))

    def _canonical(self, key: Scalar) -> Scalar:
        """The key as it is looked up: rounded to the dtype of the tensor; all NaNs are one key."""
        if self.key_dtype in _FLOATS:
            number = float(numpy_dtype(self.key_dtype).type(key))
            return "nan" if math.isnan(number) else number
        return key

    def __len__(self) -> int:
        return len(self.keys)

    def apply(self, array: Array) -> Array:
        """Map every element.

        Args:
            array: ``key_dtype``, any shape; strings as ``object``, ``str`` or UTF-8 ``bytes`` elements.

        Returns:
            ``value_dtype``, the same shape; strings as ``object``.

        Raises:
            InputError: the array has another dtype, or a string that is not text.
        """
        array = np.asarray(array)
        flat = self._elements(array)
        out = np.empty(len(flat), numpy_dtype(self.value_dtype))
        out[:] = list(map(self._table.get, flat, repeat(self.default)))
        return out.reshape(array.shape)

    def _elements(self, array: Array) -> Sequence[Scalar]:
        if self.key_dtype == "string":
            if array.dtype.kind not in "OUS":
                raise InputError(f"expected strings, got {array.dtype}", where=self.input)
            texts: list[Scalar] = array.ravel().tolist()
            if set(map(type, texts)) <= {str}:
                return texts
            return [_text(element, self.input) for element in texts]
        if array.dtype.kind in "OUS" or dtype_name(array.dtype) != self.key_dtype:
            raise InputError(f"expected {self.key_dtype}, got {array.dtype}", where=self.input)
        elements: list[Scalar] = array.ravel().tolist()
        if self.key_dtype in _FLOATS:
            return ["nan" if number != number else number for number in elements]
        return elements

    def to_json(self) -> str:
        """The map as JSON text, one line a field; ``from_json`` gives an equal map."""
        fields: dict[str, object] = {
            "format": _FORMAT,
            "version": _VERSION,
            "input": self.input,
            "output": self.output,
            "node": self.node,
            "op_type": self.op_type,
            "key_dtype": self.key_dtype,
            "value_dtype": self.value_dtype,
            "default": _encode(self.default),
            "keys": [_encode(key) for key in self.keys],
            "values": [_encode(value) for value in self.values],
        }
        lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> VocabularyMap:
        """Read what ``to_json`` wrote; ModelError for anything else."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ModelError(f"a vocabulary map is not valid JSON ({error})") from error
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ModelError("the JSON is not a vocabulary map")
        if data.get("version") != _VERSION:
            raise ModelError(f"the vocabulary map has format version {data.get('version')}, this library reads 1")
        try:
            value_dtype, key_dtype = str(data["value_dtype"]), str(data["key_dtype"])
            return cls(
                input=str(data["input"]),
                output=str(data["output"]),
                node=str(data["node"]),
                op_type=str(data["op_type"]),
                keys=_decode_all(data["keys"], key_dtype),
                values=_decode_all(data["values"], value_dtype),
                default=_decode(data["default"], value_dtype),
                key_dtype=key_dtype,
                value_dtype=value_dtype,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"the vocabulary map is not complete ({error!r})") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON atomically."""
        with atomic_write(Path(path)) as file:
            file.write(self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> VocabularyMap:
        """Read a file that ``save`` wrote; ModelError if it cannot be read or is something else."""
        try:
            return cls.from_json(Path(path).read_bytes())
        except OSError as error:
            raise ModelError(f"cannot be read: {error.strerror}", where=path) from error


def apply_maps(maps: Iterable[VocabularyMap], tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Apply maps in order to named tensors; those whose input is absent are skipped.

    Returns:
        All given tensors, and every map's output under its name. An output that was given is kept as given, so that a
        caller may hand in the mapped tensor itself.
    """
    result = dict(tensors)
    for one in maps:
        if one.input in result and one.output not in tensors:
            result[one.output] = one.apply(result[one.input])
    return result


def _text(element: object, where: str) -> str:
    if isinstance(element, str):
        return element
    if isinstance(element, bytes):
        try:
            return element.decode()
        except UnicodeDecodeError as error:
            raise InputError("a string is not valid UTF-8", where=where) from error
    raise InputError(f"expected strings, got an element of type {type(element).__name__}", where=where)


def _check_all(elements: Iterable[Scalar], dtype: str, what: str, node: str) -> None:
    elements = tuple(elements)
    kinds = set(map(type, elements))
    # Vocabularies have a hundred thousand entries: look at each only where not all are plainly right.
    if kinds <= {str} and dtype == "string":
        return
    if kinds == {int} and dtype in _INTEGERS and _within(min(elements), max(elements), dtype):
        return
    wanted: type | tuple[type, ...] = str if dtype == "string" else int if dtype in _INTEGERS else (int, float)
    for element in elements:
        if not isinstance(element, wanted) or isinstance(element, bool):
            raise ModelError(f"the {what} {element!r} is not {dtype}", where=node)
        if dtype in _INTEGERS and not _within(element, element, dtype):
            raise ModelError(f"the {what} {element!r} does not fit {dtype}", where=node)


def _within(least: Any, most: Any, dtype: str) -> bool:
    limits = np.iinfo(dtype)
    return bool(limits.min <= least and most <= limits.max)


def _encode(element: Scalar) -> Scalar:
    """JSON has no NaN and no infinities: they are strings where numbers are expected."""
    if isinstance(element, float) and not math.isfinite(element):
        return "nan" if math.isnan(element) else "inf" if element > 0 else "-inf"
    return element


def _decode_all(elements: list[Any], dtype: str) -> tuple[Scalar, ...]:
    if dtype in _FLOATS:
        return tuple(_decode(element, dtype) for element in elements)
    return tuple(elements)  # what is not as it should be is found when the map is made


def _decode(element: object, dtype: str) -> Scalar:
    if dtype == "string":
        if isinstance(element, str):
            return element
    elif dtype in _FLOATS:
        if isinstance(element, str) and element in _SPECIAL:
            return _SPECIAL[element]
        if isinstance(element, int | float):
            return float(element)
    elif isinstance(element, int):
        return element
    raise ValueError(f"{element!r} is not {dtype}")
