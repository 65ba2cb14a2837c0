"""The protocol between the refit transaction and a backend.

A backend turns a plan into something that runs, and source weights into a weight set. It knows nothing of versions,
checks, files or commands: the transaction (``onnx_refit.refit``) owns those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from onnx_refit.plan.compiled import Decision
from onnx_refit.tensors import Array, TensorSpec
from onnx_refit.weights.provenance.expression import Expression


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

    def claim_all(self) -> Callable[[], None] | None:
        """Claim all weights but ``lasting`` at once, if none is to be kept: what to call if an element is not finite.

        None where weights have to be claimed one by one.
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
    def neighbours(self) -> Sequence[str]:
        """Source weights in the order in which the backend best finds them side by side in ``Inspector.lasting``."""
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


class Taken(NamedTuple):
    """What is being made of source weights on a backend's device; good for nothing before it is settled.

    Attributes:
        weights: the weight set.
        kept: copies of those given that ``recover`` does not give back, each read to the host when it is asked for.
        marks: the elements asked for of every weight of the version that this makes, read when they are asked for.
        settle: waits, once, before anything else is taken. It gives the names of the weights in which those elements
            are as before; None where a value is not finite or does not survive a cast, or where the tensors turned out
            to be others than those attached.
    """

    weights: WeightSet
    kept: Mapping[str, Array]
    marks: Mapping[str, bytes]
    settle: Callable[[], Sequence[str] | None]


Holder: TypeAlias = Callable[[str], Mapping[str, Array]]
"""Gives the mapping that holds a source weight of a version which its weight set does not give back."""


@runtime_checkable
class InPlace(Protocol):
    """A backend that takes source weights from its own device: they are checked there and never read by the host."""

    def attach(self, parts: Mapping[str, Expression], tensors: Mapping[str, object], *, rounding: bool) -> Any | None:
        """Look at tensors whose values are to be taken, now or again and again.

        Args:
            parts: source weight -> how it is made of the tensors.
            tensors: name -> tensor.
            rounding: whether a cast to the declared dtype may round.

        Returns:
            What ``take`` takes, without a hold on the tensors; its ``hold(tensors)`` keeps their memory, and its
            ``begins(tensors)`` tells quickly, by the first one, whether others may be these. None where a
            tensor is not on this device, or this backend could not give the very bits that the host would.
        """
        ...

    def take(
        self,
        attached: Any,
        tensors: Sequence[object],
        base: WeightSet,
        holder: Holder,
        positions: Mapping[str, Array],
        before: Mapping[str, bytes],
        look: bool,
    ) -> Taken | None:
        """Check the weights that are in the tensors now, and derive a weight set; nothing that runs is touched.

        Args:
            attached: what ``attach`` gave.
            tensors: the tensors that the parts read, in the order in which the parts name them.
            base: the weight set of the version that gives what is not given.
            holder: of that version.
            positions: every source weight -> flat positions, at most 32, the same mapping at each call.
            before: the elements at these positions in that version.
            look: whether to look for NaN and infinities.

        Returns:
            What is being made, by the device; ``settle`` tells whether it can be used. None where the tensors are not
            those that were attached (another address, dtype, shape or order of elements).

        Raises:
            EngineError: the derivation failed.
        """
        ...

    def equal(
        self, names: Sequence[str], left: tuple[WeightSet, Holder], right: tuple[WeightSet, Holder]
    ) -> frozenset[str]:
        """Those of some source weights that have the very same bits in two versions."""
        ...
