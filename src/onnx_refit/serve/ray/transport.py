"""Weights in Ray's object store: put once, fetched once by each machine, mapped by every process there."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import ray
from ray.exceptions import RayError

from onnx_refit.errors import WeightsError
from onnx_refit.plan.plan import Plan
from onnx_refit.serve.cluster.incoming import Transport
from onnx_refit.serve.cluster.parcel import Parcel


@dataclass(frozen=True)
class Shipment:
    """A reference to weights in the object store. Inside an object, so that Ray passes it on instead of the weights.

    Attributes:
        ref: the reference; whoever made it has to live until the weights were fetched.
    """

    ref: ray.ObjectRef[Parcel]


def ship(parcel: Parcel) -> Shipment:
    """Put weights into the object store of this machine."""
    return Shipment(ray.put(parcel))


def receive(shipment: Shipment) -> Parcel:
    """Weights from the object store, read-only and mapped, not copied; WeightsError if they were lost."""
    try:
        return cast("Parcel", ray.get(shipment.ref))
    except RayError as error:
        text = str(error).strip().partition("\n")[0]
        raise WeightsError(f"the weights were lost on the way: {text}", hint="Send them again") from error


TRANSPORT = Transport(ship, receive)


def plan_to_bytes(plan: Plan) -> bytes:
    """A plan without its weights, as a file's bytes."""
    with tempfile.TemporaryDirectory(prefix="onnx-refit-") as directory:
        return plan.save(Path(directory) / "stripped.plan", strip=True).read_bytes()


def plan_from_bytes(data: bytes) -> Plan:
    """The plan again; PlanError if it is damaged."""
    with tempfile.TemporaryDirectory(prefix="onnx-refit-") as directory:
        path = Path(directory) / "stripped.plan"
        path.write_bytes(data)
        return Plan.load(path)
