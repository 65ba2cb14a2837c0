"""Read a model file without its large tensors: they stay in the file, as external data of the model file itself.

A protobuf library reads a message whole. Here the file is mapped, its wire format is walked, and the bytes of large
tensors are stepped over: what is parsed is the graph, so that passes may copy it as often as they like. A tensor that
was left in the file is marked as ONNX marks external data (``data_location``, with location, offset and length), and
is read, or mapped, like any other.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, StringStringEntryProto, TensorProto

from onnx_refit.errors import ModelError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}


def read_detached(path: Path, smallest: int = 1 << 16) -> ModelProto:
    """A model whose initializers and Constant nodes of ``smallest`` bytes or more are external data of its own file.

    Args:
        path: the model file. It must stay as it is for as long as its tensors are read.
        smallest: tensors with fewer bytes are read into the model.

    Raises:
        ModelError: the file cannot be read, or is no ONNX model.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            bare = _Walker(data, path.name, smallest).model()
    except ValueError as error:  # mmap of an empty file
        raise ModelError("the file is empty", where=path) from error
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=path) from error
    except _DamagedError as error:
        raise ModelError("not an ONNX model, or a damaged one", where=path) from error
    model = ModelProto()
    try:
        model.ParseFromString(bare)
    except DecodeError as error:
        raise ModelError("not an ONNX model, or a damaged one", where=path) from error
    return model


class _DamagedError(Exception):
    """The bytes are no protobuf message."""


Rewrite = Callable[[int, int], bytes]
"""Rewrites the message between two positions of the file."""


class _Walker:
    """Walks a protobuf message in a mapped file and rebuilds it without large tensors."""

    def __init__(self, data: mmap.mmap, location: str, smallest: int) -> None:
        self.data = data
        self.location = location
        self.smallest = smallest

    def model(self) -> bytes:
        return self.rebuilt(0, len(self.data), {ModelProto.GRAPH_FIELD_NUMBER: self.graph})

    def graph(self, start: int, end: int) -> bytes:
        rewrites: dict[int, Rewrite] = {
            GraphProto.NODE_FIELD_NUMBER: self.node,
            GraphProto.INITIALIZER_FIELD_NUMBER: self.tensor,
        }
        return self.rebuilt(start, end, rewrites)

    def node(self, start: int, end: int) -> bytes:
        operator = b""
        for number, _, first, last in self.fields(start, end):
            if number == NodeProto.OP_TYPE_FIELD_NUMBER:
                operator = self.data[first:last]
        attribute = self.constant if operator == b"Constant" else self.graphs
        return self.rebuilt(start, end, {NodeProto.ATTRIBUTE_FIELD_NUMBER: attribute})

    def constant(self, start: int, end: int) -> bytes:
        return self.rebuilt(start, end, {AttributeProto.T_FIELD_NUMBER: self.tensor})

    def graphs(self, start: int, end: int) -> bytes:
        rewrites: dict[int, Rewrite] = {
            AttributeProto.G_FIELD_NUMBER: self.graph,
            AttributeProto.GRAPHS_FIELD_NUMBER: self.graph,
        }
        return self.rebuilt(start, end, rewrites)

    def tensor(self, start: int, end: int) -> bytes:
        parts, raw = [], None
        for number, tag, first, last in self.fields(start, end):
            if number == TensorProto.RAW_DATA_FIELD_NUMBER:
                raw = (first, last)
            else:
                parts.append(self.data[tag:last])
        if raw is None or raw[1] - raw[0] < self.smallest:
            return self.data[start:end]
        outside = TensorProto(data_location=TensorProto.EXTERNAL)
        entries = {"location": self.location, "offset": str(raw[0]), "length": str(raw[1] - raw[0])}
        outside.external_data.extend(StringStringEntryProto(key=key, value=text) for key, text in entries.items())
        return b"".join([*parts, outside.SerializeToString()])

    def rebuilt(self, start: int, end: int, rewrites: dict[int, Rewrite]) -> bytes:
        """The message with the sub-messages of some fields rewritten, where they are large enough to matter."""
        parts, copied = [], start
        for number, tag, first, last in self.fields(start, end):
            rewrite = rewrites.get(number)
            if rewrite is None or last - first < self.smallest:
                continue
            inner = rewrite(first, last)
            parts += [self.data[copied:tag], _varint(number << 3 | _BYTES), _varint(len(inner)), inner]
            copied = last
        return b"".join([*parts, self.data[copied:end]])

    def fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Number, start of the tag, start and end of the value of each field of a message."""
        position = start
        while position < end:
            tag = position
            key, position = self.varint(position, end)
            number, kind = key >> 3, key & 7
            first = position
            if kind == _VARINT:
                _, position = self.varint(position, end)
            elif kind == _BYTES:
                length, first = self.varint(position, end)
                position = first + length
            elif kind in _FIXED:
                position += _FIXED[kind]
            else:
                raise _DamagedError
            if position > end or not number:
                raise _DamagedError
            yield number, tag, first, position

    def varint(self, position: int, end: int) -> tuple[int, int]:
        """A number of variable length and the position behind it."""
        value = shift = 0
        while position < end and shift < 70:
            byte = self.data[position]
            value |= (byte & 0x7F) << shift
            position, shift = position + 1, shift + 7
            if byte < 0x80:
                return value, position
        raise _DamagedError


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
