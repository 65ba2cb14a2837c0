"""What a client holds: inferences, refits of all replicas, versions."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError

from onnx_refit.errors import InputError
from onnx_refit.refit.canary import Canary
from onnx_refit.refit.check import CheckOptions
from onnx_refit.serve.cluster.errors import ClusterError, OutcomeUnknownError, Refusal, RefusalKind
from onnx_refit.serve.cluster.messages import ClusterReport, RefitOrder
from onnx_refit.serve.cluster.parcel import pack
from onnx_refit.serve.ray.answers import Answered
from onnx_refit.serve.ray.settings import DEPLOYMENT, NAMESPACE, coordinator_name
from onnx_refit.serve.ray.transport import ship
from onnx_refit.tensors import Array
from onnx_refit.weights.open import WeightsLike, open_weights

_RETRY_SECONDS = 0.1
_OUTCOME_SECONDS = 300.0


class ClusterAnswer(dict[str, Array]):
    """Output name -> array; ``version`` answered, published at ``epoch``, on ``replica``."""

    version: int
    epoch: int
    replica: str


class ClusterHandle:
    """A deployment, from anywhere in the Ray cluster. May be used from several threads.

    Args:
        name: the deployment's name.
        requests: Serve's handle of the deployment.
    """

    def __init__(self, name: str, requests: Any) -> None:
        self.name, self._requests = name, requests

    # ------------------------------------------------------------------ inference

    def infer(
        self,
        inputs: Mapping[str, object],
        outputs: Sequence[str] | None = None,
        *,
        version: int | None = None,
        fence: int = 0,
        timeout: float = 60.0,
    ) -> ClusterAnswer:
        """Run one inference on some replica. If that ends meanwhile, another one is asked: inferences change nothing.

        Args:
            inputs: see ``Engine.run``.
            outputs: see ``Engine.run``.
            version: a version that the replica holds; one that has just joined holds only the current one.
            fence: an epoch that an earlier answer had: this one is not older. ``session`` minds it for you.
            timeout: seconds.

        Raises:
            InputError, VersionError, EngineError: see ``Engine.run``.
            ClusterError: nobody answered in time.
        """
        deadline = time.monotonic() + timeout
        while True:
            response = self._requests.infer.remote(dict(inputs), outputs, version, fence)
            try:
                found = response.result(timeout_s=max(0.0, deadline - time.monotonic()))
            except TimeoutError as error:
                raise ClusterError(f"no replica answered within {timeout:g} s", where=self.name) from error
            except RayActorError as error:
                if time.monotonic() > deadline:
                    raise ClusterError("the replica ended while it answered", where=self.name) from error
                time.sleep(_RETRY_SECONDS)
                continue
            if isinstance(found, Refusal) and found.kind is RefusalKind.STALE and time.monotonic() < deadline:
                continue
            return _answer(found)

    async def infer_async(
        self,
        inputs: Mapping[str, object],
        outputs: Sequence[str] | None = None,
        *,
        version: int | None = None,
        fence: int = 0,
        timeout: float = 60.0,
    ) -> ClusterAnswer:
        """As ``infer``, on an event loop (inside another deployment, say)."""

        async def answer() -> ClusterAnswer:
            while True:
                try:
                    found = await self._requests.infer.remote(dict(inputs), outputs, version, fence)
                except RayActorError:
                    await asyncio.sleep(_RETRY_SECONDS)
                    continue
                if not (isinstance(found, Refusal) and found.kind is RefusalKind.STALE):
                    return _answer(found)

        try:
            async with asyncio.timeout(timeout):
                return await answer()
        except TimeoutError as error:
            raise ClusterError(f"no replica answered within {timeout:g} s", where=self.name) from error

    def session(self) -> Session:
        """A client that never gets an older version after a newer one, whichever replicas answer it."""
        return Session(self)

    # ------------------------------------------------------------------ refits

    def refit(
        self,
        source: WeightsLike,
        options: CheckOptions | None = None,
        *,
        partial: bool = False,
        canary: Canary | Mapping[str, object] | None = None,
    ) -> ClusterReport:
        """Replace the weights of every replica, or of none.

        When this returns, every replica answers with the new version, and every answer to a request that starts
        from now on is of it. Before, answers may be of either; each names its own.

        Args:
            source: see ``Engine.stage``; read here, and put into the object store once.
            options: how strict the check is.
            partial: weights that are not given stay as they are.
            canary: golden inputs that every replica runs on the staged weights. A judge of the caller's own
                (``accept``) cannot travel.

        Raises:
            WeightsError, RefitRejectedError, CanaryError, StoreError: refused; nothing was published.
            ClusterError: a replica, or the coordinator, ended before it was decided; nothing was published.
            OutcomeUnknownError: the one exception from that: the coordinator ended, and none came after it.
        """
        chosen = options if options is not None else CheckOptions()
        chosen = replace(chosen, partial=chosen.partial or partial)
        if canary is not None and not isinstance(canary, Canary):
            canary = Canary(canary)
        if canary is not None and canary.accept is not None:
            raise InputError("a canary's judge cannot travel to the replicas", hint="Give what to expect instead")
        opened = open_weights(source)
        try:
            shipment = ship(pack({name: opened.read(name) for name in opened.specs}))
            order = RefitOrder(_transaction(), shipment, opened.description, chosen, canary)
        finally:
            if opened is not source:
                opened.close()
        return self._decided("refit", order.transaction, order)

    def rollback(self, to: int | None = None) -> ClusterReport:
        """Have every replica publish an earlier version again; raises as ``refit``, VersionError if there is none.

        Args:
            to: which; None means the one that was current before.
        """
        transaction = _transaction()
        return self._decided("rollback", transaction, to, transaction)

    def forget(self, version: int) -> None:
        """Delete an earlier version from the store and from every replica; VersionError if there is none."""
        refusal = ray.get(self._coordinator().forget.remote(version))
        if refusal is not None:
            raise refusal.error()

    def status(self) -> dict[str, Any]:
        """Version, epoch, replicas, stored versions; ``settled`` is False while a decision is still being spread."""
        return dict(self._when_there(self._coordinator().status.remote))

    @property
    def version(self) -> int:
        """The version that was decided last."""
        return int(self.status()["version"])

    @property
    def versions(self) -> list[dict[str, Any]]:
        """The stored versions, oldest first."""
        return list(self.status()["versions"])

    def _decided(self, verb: str, transaction: str, *arguments: object) -> ClusterReport:
        """Ask for a transaction; if the coordinator ends over it, ask the next one what became of it."""
        asked = getattr(self._coordinator(), verb).remote(*arguments)
        try:
            found = ray.get(asked)
        except RayError as error:
            try:
                report = self.outcome(transaction)
            except ClusterError as unknown:
                raise OutcomeUnknownError(
                    "the coordinator ended and none came after it: it is not known whether this was decided",
                    transaction=transaction,
                    where=self.name,
                    hint="Start one where the store is, and ask handle.outcome(error.transaction)",
                ) from unknown
            if report is None:
                raise ClusterError(
                    "the coordinator ended before it was decided; nothing was published",
                    where=self.name,
                    hint="Do it again",
                ) from error
            return report
        if isinstance(found, Refusal):
            raise found.error()
        return cast("ClusterReport", found)

    def outcome(self, transaction: str) -> ClusterReport | None:
        """What became of a refit or rollback: its account if it was decided, None if it never was nor will be."""
        found = self._when_there(lambda: self._coordinator().outcome.remote(transaction))
        if isinstance(found, Refusal):
            raise found.error()
        return cast("ClusterReport | None", found)

    def _when_there(self, ask: Any) -> Any:
        """A coordinator's answer to a question that changes nothing; waits while one is being started anew."""
        deadline = time.monotonic() + _OUTCOME_SECONDS
        while True:
            try:
                return ray.get(ask())
            except RayActorError as error:
                if time.monotonic() > deadline:
                    raise ClusterError("the coordinator does not come back", where=self.name) from error
                time.sleep(_RETRY_SECONDS)

    def _coordinator(self) -> Any:
        try:
            return ray.get_actor(coordinator_name(self.name), namespace=NAMESPACE)
        except ValueError as error:
            raise ClusterError(
                "there is no coordinator",
                where=self.name,
                hint="Start one where the store is: start_coordinator, or deploy",
            ) from error


