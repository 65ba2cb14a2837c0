"""One model on several GPUs as one engine: refitted in two phases, so that no GPU serves what another lacks.

``derive`` is the first phase: a weight set exists only if every device has its own. The second is the transaction's
flip of one reference, the same for all devices.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from onnx_refit.engine.cuda.attached import Attached
from onnx_refit.engine.cuda.backend import CudaBackend, own
from onnx_refit.engine.cuda.filling import Source
from onnx_refit.engine.cuda.weightset import CudaWeightSet
from onnx_refit.engine.protocol import FullSpeed, Holder, Inspector, Taken, WeightSet
from onnx_refit.engine.single_tier import SingleTier
from onnx_refit.errors import EngineError
from onnx_refit.plan.compiled import Decision, Verdict
from onnx_refit.tensors import Array, TensorSpec
from onnx_refit.weights.provenance.expression import Expression


class GroupWeightSet:
    """The same weights on every device of a group."""

    def __init__(self, members: Sequence[CudaWeightSet]) -> None:
        self.members = tuple(members)
        self._full_speed = SingleTier()

    @property
    def nbytes(self) -> int:
        """Bytes on all devices together."""
        return sum(member.nbytes for member in self.members)

    @property
    def shared_nbytes(self) -> int:
        """Bytes shared with the set it was derived from, on all devices together."""
        return sum(member.shared_nbytes for member in self.members)

    @property
    def full_speed(self) -> FullSpeed:
        """When this set reaches its last tier of speed: at once."""
        return self._full_speed


class CudaGroup:
    """A backend over backends: requests go to the device with the fewest in flight. Thread-safe.

    Args:
        members: one backend a device.
        nccl: spread weights by NCCL where it can be had.
    """

    def __init__(self, members: Sequence[CudaBackend], *, nccl: bool = True) -> None:
        self._members = tuple(members)
        self._in_flight = [0] * len(members)
        self._lock = threading.Lock()
        self._nccl = nccl
        self._notes: list[Decision] = []
        self._pool = ThreadPoolExecutor(len(members), thread_name_prefix="onnx-refit-group")

    @property
    def name(self) -> str:
        """The engine's name."""
        return "cuda"

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """The model's inputs."""
        return self._members[0].inputs

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """The model's outputs."""
        return self._members[0].outputs

    @property
    def decisions(self) -> Sequence[Decision]:
        """What the devices decided; the same for devices of one kind."""
        own = dict.fromkeys(decision for member in self._members for decision in member.decisions)
        return (*own, *self._notes)

    def required(self, changed: frozenset[str]) -> frozenset[str]:
        """See ``Backend.required``."""
        return self._members[0].required(changed)

    @property
    def neighbours(self) -> Sequence[str]:
        """See ``Backend.neighbours``."""
        return self._members[0].neighbours

    @property
    def recoverable(self) -> frozenset[str]:
        """See ``Backend.recoverable``."""
        return self._members[0].recoverable

    def recover(self, weights: WeightSet, name: str) -> Array:
        """A source weight read back from the first device."""
        return self._members[0].recover(_own(weights).members[0], name)

    def bind(self, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        """See ``CudaBackend.bind``: tensors of the first device."""
        return self._members[0].bind(tensors)

    def attach(
        self, parts: Mapping[str, Expression], tensors: Mapping[str, object], *, rounding: bool
    ) -> Attached | None:
        """See ``InPlace.attach``: on the first device."""
        return self._members[0].attach(parts, tensors, rounding=rounding)

    def take(
        self,
        attached: Attached,
        tensors: Sequence[object],
        base: WeightSet,
        holder: Holder,
        positions: Mapping[str, Array],
        before: Mapping[str, bytes],
        look: bool,
    ) -> Taken | None:
        """See ``InPlace.take``; the others get what the first device made."""
        bases = _own(base).members
        taken = self._members[0].take(attached, tensors, bases[0], holder, positions, before, look)
        alike = None if taken is None else taken.settle()
        if taken is None or alike is None:
            return None
        taken = taken._replace(settle=lambda: alike)
        first = own(taken.weights)
        if not first.shared_nbytes:
            return taken._replace(weights=GroupWeightSet(self._broadcast(first) or self._passed_on(first)))
        jobs = [
            self._pool.submit(member.adopt, first, held)
            for member, held in zip(self._members[1:], bases[1:], strict=True)
        ]
        return taken._replace(weights=GroupWeightSet([first, *_all(jobs)]))

    def equal(
        self, names: Sequence[str], left: tuple[WeightSet, Holder], right: tuple[WeightSet, Holder]
    ) -> frozenset[str]:
        """See ``InPlace.equal``."""
        one, other = _own(left[0]).members[0], _own(right[0]).members[0]
        return self._members[0].equal(names, (one, left[1]), (other, right[1]))

    def derive(
        self,
        sources: Mapping[str, Source],
        base: WeightSet | None = None,
        changed: frozenset[str] | None = None,
        inspector: Inspector | None = None,
    ) -> GroupWeightSet:
        """A weight set on every device, or none.

        A full set is made on one device and goes to the others in one piece, by NCCL's broadcast; where that is not to
        be had, in a doubling tree of copies from device to device. A partial one is small: every device makes its own.

        Raises:
            EngineError: a device failed; no set exists, and no device serves anything new.
        """
        if base is not None and changed is not None:
            bases = _own(base).members
            jobs = [
                self._pool.submit(member.derive, sources, held, changed)
                for member, held in zip(self._members, bases, strict=True)
            ]
            return GroupWeightSet(_all(jobs))
        first = self._members[0].derive(sources)
        return GroupWeightSet(self._broadcast(first) or self._passed_on(first))

    def _broadcast(self, first: CudaWeightSet) -> list[CudaWeightSet] | None:
        """The first device's set on all devices, by NCCL; None where it cannot."""
        first.keep()  # other devices' streams read it
        arenas = [first.arena, *(member.empty(first.arena) for member in self._members[1:])]
        storages = [arena.storage for arena in arenas]
        if not self._nccl or not all(storage.is_cuda for storage in storages):
            return None
        if len({storage.device for storage in storages}) < len(storages) or not torch.cuda.nccl.is_available(storages):
            return None
        try:
            torch.cuda.nccl.broadcast(storages)
            for storage in storages:
                torch.cuda.current_stream(storage.device).synchronize()
        except RuntimeError as error:
            self._nccl = False
            self._notes.append(Decision("group", "broadcast weights with NCCL", Verdict.REJECTED, str(error)))
            return None
        return [first, *(CudaWeightSet(arena) for arena in arenas[1:])]

    def _passed_on(self, first: CudaWeightSet) -> list[CudaWeightSet]:
        """The same by copies: each device that has it passes it on, so n devices take the time of log2(n) copies."""
        made = [first]
        while len(made) < len(self._members):
            wave = range(len(made), min(2 * len(made), len(self._members)))
            have = len(made)
            jobs = [self._pool.submit(self._members[index].adopt, made[index - have]) for index in wave]
            made.extend(_all(jobs))
        return made

    def run(
        self, weights: WeightSet, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run one inference on the least busy device."""
        with self._lock:
            index = min(range(len(self._members)), key=self._in_flight.__getitem__)
            self._in_flight[index] += 1
        try:
            return self._members[index].run(_own(weights).members[index], inputs, outputs)
        finally:
            with self._lock:
                self._in_flight[index] -= 1

    def close(self) -> None:
        """Free all devices."""
        self._pool.shutdown()
        for member in self._members:
            member.close()


def _all(jobs: Sequence[Any]) -> list[CudaWeightSet]:
    """The results of all jobs, once every one has ended; the first failure is raised."""
    failures = [error for error in (job.exception() for job in jobs) if error is not None]
    if failures:
        raise failures[0]
    return [job.result() for job in jobs]


def _own(weights: WeightSet) -> GroupWeightSet:
    if not isinstance(weights, GroupWeightSet):
        raise EngineError("the weight set belongs to another engine")
    return weights
