"""A replica on Ray Serve: answers requests, and asks the coordinator what to do with its weights."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from starlette.requests import Request
from starlette.responses import Response

from onnx_refit.errors import OnnxRefitError
from onnx_refit.serve.cluster.coordinator import Welcome
from onnx_refit.serve.cluster.errors import ClusterError, Refusal
from onnx_refit.serve.cluster.mailbox import Answer
from onnx_refit.serve.cluster.messages import Member, Prepare, Publish, Target
from onnx_refit.serve.cluster.replica import Replica
from onnx_refit.serve.logs import log
from onnx_refit.serve.ray.answers import Answered
from onnx_refit.serve.ray.coordinator_actor import Unknown
from onnx_refit.serve.ray.http import respond
from onnx_refit.serve.ray.process import here
from onnx_refit.serve.ray.settings import NAMESPACE, ClusterSettings, coordinator_name
from onnx_refit.serve.ray.transport import TRANSPORT, plan_from_bytes
from onnx_refit.serve.request import InferRequest

_POLL_SECONDS = 10.0
_RETRY_SECONDS = 0.2
_FENCE_SECONDS = 30.0


class EngineReplica:
    """The class of the Serve deployment.

    Args:
        settings: the deployment's.
        plan: the plan's bytes, without weights.
    """

    def __init__(self, settings: ClusterSettings, plan: bytes) -> None:
        self._settings = settings
        self._stopped = threading.Event()
        self._member = _myself()
        opened = plan_from_bytes(plan)
        while True:
            welcome = self._hello()
            self._replica = Replica(
                opened,
                welcome.target,
                TRANSPORT.open(welcome.weights),
                welcome.source,
                keep=settings.keep,
                options=settings.engine,
                open_parcel=TRANSPORT.open,
                on_phase=settings.on_phase or (lambda phase, transaction: None),
            )
            # Until it is let in Serve sends it no request; from then on it is in every transaction.
            if self._admitted():
                break
            self._replica.close()
        log("a replica has joined", replica=self._member.name, version=self._replica.target.version)
        self._workers = ThreadPoolExecutor(settings.instances, thread_name_prefix="onnx-refit-infer")
        self._waiters = ThreadPoolExecutor(64, thread_name_prefix="onnx-refit-fence")
        self._control = threading.Thread(target=self._obey, name="onnx-refit-control", daemon=True)
        self._control.start()

    # ------------------------------------------------------------------ requests

    async def infer(
        self,
        inputs: Mapping[str, object],
        outputs: Sequence[str] | None = None,
        version: int | None = None,
        fence: int = 0,
    ) -> Answered | Refusal:
        """One inference; see ``Replica.infer``. What is wrong with it is returned, not raised."""
        try:
            return await self._infer(inputs, outputs, version, fence)
        except OnnxRefitError as error:
            return Refusal.of(error)

    async def __call__(self, request: Request) -> Response:
        """A request that came over HTTP."""

        async def infer(asked: InferRequest, version: int | None, fence: int) -> Answered:
            return await self._infer(asked.inputs, asked.output_names, version, fence)

        return await respond(request, self._settings.name, self._replica.engine, infer)

    async def _infer(
        self, inputs: Mapping[str, object], outputs: Sequence[str] | None, version: int | None, fence: int
    ) -> Answered:
        loop = asyncio.get_running_loop()
        if fence > self._replica.target.epoch:
            # On a thread of its own: the instances are for requests that can be answered.
            await loop.run_in_executor(self._waiters, self._replica.wait_for, fence, _FENCE_SECONDS)
        answer = await loop.run_in_executor(
            self._workers, lambda: self._replica.infer(inputs, outputs, version=version)
        )
        return Answered(dict(answer), answer.version, answer.epoch, self._member.name)

    def check_health(self) -> None:
        """Serve asks now and then; a replica that hears no coordinator any more is replaced."""
        if not self._control.is_alive():
            raise ClusterError("the replica's control thread has ended", where=self._member.name)

    def __del__(self) -> None:
        """Serve ends the replica: leave, so that nobody waits for it."""
        self._stopped.set()
        with contextlib.suppress(RayError, ValueError):
            ray.get(_coordinator(self._settings.name).leave.remote(self._member.name), timeout=5)

    # ------------------------------------------------------------------ commands

    def _obey(self) -> None:
        answer: Answer | None = None
        while not self._stopped.is_set():
            try:
                poll = _coordinator(self._settings.name).poll.remote(self._member.name, answer, _POLL_SECONDS)
                letter = ray.get(poll)
            except (RayError, ValueError):
                # It is being started anew, and reads from its book that this replica exists.
                self._stopped.wait(_RETRY_SECONDS)
                continue
            answer = None
            if isinstance(letter, Unknown):
                self._join_again()
            elif letter is not None:
                answer = Answer(letter.key, self._replica.carry_out(letter.command))

    def _join_again(self) -> None:
        """Come in once more, at what the cluster answers with: the coordinator's book was lost."""
        while not self._stopped.is_set() and not self._admitted():
            welcome = self._hello()
            base, transaction = self._replica.target.version, f"join {welcome.target.version}"
            prepare = Prepare(transaction, base, welcome.target.version, welcome.weights, source=welcome.source)
            for command in (prepare, Publish(transaction, welcome.target)):
                reply = self._replica.carry_out(command)
                if reply.refusal is not None:
                    raise reply.refusal.error(self._member.name)

    def _admitted(self) -> bool:
        """Whether the coordinator has let the replica in; then it stands where the cluster stands."""
        target: Target | None = self._ask("admit", self._member, self._replica.state)
        if target is not None:
            self._replica.carry_out(Publish("join", target))
        return target is not None

    def _hello(self) -> Welcome:
        welcome: Welcome | Refusal = self._ask("hello")
        if isinstance(welcome, Refusal):
            raise welcome.error()
        return welcome

    def _ask(self, verb: str, *arguments: object) -> Any:
        """Ask the coordinator until it answers: it may be being started anew."""
        while True:
            try:
                return ray.get(getattr(_coordinator(self._settings.name), verb).remote(*arguments))
            except (RayError, ValueError):
                if self._stopped.wait(_RETRY_SECONDS):
                    raise


def _coordinator(name: str) -> Any:
    """The coordinator's actor; ValueError while there is none."""
    return ray.get_actor(coordinator_name(name), namespace=NAMESPACE)


def _myself() -> Member:
    """The replica that this process is, and how Ray finds it."""
    context = ray.get_runtime_context()
    actor = context.get_actor_name() or ""
    # Serve starts its replicas in a namespace of its own.
    for namespace in ("serve", context.namespace):
        with contextlib.suppress(ValueError):
            ray.get_actor(actor, namespace=namespace)
            break
    else:
        raise ClusterError("Ray does not find this replica by its name", where=actor)
    tag = serve.get_replica_context().replica_id.unique_id
    return Member(f"{tag}-{context.get_actor_id()}", {"actor": actor, "namespace": namespace, **here()})
