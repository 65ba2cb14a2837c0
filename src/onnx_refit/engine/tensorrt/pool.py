"""Which weight set lies in which device engine, and who waits for whom."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from onnx_refit.engine.tensorrt.twin import Twin
from onnx_refit.engine.tensorrt.weightset import TensorRtWeightSet
from onnx_refit.errors import EngineError


@dataclass
class _Place:
    """One twin and what goes on in it.

    Attributes:
        twin: the device engine.
        holds: the weight set it was refitted with, if that is still alive.
        loading: the weight set it is being refitted with; nobody else may use the place then.
        running: inferences in it.
        used: when it was last given to somebody, counted up.
    """

    twin: Twin
    holds: Callable[[], TensorRtWeightSet | None] = lambda: None
    loading: TensorRtWeightSet | None = None
    running: int = 0
    used: int = 0


class TwinPool:
    """Gives every request a device engine that holds exactly its weight set. Thread-safe.

    A set that no engine holds (an older version, or one pushed out by a newer) is refitted again into the engine that
    was used least recently; requests for what lay there wait for their turn. Engines never hold a mixture: a place is
    given to requests only after its refit has succeeded as a whole.
    """

    def __init__(self, twins: Sequence[Twin]) -> None:
        self._places = [_Place(twin) for twin in twins]
        self._changed = threading.Condition()
        self._clock = 0
        self._closed = False

    def load(self, weights: TensorRtWeightSet, avoid: TensorRtWeightSet | None = None) -> None:
        """Refit an idle engine with a weight set.

        Args:
            weights: the set.
            avoid: a set that should stay where it is (the one that answers requests), if there is another place.

        Raises:
            EngineError: the refit failed; no engine holds the set.
        """
        with self._leased(weights, avoid):
            pass

    @contextmanager
    def lease(self, weights: TensorRtWeightSet) -> Iterator[Twin]:
        """An engine that holds this weight set, kept from being refitted until the block ends."""
        with self._leased(weights, None) as twin:
            yield twin

    def holds(self, weights: TensorRtWeightSet) -> bool:
        """Whether an engine holds this set now, so that a request for it needs no refit first."""
        with self._changed:
            return any(place.loading is None and place.holds() is weights for place in self._places)

    def close(self) -> None:
        """Free all engines once the inferences in them have ended."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for place in self._places:
                self._changed.wait_for(lambda place=place: place.running == 0 and place.loading is None)  # type: ignore[misc]
                place.twin.close()

    @contextmanager
    def _leased(self, weights: TensorRtWeightSet, avoid: TensorRtWeightSet | None) -> Iterator[Twin]:
        place = self._enter(weights, avoid)
        try:
            yield place.twin
        finally:
            with self._changed:
                place.running -= 1
                self._changed.notify_all()

    def _enter(self, weights: TensorRtWeightSet, avoid: TensorRtWeightSet | None) -> _Place:
        with self._changed:
            while True:
                if self._closed:
                    raise EngineError("the engine is closed")
                ready = next((p for p in self._places if p.loading is None and p.holds() is weights), None)
                if ready is not None:
                    return self._taken(ready)
                chosen = None
                if not any(place.loading is weights for place in self._places):
                    chosen = self._victim(avoid)
                if chosen is not None:
                    break
                self._changed.wait()
            chosen.loading = weights
            chosen.holds = lambda: None
            self._changed.wait_for(lambda: chosen.running == 0)
        return self._refit(chosen, weights)

    def _refit(self, place: _Place, weights: TensorRtWeightSet) -> _Place:
        try:
            place.twin.refit(weights)
        except BaseException:
            with self._changed:
                place.loading = None
                self._changed.notify_all()
            raise
        with self._changed:
            place.loading = None
            place.holds = weakref.ref(weights)
            self._changed.notify_all()
            return self._taken(place)

    def _taken(self, place: _Place) -> _Place:
        self._clock += 1
        place.used = self._clock
        place.running += 1
        return place

    def _victim(self, avoid: TensorRtWeightSet | None) -> _Place | None:
        free = [place for place in self._places if place.loading is None]
        if len(self._places) > 1:
            free = [place for place in free if avoid is None or place.holds() is not avoid]
        # First a place without a living set, then the one that was used least recently.
        return min(free, key=lambda place: (place.holds() is not None, place.used), default=None)
