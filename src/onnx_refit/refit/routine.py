"""The usual refit, every weight from an array that is as the model declares it: seen in one call of native code.

The general way opens a source, checks it, joins its small weights and compares them with those before: the interpreter
runs so much code for it, which inference has driven out of the caches since the last refit, that for a model of 10 MB
it takes a quarter of the time that a copy does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from onnx_refit.moves.roll import Called, Roll
from onnx_refit.refit.check import CheckOptions
from onnx_refit.refit.check_report import CheckReport
from onnx_refit.refit.packet import Packet
from onnx_refit.refit.unchanged import Sampler, Samples, Taken
from onnx_refit.tensors import Array

_USUAL = CheckOptions()


class Seen(NamedTuple):
    """Weights that can be derived from at once: as declared, every one other than before.

    Attributes:
        arrays: all of them, and where they are.
        joined: the small ones among them, flat, in the packet's memory.
        views: each of these.
        samples: of them.
        check: the report of the check.
    """

    arrays: Called
    joined: Array
    views: Mapping[str, Array]
    samples: Samples
    check: CheckReport


class Routine:
    """Sees what a usual refit gives. One refit at a time.

    Args:
        roll: the weights.
        check: what the check says of them.
        packet: the small ones among them; they are joined in its memory.
        sampler: takes samples, of all.
    """

    def __init__(self, roll: Roll, check: CheckReport, packet: Packet, sampler: Sampler) -> None:
        self._names = roll.names
        self._check = check
        self._packet = packet
        self._small = len(packet.names)
        self._sampler = sampler
        self._sight = sampler.sight() if roll.names else None
        self._parts = {} if self._sight is None else self._sight.parts

    def see(self, source: object, options: CheckOptions | None, before: Samples) -> Seen | None:
        """What was given, where there is nothing to say of it but that it is not finite, perhaps, in a large weight.

        Args:
            source: what the caller gave.
            options: how strict the check is.
            before: samples of the current version.

        Returns:
            None for what the general way has to look at.
        """
        if type(source) is not dict or self._sight is None:
            return None
        if not (options is None or options == _USUAL):
            return None
        given = source.copy()  # at once: another thread may change the caller's
        objects = list(given.values())
        if list(given) != self._names:
            objects = [given.get(name) for name in self._names]
        if len(given) != len(objects):
            return None
        joined, views, target = self._packet.memory()
        if type(before) is Taken:
            found = self._sight.see(objects, target, before.address)
        else:
            memory = self._sampler.memory_of(before)
            found = self._sight.see(objects, target, memory.buffer_info()[0])
        if found is None:
            return None
        arrays = Called(zip(self._names, objects, strict=True))
        arrays.addresses, taken, address = found
        return Seen(arrays, joined, views, Taken(taken, address, self._small, self._parts), self._check)
