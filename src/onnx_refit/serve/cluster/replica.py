"""A replica: an engine that answers requests and changes its weights as the coordinator decides."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onnx_refit.engine.registry import EngineOptions, create_backend
from onnx_refit.errors import OnnxRefitError, RefitError
from onnx_refit.plan.plan import Plan
from onnx_refit.refit.check import CheckOptions
from onnx_refit.refit.ledger import MemoryLedger
from onnx_refit.refit.live import Engine, Outputs
from onnx_refit.refit.transaction import Staged
from onnx_refit.serve.cluster.errors import ClusterError, Refusal, RefusalKind, StaleReplicaError
from onnx_refit.serve.cluster.messages import (
    Command,
    Discard,
    Forget,
    Prepare,
    Publish,
    ReplicaState,
    Reply,
    Report,
    Target,
)
from onnx_refit.serve.cluster.parcel import Parcel, unpack
from onnx_refit.tensors import Array
from onnx_refit.weights.source import WeightSource
from onnx_refit.weights.sources.arrays import ArraysSource

Observer = Callable[[str, str], None]
"""Called with a phase and a transaction's name, on the thread that does the work."""


class Answers(Outputs):
    """Output name -> array, with the ``version`` that answered and the ``epoch`` at which it was published."""

    epoch: int