class Session:
    """A client that remembers the latest epoch that it has seen.

    Args:
        handle: the deployment.
    """

    def __init__(self, handle: ClusterHandle) -> None:
        self._handle = handle
        self.epoch = 0

    def infer(
        self, inputs: Mapping[str, object], outputs: Sequence[str] | None = None, *, timeout: float = 60.0
    ) -> ClusterAnswer:
        """As ``ClusterHandle.infer``; never older than what this session has seen."""
        answer = self._handle.infer(inputs, outputs, fence=self.epoch, timeout=timeout)
        self.epoch = max(self.epoch, answer.epoch)
        return answer

    def saw(self, report: ClusterReport) -> None:
        """Take note of a refit that was made elsewhere: answers are not older."""
        self.epoch = max(self.epoch, report.target.epoch)


def connect(name: str = "onnx-refit") -> ClusterHandle:
    """A handle of a deployment that runs; a Serve or Cluster error if there is none."""
    return ClusterHandle(name, serve.get_deployment_handle(DEPLOYMENT, app_name=name))


def _transaction() -> str:
    return secrets.token_hex(16)


def _answer(found: Answered | Refusal) -> ClusterAnswer:
    if isinstance(found, Refusal):
        raise found.error()
    answer = ClusterAnswer(found.outputs)
    answer.version, answer.epoch, answer.replica = found.version, found.epoch, found.replica
    return answer
