"""A staged refit: checked and derived, not yet published."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from onnx_refit.engine.protocol import WeightSet
from onnx_refit.errors import CanaryError, RefitError
from onnx_refit.refit.canary import Canary, CanaryResult, run_canary
from onnx_refit.refit.candidate import Candidate
from onnx_refit.refit.check_report import CheckReport
from onnx_refit.refit.report import RefitReport
from onnx_refit.tensors import Array


class State(Enum):
    """Where a staged refit stands."""

    STAGED = "staged"
    COMMITTED = "committed"
    DISCARDED = "discarded"


class Publishes(Protocol):
    """What a staged refit needs of the engine it belongs to."""

    def run_on(
        self, weights: WeightSet, inputs: Mapping[str, object], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run one inference with a weight set."""
        ...

    def publish(self, staged: Staged) -> RefitReport:
        """Make the staged weights the current version."""
        ...


@dataclass(repr=False)
class Staged:
    """A weight set that is ready and that nobody's requests see yet.

    Use it as a context manager to have it discarded unless it was committed.
    """

    _engine: Publishes
    candidate: Candidate
    seconds: dict[str, float] = field(default_factory=dict)
    state: State = State.STAGED
    canaries: list[CanaryResult] = field(default_factory=list)
    refused: CanaryError | None = None

    @property
    def check(self) -> CheckReport:
        """The full check of the weights against the plan."""
        return self.candidate.check

    def run(self, inputs: Mapping[str, object], outputs: list[str] | None = None) -> dict[str, Array]:
        """Run an inference on the staged weights; nobody else's requests see them."""
        self._require_staged("run")
        return self._engine.run_on(self.candidate.weights, inputs, outputs)

    def canary(
        self,
        inputs: Mapping[str, object] | Canary,
        expect: Mapping[str, object] | None = None,
        *,
        rtol: float = 1e-4,
        atol: float = 1e-5,
        accept: Callable[[Mapping[str, Array]], bool | str | None] | None = None,
    ) -> CanaryResult:
        """Run golden inputs on the staged weights.

        Args:
            inputs: one inference's inputs, or a whole ``Canary``.
            expect: outputs that must come out within the tolerance; without it they must be finite.
            rtol: relative tolerance.
            atol: absolute tolerance.
            accept: the caller's own judge, see ``Canary.accept``.

        Raises:
            CanaryError: refused; the set stays staged and can be run or discarded, but is committed only by force,
                or once another canary has passed.
        """
        self._require_staged("try a canary on")
        canary = inputs if isinstance(inputs, Canary) else Canary(inputs, expect, rtol, atol, accept)
        started = time.perf_counter()
        try:
            result = run_canary(canary, self.run)
        except CanaryError as error:
            self.refused = error
            raise
        finally:
            self.seconds["canary"] = self.seconds.get("canary", 0.0) + time.perf_counter() - started
        self.refused = None
        self.canaries.append(result)
        return result

    def commit(self, *, force: bool = False) -> RefitReport:
        """Publish the staged weights: requests that start from now on use them; running ones finish on the old.

        Args:
            force: publish although the last canary refused.

        Raises:
            CanaryError: the last canary refused these weights.
            RefitError: already committed or discarded, or another version was committed since this one was staged
                from it and this one replaces only some weights.
            StoreError: the durable store could not take the version; nothing was published.
        """
        self._require_staged("commit")
        if self.refused is not None and not force:
            raise CanaryError(
                f"the last canary refused these weights ({self.refused.message})",
                where=self.refused.where,
                hint="Run one that passes, discard them, or commit by force",
            )
        report = self._engine.publish(self)
        self.state = State.COMMITTED
        return report

    def discard(self) -> None:
        """Drop the staged weights; a no-op after a commit."""
        if self.state is State.STAGED:
            self.state = State.DISCARDED
            del self.candidate

    def _require_staged(self, verb: str) -> None:
        if self.state is not State.STAGED:
            raise RefitError(f"cannot {verb} a refit that was {self.state.value}", hint="Stage the weights again")

    def __repr__(self) -> str:
        what = "" if self.state is State.DISCARDED else f": {len(self.candidate.changed)} weights changed"
        return f"<Staged ({self.state.value}){what}>"

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()