class _AssignedNumbers(MemoryLedger):
    """A ledger that gives the numbers that the coordinator's store gave."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.assigned: int | None = first

    def first(self, weights: Mapping[str, Array], source: str) -> int:
        """The number of the version that the replica starts with."""
        return self._take()

    def commit(self, changed: Iterable[str], weights: WeightSource, parent: int | None) -> int:
        """The number that was assigned for this commit; RefitError if none was."""
        return self._take()

    def _take(self) -> int:
        number, self.assigned = self.assigned, None
        if number is None:
            raise RefitError("a replica's engine is committed by its coordinator only")
        return number


@dataclass(frozen=True)
class _Prepared:
    """What one transaction has made ready: a staged set, or a version that is held still."""

    transaction: str
    staged: Staged | None
    reply: Reply


class Replica:
    """An engine under a coordinator.

    ``infer`` may be called from any number of threads while one thread carries out commands.

    Args:
        plan: the plan; needs no weights.
        target: what the cluster answers with.
        weights: the weights of that version, by the plan's names.
        source: where they came from, in words.
        keep: how many versions to hold.
        options: options of the engine.
        open_parcel: opens what ``Prepare.weights`` holds.
        on_phase: told of ``preparing``, ``prepared``, ``publishing`` and ``published``.

    Raises:
        EngineError: the engine cannot run here.
    """

    def __init__(
        self,
        plan: Plan,
        target: Target,
        weights: Parcel,
        source: str,
        *,
        keep: int = 2,
        options: EngineOptions = EngineOptions(),  # noqa: B008 - frozen
        open_parcel: Callable[[Any], Parcel] = lambda parcel: parcel,
        on_phase: Observer = lambda phase, transaction: None,
    ) -> None:
        # The coordinator sends weights by the plan's own names: the map of a checkpoint's names is behind it.
        bare = replace(plan, names=None, weights=None, path=None)
        arrays = unpack(weights)
        backend, _ = create_backend(
            bare.engine, bare.compiled, weights=arrays, options=options, artefact=bare.artefacts.get(bare.engine)
        )
        self._numbers = _AssignedNumbers(target.version)
        try:
            self.engine = Engine(bare, backend, arrays, source=source, keep=max(keep, 2), ledger=self._numbers)
        except BaseException:
            backend.close()
            raise
        self._open, self._on_phase = open_parcel, on_phase
        self._prepared: _Prepared | None = None
        self._target = target
        self._epochs = {target.version: target.epoch}
        self._moved = threading.Condition()

    # ------------------------------------------------------------------ inference

    @property
    def target(self) -> Target:
        """What it answers with."""
        return self._target

    def infer(
        self,
        inputs: Mapping[str, object],
        outputs: Sequence[str] | None = None,
        *,
        version: int | None = None,
        fence: int = 0,
        patience: float = 30.0,
    ) -> Answers:
        """Run one inference.

        Args:
            inputs: see ``Engine.run``.
            outputs: see ``Engine.run``.
            version: a version that the replica holds; None is the one that answers now.
            fence: an epoch that the caller has seen: what answers is not older. A replica that is behind waits for
                the second phase, which is on its way.
            patience: seconds to wait for it.

        Raises:
            InputError, VersionError, EngineError: see ``Engine.run``.
            StaleReplicaError: it is still behind.
        """
        if self._target.epoch < fence:
            self.wait_for(fence, patience)
        results = self.engine.run(inputs, outputs, version=version)
        answers = Answers(results)
        answers.version = results.version
        # Noted before the version is published, so that no answer of it names an older epoch.
        answers.epoch = self._epochs[results.version]
        return answers

    def wait_for(self, fence: int, patience: float) -> None:
        """Wait until what answers is not older than an epoch; StaleReplicaError if that takes longer (seconds)."""
        with self._moved:
            if not self._moved.wait_for(lambda: self._target.epoch >= fence, patience):
                raise StaleReplicaError(
                    f"the replica is at epoch {self._target.epoch} and the request has seen epoch {fence}",
                    hint="Ask again: another replica will answer, or this one when it has caught up",
                )

    # ------------------------------------------------------------------ commands

    @property
    def state(self) -> ReplicaState:
        """Where it stands."""
        held = tuple(info.number for info in self.engine.versions if info.held)
        return ReplicaState(self._target, held, None if self._prepared is None else self._prepared.transaction)

    def carry_out(self, command: Command) -> Reply:
        """Do as told, or say why not. The same command again gives the same answer and is done once."""
        try:
            match command:
                case Prepare():
                    return self._prepare(command)
                case Publish():
                    return self._publish(command)
                case Discard():
                    self._discard(command.transaction)
                case Forget():
                    if self.engine.version != command.version and command.version in self.state.held:
                        self.engine.forget(command.version)
                case Report():
                    pass
            return Reply(self.state)
        except OnnxRefitError as error:
            return Reply(self.state, Refusal.of(error))

    def _prepare(self, command: Prepare) -> Reply:
        if self._prepared is not None:
            if self._prepared.transaction == command.transaction:
                return self._prepared.reply
            # Its coordinator has given it up, or it would not have begun another.
            self._discard(self._prepared.transaction)
        self._on_phase("preparing", command.transaction)
        if command.weights is None:
            if command.version not in self.state.held:
                return Reply(self.state, Refusal(RefusalKind.ABSENT, f"version {command.version} is not held"))
            staged, changed, seconds = None, frozenset[str](), dict[str, float]()
        else:
            staged = self._stage(command)
            changed, seconds = staged.candidate.changed, dict(staged.seconds)
        reply = Reply(replace(self.state, prepared=command.transaction), changed=changed, seconds=seconds)
        self._prepared = _Prepared(command.transaction, staged, reply)
        self._on_phase("prepared", command.transaction)
        return reply

    def _stage(self, command: Prepare) -> Staged:
        if command.partial and command.base != self._target.version:
            raise ClusterError(
                f"the weights are a part of version {command.base}, and version {self._target.version} answers here"
            )
        source = ArraysSource(unpack(self._open(command.weights)), command.source)
        # The coordinator has looked for values that are not finite, on the same bytes.
        staged = self.engine.stage(source, CheckOptions(partial=command.partial, allow_nonfinite=True))
        try:
            if command.canary is not None:
                staged.canary(command.canary)
        except BaseException:
            staged.discard()
            raise
        return staged

    def _publish(self, command: Publish) -> Reply:
        target = command.target
        prepared = self._prepared if self._prepared and self._prepared.transaction == command.transaction else None
        if self._target.version == target.version and prepared is None:
            self._move(target)
            return Reply(self.state)
        if (prepared is None or prepared.staged is None) and target.version not in self.state.held:
            return Reply(self.state, Refusal(RefusalKind.ABSENT, f"version {target.version} is not held"))
        self._on_phase("publishing", command.transaction)
        started = time.perf_counter()
        self._epochs[target.version] = max(target.epoch, self._epochs.get(target.version, 0))
        if prepared is not None and prepared.staged is not None:
            self._numbers.assigned = target.version
            prepared.staged.commit()
        elif self.engine.version != target.version:
            self.engine.rollback(target.version)
        if prepared is None and self._prepared is not None:
            self._discard(self._prepared.transaction)
        self._prepared = None
        self._move(target)
        self._on_phase("published", command.transaction)
        return Reply(self.state, seconds={"publish": time.perf_counter() - started})

    def _move(self, target: Target) -> None:
        """Take note of what answers now, and wake the requests that wait for it."""
        held = set(self.state.held)
        with self._moved:
            self._epochs[target.version] = target.epoch
            # Requests that still run with a version no longer held ask for its epoch when they are done.
            recent = sorted(self._epochs, key=self._epochs.__getitem__)[-_REMEMBERED:]
            self._epochs = {number: self._epochs[number] for number in self._epochs if number in held | set(recent)}
            self._target = target
            self._moved.notify_all()

    def _discard(self, transaction: str) -> None:
        if self._prepared is not None and self._prepared.transaction == transaction:
            if self._prepared.staged is not None:
                self._prepared.staged.discard()
            self._prepared = None

    def close(self) -> None:
        """End the engine."""
        self.engine.close()


_REMEMBERED = 1000
"""Versions whose epoch is remembered after they are no longer held."""

__all__ = ["Answers", "Observer", "Replica"]
