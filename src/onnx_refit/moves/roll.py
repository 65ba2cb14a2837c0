"""Many arrays asked at once whether they are what they should be, and read a little of each.

Asked one by one through the interpreter, each of hundreds of small tensors costs more than the copy of it.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_refit.moves.library import Absent, Library

Values: TypeAlias = npt.NDArray[Any]
Form: TypeAlias = tuple[str, np.dtype[Any], tuple[int, ...]]
"""Name, dtype and shape of an array."""


class Called(dict[str, Values]):
    """Arrays by name, and where the elements of each begin.

    Attributes:
        addresses: in the order of the roll; None where they are not known, or some arrays were left out.
    """

    addresses: array[int] | None = None


class Roll:
    """The arrays that are to be given, and what they have to be: NumPy's own, of these forms, C-contiguous.

    Args:
        forms: what each has to be.
        library: the native code, or why there is none.

    Attributes:
        names: theirs, in order.
        native: the native code, where it reads arrays as they are here.
    """

    def __init__(self, forms: Sequence[Form], library: Library | Absent) -> None:
        self._forms = tuple(forms)
        self.names = [name for name, _, _ in forms]
        self.places = {name: place for place, name in enumerate(self.names)}
        self.native: Library | None = None
        if isinstance(library, Library) and _agrees(library):
            self.native = library
            self._table = _Table(self._forms)

    def call(self, values: Mapping[str, object]) -> Called | None:
        """These arrays, in the roll's order, if they are exactly what they have to be."""
        if len(values) != len(self.names):
            return None
        objects: list[Any] = list(values.values())
        if list(values) != self.names:
            objects = [values.get(name) for name in self.names]
        found = Called(zip(self.names, objects, strict=True))
        if self.native is None:
            return found if all(map(_is, objects, self._forms)) else None
        addresses = self._table.call(self.native, objects)
        if addresses is None:
            # Another object of an equal dtype, perhaps.
            return found if all(map(_is, objects, self._forms)) else None
        found.addresses = addresses
        return found


def _is(value: object, form: Form) -> bool:
    """Whether a value is an array of this form."""
    _, dtype, shape = form
    return (
        type(value) is np.ndarray
        and (value.dtype is dtype or value.dtype == dtype)
        and value.shape == shape
        and value.flags.c_contiguous
    )


class _Table:
    """Forms as native code reads them."""

    def __init__(self, forms: Sequence[Form]) -> None:
        self._dtypes = [dtype for _, dtype, _ in forms]  # their addresses are in the table
        rows: list[int] = []
        extents: list[int] = []
        for dtype, (_, _, shape) in zip(self._dtypes, forms, strict=True):
            rows += [id(dtype), len(shape), len(extents)]
            extents += shape
        self._rows, self._extents = array("q", rows), array("q", extents or [0])
        self._places = self._rows.buffer_info()[0], self._extents.buffer_info()[0]

    def call(self, library: Library, objects: list[Any]) -> array[int] | None:
        """Where their elements are, or None. The caller's list keeps the objects alive, and nobody else runs."""
        count = len(objects)
        identities = array("Q", map(id, objects))
        addresses = array("Q", identities)
        places = identities.buffer_info()[0], addresses.buffer_info()[0]
        done = library.call(places[0], count, id(np.ndarray), *self._places, places[1])
        return addresses if done == count else None


@dataclass(frozen=True)
class Joined:
    """Some arrays of a roll, to be joined again and again.

    Args:
        roll: the roll.
        names: which of them, in the order wanted.
    """

    roll: Roll
    names: Sequence[str]

    @cached_property
    def _tables(self) -> tuple[array[int], array[int]]:
        forms = [self.roll._forms[self.roll.places[name]] for name in self.names]
        sizes = [int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for _, dtype, shape in forms]
        return array("q", [self.roll.places[name] for name in self.names]), array("q", sizes)

    def into(self, addresses: array[int], target: int) -> bool:
        """Copy their elements, float32 all, to this address, one array's behind the other's; whether all are finite."""
        places, sizes = self._tables
        assert self.roll.native is not None
        where = addresses.buffer_info()[0], places.buffer_info()[0], sizes.buffer_info()[0]
        return not self.roll.native.join(*where, len(places), target)


