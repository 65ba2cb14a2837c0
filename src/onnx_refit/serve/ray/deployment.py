"""Bringing a deployment up, and taking it away."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from onnx_refit.api import PlanLike, accepted_weights
from onnx_refit.plan.plan import Plan
from onnx_refit.serve.cluster.errors import Refusal
from onnx_refit.serve.cluster.parcel import pack
from onnx_refit.serve.ray.coordinator_actor import CoordinatorActor
from onnx_refit.serve.ray.handle import ClusterHandle, connect
from onnx_refit.serve.ray.replica_deployment import EngineReplica
from onnx_refit.serve.ray.settings import DEPLOYMENT, NAMESPACE, ClusterSettings, coordinator_name
from onnx_refit.serve.ray.transport import plan_to_bytes, ship
from onnx_refit.weights.open import WeightsLike


def start_coordinator(
    plan: PlanLike,
    *,
    store: str | os.PathLike[str],
    settings: ClusterSettings,
    weights: WeightsLike | None = None,
    coordinator_options: Mapping[str, Any] | None = None,
) -> None:
    """Start a deployment's coordinator where there is none, and leave one that runs alone.

    ``deploy`` and ``application`` do this first. By itself it brings back a coordinator whose node was lost, to
    replicas that have gone on without it.

    Args:
        plan: path of a plan file, or a plan.
        store: directory of the version store, made if it does not exist; its versions win over the plan's weights.
        settings: name and settings.
        weights: the weights to start with where the store is empty; None takes those in the plan.
        coordinator_options: Ray's options of the coordinator's actor. By default it is tied to the node that this
            runs on, as the store is there; with a store that several nodes share, choose another strategy.

    Raises:
        PlanError: the plan cannot be read, or is stripped, the store is empty and no weights were given.
        PlanMismatchError: there is a coordinator of this name, with another plan.
        ActorDiedError: the coordinator cannot start; Ray's message holds why (a store of another plan, a lock, …).
    """
    opened = plan if isinstance(plan, Plan) else Plan.load(plan)
    options: dict[str, Any] = {
        "num_cpus": 0,
        # However often it ends, the next one reads in the store what was decided.
        "max_restarts": -1,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
        **(coordinator_options or {}),
        "name": coordinator_name(settings.name),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        # No call is made twice: the client asks what became of it.
        "max_task_retries": 0,
        "max_concurrency": 10_000,
    }
    place = str(Path(store).absolute())
    actor = ray.remote(CoordinatorActor).options(**options).remote(settings, plan_to_bytes(opened), place)
    _require(ray.get(actor.require_plan.remote(opened.fingerprint)))
    if ray.get(actor.empty.remote()):
        first = opened.require_weights() if weights is None else accepted_weights(opened, weights)
        source = "the weights given at the start" if weights is not None else str(opened.path or "plan")
        _require(ray.get(actor.seed.remote(ship(pack(first)), source)))


def application(
    plan: PlanLike,
    *,
    store: str | os.PathLike[str],
    settings: ClusterSettings,
    weights: WeightsLike | None = None,
    coordinator_options: Mapping[str, Any] | None = None,
    **deployment_options: Any,
) -> serve.Application:
    """Start a coordinator, and give the Serve application for ``serve.run(…, name=settings.name)``.

    Args:
        plan: see ``start_coordinator``.
        store: see ``start_coordinator``.
        settings: see ``start_coordinator``.
        weights: see ``start_coordinator``.
        coordinator_options: see ``start_coordinator``.
        deployment_options: Serve's options of the deployment (``num_replicas``, ``max_replicas_per_node``,
            ``autoscaling_config``, ``ray_actor_options``, …).

    Raises:
        As ``start_coordinator``.
    """
    opened = plan if isinstance(plan, Plan) else Plan.load(plan)
    start_coordinator(opened, store=store, settings=settings, weights=weights, coordinator_options=coordinator_options)
    chosen = {"max_ongoing_requests": 64, **deployment_options, "name": DEPLOYMENT}
    return serve.deployment(EngineReplica).options(**chosen).bind(settings, plan_to_bytes(opened))


def deploy(
    plan: PlanLike,
    *,
    store: str | os.PathLike[str],
    name: str = "onnx-refit",
    num_replicas: int = 2,
    route_prefix: str | None = None,
    settings: ClusterSettings | None = None,
    weights: WeightsLike | None = None,
    coordinator_options: Mapping[str, Any] | None = None,
    **deployment_options: Any,
) -> ClusterHandle:
    """Bring a plan up on Ray Serve, and wait until its replicas answer. ``ray.init`` comes before.

    Where it is up already, Serve replaces its replicas one after the other.

    Args:
        plan: see ``application``.
        store: see ``application``.
        name: name of the Serve application.
        num_replicas: how many replicas.
        route_prefix: where Serve's HTTP proxies answer for it, over the Open Inference Protocol; None for nowhere.
        settings: more settings; their name is replaced by ``name``.
        weights: see ``application``.
        coordinator_options: see ``application``.
        deployment_options: see ``application``.

    Raises:
        As ``start_coordinator``.
    """
    chosen = ClusterSettings(name) if settings is None else replace(settings, name=name)
    made = application(
        plan,
        store=store,
        settings=chosen,
        weights=weights,
        coordinator_options=coordinator_options,
        num_replicas=num_replicas,
        **deployment_options,
    )
    serve.run(made, name=name, route_prefix=route_prefix)
    return connect(name)


def remove(name: str) -> None:
    """End a deployment and its coordinator; the store is free for others when this returns."""
    serve.delete(name)
    with contextlib.suppress(ValueError, RayActorError):
        actor = ray.get_actor(coordinator_name(name), namespace=NAMESPACE)
        # Ray calls an actor dead a moment before its process has ended, so the store is closed first.
        ray.get(actor.close.remote())
        ray.kill(actor, no_restart=True)


def _require(refusal: Refusal | None) -> None:
    if refusal is not None:
        raise refusal.error()
