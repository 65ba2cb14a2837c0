"""Finding the weights that a refit gives but does not change, without reading much of those that it does."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice

import numpy as np
import numpy.typing as npt

from onnx_refit.moves.roll import Called, Parts, Sampled, Sight
from onnx_refit.refit.packet import Packet
from onnx_refit.tensors import Array, TensorSpec
from onnx_refit.weights.scan import same_bits

_SAMPLES = 8  # each of them is read from cold memory
_FEW = 8  # of a small weight


@dataclass(frozen=True)
class Samples:
    """A few elements of every weight of a version: where they differ, the weights differ.

    Attributes:
        small: those of the packet's weights, as bits: uint32 ``[weights, 8]``.
        others: weight -> its elements as bytes.
    """

    small: npt.NDArray[np.uint32]
    others: Mapping[str, bytes]


@lru_cache(maxsize=4096)
def _positions(size: int) -> npt.NDArray[np.int64]:
    """Up to 8 positions spread over a tensor, the same for every tensor of a size."""
    if size <= _SAMPLES:
        return np.arange(size)
    return np.random.default_rng(size).integers(0, size, _SAMPLES)


class Sampler:
    """Takes samples.

    Args:
        packet: the weights that are looked at together.
        specs: all weights there are.
    """

    def __init__(self, packet: Packet, specs: Mapping[str, TensorSpec]) -> None:
        self._packet, self._specs = packet, specs
        self._rows = {name: row for row, name in enumerate(packet.names)}
        self._names = packet.names
        self._positions = packet.positions(_FEW)
        self._begins = self._positions - self._positions  # filled below: where each weight begins in the packet
        for row, name in enumerate(packet.names):
            self._begins[row] = packet.range(frozenset({name}))[0]
        self._native: Sampled | None = None
        if packet.roll is not None and packet.roll.native is not None:
            others = {name: _positions(spec.size) for name, spec in specs.items() if name not in self._rows}
            self._native = Sampled(packet.roll, others)

    def take(self, arrays: Mapping[str, Array], joined: Array | None, before: Samples | None) -> Samples:
        """Samples of a whole version.

        Args:
            arrays: the weights given, C-contiguous; all of them if nothing was before.
            joined: the packet's weights, where all of them are given.
            before: of the version that gives the others.
        """
        if joined is not None and self._native is not None and isinstance(arrays, Called) and arrays.addresses:
            return Samples(joined.view(np.uint32).take(self._positions), self._native.take(arrays.addresses))
        others = {} if before is None else dict(before.others)
        if joined is not None:
            small = joined.view(np.uint32).take(self._positions)
            for name, array in arrays.items():
                if name not in self._rows:
                    others[name] = array.take(_positions(array.size)).tobytes()
            return Samples(small, others)
        shape = self._positions.shape
        small = np.empty(shape, np.uint32) if before is None else before.small.copy()
        for name, array in arrays.items():
            row = self._rows.get(name)
            if row is None:
                others[name] = array.take(_positions(array.size)).tobytes()
            else:
                small[row] = array.reshape(-1).view(np.uint32).take(self._positions[row] - self._begins[row])
        return Samples(small, others)

    def sight(self) -> Sight | None:
        """What sees all weights at once, and takes ``Taken`` samples; None where native code does not read arrays."""
        roll = self._packet.roll
        if roll is None or roll.native is None:
            return None
        names = (*self._names, *(name for name in self._specs if name not in self._rows))
        return Sight(roll, self._names, {name: self.positions(name, self._specs[name].size) for name in names})

    def memory_of(self, samples: Samples) -> array[int]:
        """What would be the memory of these, had they been ``Taken``."""
        memory = array("B", samples.small.tobytes())
        for name in self._specs:
            if name not in self._rows:
                memory.frombytes(samples.others[name])
        return memory

    def positions(self, name: str, size: int) -> npt.NDArray[np.int64]:
        """Which elements of a weight are its samples, for those who take them elsewhere."""
        row = self._rows.get(name)
        return _positions(size) if row is None else self._positions[row] - self._begins[row]

    def assemble(self, elements: Mapping[str, bytes]) -> Samples:
        """Samples of a whole version, from the elements of every weight at its ``positions``."""
        small = np.empty(self._positions.shape, np.uint32)
        for name, row in self._rows.items():
            small[row] = np.frombuffer(elements[name], np.uint32)
        return Samples(small, {name: taken for name, taken in elements.items() if name not in self._rows})

    def elements(self, samples: Samples) -> Mapping[str, bytes]:
        """The other way round: the elements of every weight, from samples of a whole version."""
        if isinstance(samples, Elsewhere):
            return samples.marks
        return {**{name: samples.small[row].tobytes() for name, row in self._rows.items()}, **samples.others}

    def _is_alike(self, name: str, one: Samples, other: Samples) -> bool:
        row = self._rows.get(name)
        if row is None:
            return name in one.others and one.others[name] == other.others.get(name)
        same: bool = one.small[row].tobytes() == other.small[row].tobytes()
        return same

    def alike(self, names: Mapping[str, object], one: Samples, other: Samples) -> Iterator[str]:
        """Those of these weights whose samples are the same."""
        if len(names) * _FEW < len(self._names):
            yield from (name for name in names if self._is_alike(name, one, other))
            return
        # One element of each first: where none is the same, as in most refits, that is all.
        if np.count_nonzero(one.small[:, 0] == other.small[:, 0]):
            for row in np.flatnonzero((one.small == other.small).all(axis=1)).tolist():
                if self._names[row] in names:
                    yield self._names[row]
        others = one.others
        if isinstance(others, Parts):
            yield from (name for name in others.alike(other.others) if name in names)
            return
        for name, taken in others.items():
            if taken == other.others.get(name) and name in names:
                yield name


class Elsewhere(Samples):
    """Samples that a backend took on its device, read when they are asked for.

    Attributes:
        marks: weight -> its elements, at the sampler's positions.

    Args:
        marks: see above.
        sampler: knows the positions.
    """

    def __init__(self, marks: Mapping[str, bytes], sampler: Sampler) -> None:
        vars(self).update(marks=marks, _sampler=sampler)

    marks: Mapping[str, bytes]
    _sampler: Sampler

    @cached_property
    def _here(self) -> Samples:
        return self._sampler.assemble(self.marks)

    @property
    def small(self) -> npt.NDArray[np.uint32]:
        """See ``Samples``."""
        return self._here.small

    @property
    def others(self) -> Mapping[str, bytes]:
        """See ``Samples``."""
        return self._here.others


class Taken(Samples):
    """Samples that native code took of all weights at once.

    Attributes:
        memory: those of the packet's weights, and of the others after them.
        address: of the memory.

    Args:
        memory: see above.
        address: see above.
        count: how many weights the packet has.
        parts: where each weight's samples are.
    """

    def __init__(self, memory: array[int], address: int, count: int, parts: Mapping[str, slice]) -> None:
        vars(self).update(memory=memory, address=address, _count=count, _parts=parts)

    memory: array[int]
    address: int
    _count: int
    _parts: Mapping[str, slice]

    @cached_property
    def small(self) -> npt.NDArray[np.uint32]:
        """See ``Samples``."""
        count = self._count * _FEW
        return np.frombuffer(self.memory, np.uint32, count).reshape(self._count, _FEW)

    @cached_property
    def others(self) -> Mapping[str, bytes]:
        """See ``Samples``."""
        names = islice(self._parts, self._count, None)
        return {name: self.memory[self._parts[name]].tobytes() for name in names}


def unchanged(
    sampler: Sampler,
    arrays: Mapping[str, Array],
    joined: Array | None,
    before: Samples,
    current: Callable[[str], Array],
) -> tuple[frozenset[str], Samples]:
    """Which weights have the very bits they have now.

    A weight whose samples differ has changed; only where they agree are all bits compared, so that a refit which
    changes everything pays little for the question.

    Args:
        sampler: takes samples.
        arrays: the weights given.
        joined: the packet's weights, where all of them are given.
        before: samples of the current weights.
        current: reads a current weight.

    Returns:
        The names of the equal ones, and the samples of the version that the weights given would make.
    """
    taken = sampler.take(arrays, joined, before)
    alike = list(sampler.alike(arrays, taken, before))
    return frozenset(name for name in alike if same_bits(arrays[name], current(name))), taken