class Parts(Mapping[str, bytes]):
    """Bytes by name, cut out of those of all when they are asked for.

    Args:
        whole: all of them.
        parts: where each name's are.
    """

    __slots__ = ("parts", "whole")

    def __init__(self, whole: bytes, parts: Mapping[str, slice]) -> None:
        self.whole, self.parts = whole, parts

    def __getitem__(self, name: str) -> bytes:
        return self.whole[self.parts[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def alike(self, other: Mapping[str, bytes]) -> list[str]:
        """The names whose bytes are the same."""
        one = self.whole
        if isinstance(other, Parts) and other.parts is self.parts:
            two = other.whole
            return [name for name, part in self.parts.items() if one[part] == two[part]]
        return [name for name, part in self.parts.items() if one[part] == other.get(name)]


@dataclass(frozen=True)
class Sampled:
    """A few elements of some arrays of a roll, to be read again and again.

    Args:
        roll: the roll.
        positions: name -> flat positions.
    """

    roll: Roll
    positions: Mapping[str, npt.NDArray[np.int64]]

    @cached_property
    def _tables(self) -> tuple[tuple[array[int], ...], tuple[int, ...], Mapping[str, slice], bytes]:
        places, sizes, starts, ends, parts, end = [], [], [], [], {}, 0
        for name, positions in self.positions.items():
            _, dtype, _ = self.roll._forms[self.roll.places[name]]
            places.append(self.roll.places[name])
            sizes.append(dtype.itemsize)
            starts += (positions * dtype.itemsize).tolist()
            ends.append(len(starts))
            parts[name] = slice(end, end + positions.size * dtype.itemsize)
            end = parts[name].stop
        tables = tuple(array("q", table or [0]) for table in (places, sizes, starts, ends))
        return tables, tuple(table.buffer_info()[0] for table in tables), parts, bytes(end)

    def take(self, addresses: array[int]) -> Parts:
        """The elements of each, as bytes."""
        _, tables, parts, room = self._tables
        assert self.roll.native is not None
        memory = array("B", room)
        self.roll.native.sample(addresses.buffer_info()[0], *tables, len(parts), memory.buffer_info()[0])
        return Parts(memory.tobytes(), parts)


class Sight:
    """Everything that a refit of a whole roll asks of its arrays, in one call.

    Args:
        roll: the roll; native code must read its arrays.
        names: those that are joined, float32 all, in the order wanted.
        positions: name -> flat positions of a few elements, the samples; of every array.

    Attributes:
        parts: name -> where its samples are among those of all.
    """

    def __init__(self, roll: Roll, names: Sequence[str], positions: Mapping[str, npt.NDArray[np.int64]]) -> None:
        assert roll.native is not None
        self._see = roll.native.see
        joined, sizes = Joined(roll, names)._tables
        tables, sampled, self.parts, self._room = Sampled(roll, positions)._tables
        self._held = roll, joined, sizes, tables
        table = roll._table
        forms = len(roll.names), id(np.ndarray), *table._places
        joins = joined.buffer_info()[0], sizes.buffer_info()[0], len(names)
        self._sight = array("Q", (*forms, *joins, *sampled, len(self.parts)))
        self._address = self._sight.buffer_info()[0]

    def see(self, objects: list[Any], target: int, before: int) -> tuple[array[int], array[int], int] | None:
        """The addresses and the samples of all arrays, if these are they, all joined ones finite, and none as before.

        And the address of the samples.

        Args:
            objects: the arrays, in the roll's order, and as many; the caller's list keeps them alive.
            target: the address where to join.
            before: the address of the samples of those before.
        """
        addresses, taken = array("Q", map(id, objects)), array("B", self._room)
        place = taken.buffer_info()[0]
        if self._see(self._address, addresses.buffer_info()[0], target, place, before):
            return None
        return addresses, taken, place


def _agrees(library: Library) -> bool:
    """Whether native code sees in arrays what Python does, here and now."""
    if sys.implementation.name != "cpython" or object.__basicsize__ != 16 or np.dtype(np.intp).itemsize != 8:
        return False
    whole = np.arange(24.0)
    fixed = np.frombuffer(b"some bytes that nobody writes to", np.uint8)
    tried: list[Any] = [whole, whole[4:], whole.reshape(2, 3, 4), np.zeros((0, 3), np.int64), fixed, np.array(1, "f4")]
    forms = [("", one.dtype, one.shape) for one in tried]
    found = _Table(forms).call(library, tried)
    if found is None or list(found) != [one.__array_interface__["data"][0] for one in tried]:
        return False
    others: list[Callable[[Any], object]] = [
        lambda one: one.astype("c16"),
        lambda one: one[None],
        lambda one: np.repeat(one.reshape(-1), 2)[::2] if one.size > 1 else None,
        lambda one: one.view(np.matrix) if one.ndim == 2 else None,
        lambda one: one.tolist(),
    ]
    table = [_Table([form]) for form in forms]
    return all(
        table[k].call(library, [value]) is None
        for k, one in enumerate(tried)
        for value in (other(one) for other in others)
        if value is not None
    )
