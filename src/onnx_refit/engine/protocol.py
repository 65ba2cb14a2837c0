"""The protocol between the refit transaction and a backend.

A backend turns a plan into something that runs, and source weights into a weight set. It knows nothing of versions,
checks, files or commands: the transaction (``onnx_refit.refit``) owns those.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from onnx_refit.plan.compiled import Decision
from onnx_refit.tensors import Array, TensorSpec


class FullSpeed(Protocol):
    """When a weight set reaches its last tier of speed (at once, for most backends and models)."""

    def wait(self, timeout: float | None = None) -> bool:
        """Block until full speed, or until ``timeout`` seconds have passed; whether it was reached."""
        ...

    def done(self) -> bool:
        """Whether full speed was reached."""
        ...


class WeightSet(Protocol):
    """One complete, immutable set of engine weights in a backend's memory.

    Any number may be alive at once; unchanged buffers are shared with the set it was derived from. It is freed when
    the last reference goes, so a request that runs with it keeps it whole.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of all its engine weights, shared ones included."""
        ...

    @property
    def shared_nbytes(self) -> int:
        """Bytes shared with the set it was derived from."""
        ...

    @property
    def full_speed(self) -> FullSpeed:
        """When this set reaches its last tier of speed."""
        ...


class Look(Protocol):
    """What is to be done with each element of one source weight, once: a call does it all.

    A backend that reads the weight anyway may copy it into ``keep`` on the way instead, and call ``watch``; or, where
    ``watched``, look for itself and call ``suspect``.
    """

    @property
    def keep(self) -> Array | None:
        """Flat memory of the weight's dtype that takes a copy; None where none is wanted."""
        ...

    @property
    def watched(self) -> bool:
        """Whether anybody asks if it is finite."""
        ...

    def suspect(self) -> None:
        """Say that an element is not finite."""
        ...

    def watch(self, begin: int, end: int) -> None:
        """See whether these elements of the flattened weight are finite, if anybody asks. Any thread may call it."""
        ...

    def __call__(self, begin: int, end: int) -> None:
        """Watch and keep these elements. Any thread may call it."""
        ...


class Inspector(Protocol):
    """Somebody who has to read source weights that a backend reads anyway: so each comes from memory once."""

    @property
    def lasting(self) -> Mapping[str, Array]:
        """Sources given as the very same arrays at each refit, with other elements; none of them is claimed.

        A backend may prepare once what it does with them, as long as it is given this very mapping.
        """
        ...

    def claim(self, name: str) -> Look | None:
        """How to look at a source weight; None where there is nothing to look at, or not now.

        Who claims a weight looks at each of its elements exactly once before ``derive`` returns, in parts as they suit,
        best when reading them. What no backend claims is looked at afterwards.
        """
        ...


class Backend(Protocol):
    """A compiled model on one device, able to run with any of its weight sets."""

    @property
    def name(self) -> str:
        """The engine's name: ``"onnxruntime"``, ``"cuda"``, ``"tensorrt"``."""
        ...

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """The model's inputs."""
        ...

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """The model's outputs."""
        ...

    @property
    def decisions(self) -> Sequence[Decision]:
        """What specialising for this host decided, with reasons."""
        ...

    def derive(
        self,
        sources: Mapping[str, Array],
        base: WeightSet | None = None,
        changed: frozenset[str] | None = None,
        inspector: Inspector | None = None,
    ) -> WeightSet:
        """A new weight set from source weights; nothing that runs is touched.

        Args:
            sources: source weight name -> array of exactly the declared dtype and shape, C-contiguous; at least the
                names ``required(changed)`` gives. The arrays are not kept unless the engine reads them as they are,
                and never written.
            base: the set to share unchanged engine weights with.
            changed: names of the source weights that differ from ``base``; None means all.
            inspector: looks at source weights too; a backend that gains nothing from it may leave it alone.

        Raises:
            EngineError: the derivation failed; no weight set exists.
        """
        ...

    def required(self, changed: frozenset[str]) -> frozenset[str]:
        """The source weights that deriving every engine weight which reads one of ``changed`` needs."""
        ...

    @property
    def recoverable(self) -> frozenset[str]:
        """Source weights that ``recover`` gives back bit for bit, because their engine weights only rearrange them."""
        ...

    def recover(self, weights: WeightSet, name: str) -> Array:
        """A recoverable source weight, read back from a weight set; EngineError for one that is not recoverable."""
        ...

    def run(
        self, weights: WeightSet, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run one inference with a weight set. Thread-safe. Inputs were checked by the caller.

        Raises:
            EngineError: the backend failed.
        """
        ...

    def close(self) -> None:
        """Free the device's resources; running afterwards raises EngineError."""
        ...


@dataclass(frozen=True)
class Seen:
    """What was found out about a source weight where it is.

    Attributes:
        finite: whether no element is NaN or infinite.
        elements: the bytes of the elements asked for.
    """

    finite: bool
    elements: bytes


@runtime_checkable
class InPlace(Protocol):
    """A backend that takes source weights from its own device: they are checked there and never read by the host.

    ``derive`` then takes these values instead of arrays.
    """

    def holds(self, values: Mapping[str, object]) -> bool:
        """Whether these are all source weights, each dense on this device and of the declared dtype and shape."""
        ...

    def look(self, values: Mapping[str, object], positions: Mapping[str, Array]) -> Mapping[str, Seen]:
        """Look at weights that it holds: flat positions -> the elements there, at most 32 a weight."""
        ...

    def put_aside(self, values: Mapping[str, object], names: Collection[str]) -> Mapping[str, Array]:
        """Copies on the device of some of the weights, each read to the host when it is asked for."""
        ...

    def equals(self, weights: WeightSet, name: str, value: object) -> bool:
        """Whether a recoverable source weight of a weight set has the very bits of a value."""
        ...
