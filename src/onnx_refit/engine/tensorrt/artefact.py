"""What the plan file keeps of TensorRT: its own plan, and what must be the same for it to be used again."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from onnx_refit.engine.tensorrt.bindings import Bindings
from onnx_refit.engine.tensorrt.options import HardwareCompatibility, TensorRtOptions
from onnx_refit.engine.tensorrt.profiles import Profile
from onnx_refit.plan.compiled import CompiledModel

_MAGIC = b"onnx-refit/tensorrt/1\n"
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Conditions:
    """What a TensorRT plan was built from and for.

    Attributes:
        package: ``"tensorrt"`` or ``"tensorrt_rtx"``.
        version: its version.
        capability: the compute capability of the GPU, ``"12.0"``.
        hardware: the hardware compatibility asked for.
        version_compatible: whether later versions may run it.
        graph: sha256 of the activation graph and the engine weights' names.
        profile: the shapes it takes.
        stripped: whether refittable weights were left out.
        tf32: whether TF32 was allowed.
        workspace: the workspace limit, if any.
    """

    package: str
    version: str
    capability: str
    hardware: str
    version_compatible: bool
    graph: str
    profile: Mapping[str, list[list[int]]]
    stripped: bool
    tf32: bool
    workspace: int | None


def conditions_of(
    bindings: Bindings, capability: tuple[int, int], compiled: CompiledModel, profile: Profile, options: TensorRtOptions
) -> Conditions:
    """The conditions of a plan built here and now."""
    digest = hashlib.sha256(compiled.activation.SerializeToString(deterministic=True))
    for spec in compiled.engine_weights:
        digest.update(f"{spec}\0".encode())
    return Conditions(
        package="tensorrt_rtx" if bindings.is_rtx else "tensorrt",
        version=bindings.version,
        capability=f"{capability[0]}.{capability[1]}",
        hardware=options.hardware.value,
        version_compatible=options.version_compatible,
        graph=digest.hexdigest(),
        profile={
            name: [list(shapes.min), list(shapes.opt), list(shapes.max)] for name, shapes in profile.shapes.items()
        },
        stripped=options.strip,
        tf32=options.tf32,
        workspace=options.workspace,
    )


def pack(conditions: Conditions, plan: bytes) -> bytes:
    """One artefact of the conditions and TensorRT's plan."""
    header = json.dumps(asdict(conditions), sort_keys=True).encode()
    return b"".join((_MAGIC, _LENGTH.pack(len(header)), header, plan))


def unpack(artefact: bytes) -> tuple[Conditions, bytes] | None:
    """The conditions and the plan of an artefact; None for bytes that are none (it is a cache: then build again)."""
    start = len(_MAGIC) + _LENGTH.size
    if not artefact.startswith(_MAGIC) or len(artefact) < start:
        return None
    end = start + int(_LENGTH.unpack_from(artefact, len(_MAGIC))[0])
    try:
        header = json.loads(artefact[start:end])
        return Conditions(**{field.name: header[field.name] for field in fields(Conditions)}), artefact[end:]
    except (ValueError, KeyError, TypeError):
        return None


def obstacle(held: Conditions, here: Conditions) -> str | None:
    """Why a plan cannot be used here, a clause without a final stop; None if it can."""
    if held.graph != here.graph:
        return "it was built from another graph"
    if held.package != here.package:
        return f"it was built by {held.package}, here is {here.package}"
    if held.version != here.version and not _later_version_runs(held, here):
        return f"it was built by version {held.version}, here is {here.version}"
    if not _same_architecture(held, here):
        return f"it was built for compute capability {held.capability}, here is {here.capability}"
    for name in ("profile", "stripped", "tf32", "workspace", "hardware", "version_compatible"):
        if getattr(held, name) != getattr(here, name):
            return f"it was built with another {name.replace('_', ' ')}"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def _later_version_runs(held: Conditions, here: Conditions) -> bool:
    old, new = _numbers(held.version), _numbers(here.version)
    return held.version_compatible and old[:1] == new[:1] and old <= new


def _same_architecture(held: Conditions, here: Conditions) -> bool:
    if held.capability == here.capability:
        return True
    if held.hardware != HardwareCompatibility.AMPERE_PLUS.value:
        return False
    return min(_numbers(held.capability), _numbers(here.capability)) >= (8, 0)
