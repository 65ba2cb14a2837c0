"""A host specialisation as bytes, so that the next load on the same host optimises nothing.

An npz archive (NumPy arrays, never pickled): the ONNX graph, a JSON document, and the positions of gathers.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import zipfile
from collections.abc import Mapping
from pathlib import Path
from sys import intern
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from onnx_refit._version import __version__
from onnx_refit.engine.onnxruntime.blocked import block_size
from onnx_refit.engine.onnxruntime.native import make_session, session_options
from onnx_refit.engine.onnxruntime.options import OnnxRuntimeOptions
from onnx_refit.engine.onnxruntime.packed import Block, Packed
from onnx_refit.engine.onnxruntime.specialise import Specialised, specialise
from onnx_refit.model.graph import has_external_tensors
from onnx_refit.plan.compiled import CompiledModel, Decision, Verdict
from onnx_refit.plan.trace.recipes import Gather, Operand, Piece, Recipe, Walk
from onnx_refit.tensors import Array, TensorSpec

_FORMAT = 4


def host_key(compiled: CompiledModel, *, optimise: bool, in_place: bool = True) -> str:
    """What a specialisation depends on: the compiled model, this package, ONNX Runtime and the processor."""
    digest = hashlib.sha256()
    digest.update(compiled.activation.SerializeToString(deterministic=True))
    if compiled.program.model is not None:
        digest.update(compiled.program.model.SerializeToString(deterministic=True))
    digest.update(json.dumps(sorted(compiled.program.passthrough.items())).encode())
    parts = (_FORMAT, __version__, ort.__version__, block_size(), _processor(), optimise, in_place, digest.hexdigest())
    return "|".join(map(str, parts))


def _processor() -> str:
    """The processor's features, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    features = ""
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        features = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    named = f"{platform.machine()} {platform.processor()} {' '.join(sorted(features.split()))}"
    return hashlib.sha256(named.encode()).hexdigest()[:16]


def make(compiled: CompiledModel, options: OnnxRuntimeOptions) -> bytes:
    """What specialising a model for this host gives, as bytes, without an engine.

    Raises:
        EngineError: ONNX Runtime cannot run the model.
    """
    specialised = specialise(compiled, options)
    if specialised.packed is None:  # else sessions were made to prove what they do
        make_session(specialised.model, session_options(options.threads))  # refused now, not when it is loaded
    return dump(specialised, host_key(compiled, optimise=options.optimise, in_place=options.in_place))


def dump(specialised: Specialised, key: str) -> bytes:
    """The specialisation as bytes."""
    arrays: dict[str, Array] = {}
    document: dict[str, Any] = {
        "key": key,
        "buffers": [_recipe_out(recipe, arrays) for recipe in specialised.buffers.values()],
        "staged": [[name, _recipe_out(recipe, arrays)] for name, recipe in specialised.staged.items()],
        "computed": [_spec_out(spec) for spec in specialised.computed.values()],
        "decisions": [[d.subject, d.action, d.verdict.value, d.reason] for d in specialised.decisions],
    }
    if specialised.packed is not None:
        packed = specialised.packed
        document["packed"] = {
            "specs": [_spec_out(spec) for spec in packed.specs],
            "blocks": [[b.weight, b.key, _recipe_out(b.recipe, arrays)] for b in packed.blocks],
            "adopted": [_spec_out(spec) for spec in packed.adopted],
        }
    arrays["document"] = np.frombuffer(json.dumps(document).encode(), np.uint8)
    arrays["model"] = np.frombuffer(specialised.model.SerializeToString(), np.uint8)
    if specialised.second is not None:
        arrays["second"] = np.frombuffer(specialised.second.SerializeToString(), np.uint8)
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def load(data: bytes, key: str) -> Specialised | None:
    """The specialisation, if the bytes hold one made for this key; None otherwise."""
    try:
        _check_stored(data)
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            document = json.loads(archive["document"].tobytes())
            if document["key"] != key:
                return None
            model = _graph(archive["model"])
            second = None
            if "second" in archive:
                second = _graph(archive["second"])
            packed = _packed_in(document["packed"], archive) if "packed" in document else None
            buffers = [_recipe_in(entry, archive) for entry in document["buffers"]]
            staged = {name: _recipe_in(entry, archive) for name, entry in document["staged"]}
            computed = [_spec_in(entry) for entry in document["computed"]]
            decisions = tuple(Decision(s, a, Verdict(v), r) for s, a, v, r in document["decisions"])
    except Exception:  # noqa: BLE001  zipfile, NumPy, JSON and protobuf raise two dozen classes for foreign bytes
        return None  # a damaged artefact costs a second of optimisation, no more
    return Specialised(
        model,
        second,
        packed,
        {recipe.spec.name: recipe for recipe in buffers},
        staged,
        {spec.name: spec for spec in computed},
        decisions,
    )


def _check_stored(data: bytes) -> None:
    """ValueError for an archive that unpacks to more than it is, which none of ours does."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("compressed entries")
    if sum(entry.file_size for entry in entries) > len(data):
        raise ValueError("entries that overlap")


def _graph(array: Array) -> onnx.ModelProto:
    """A graph from its bytes; ValueError if it reads other files."""
    model: onnx.ModelProto = onnx.ModelProto.FromString(array.tobytes())
    if has_external_tensors(model):
        raise ValueError("external data")
    return model


def _packed_in(entry: dict[str, Any], archive: Mapping[str, Array]) -> Packed:
    return Packed(
        tuple(_spec_in(spec) for spec in entry["specs"]),
        tuple(Block(weight, key, _recipe_in(recipe, archive)) for weight, key, recipe in entry["blocks"]),
        tuple(_spec_in(spec) for spec in entry["adopted"]),
    )


def _spec_out(spec: TensorSpec) -> list[Any]:
    return [spec.name, spec.dtype, list(spec.static_shape)]


def _spec_in(entry: list[Any]) -> TensorSpec:
    return TensorSpec(intern(entry[0]), intern(entry[1]), tuple(entry[2]))


def _recipe_out(recipe: Recipe, arrays: dict[str, Array]) -> dict[str, Any]:
    gathers = []
    for gather in recipe.gathers:
        number = len(arrays)
        arrays[f"gather{number}"] = np.stack([gather.to, gather.take])
        gathers.append([gather.source, f"gather{number}"])
    pieces = [
        [list(p.dims), _walk_out(p.target), [[o.name, _walk_out(o.walk)] for o in p.operands]] for p in recipe.pieces
    ]
    return {"spec": _spec_out(recipe.spec), "pieces": pieces, "gathers": gathers}


def _recipe_in(entry: dict[str, Any], archive: Mapping[str, Array]) -> Recipe:
    pieces = tuple(
        Piece(tuple(dims), _walk_in(target), tuple(Operand(intern(name), _walk_in(walk)) for name, walk in operands))
        for dims, target, operands in entry["pieces"]
    )
    gathers = []
    for source, name in entry["gathers"]:
        positions = np.asarray(archive[name], np.int64)
        gathers.append(Gather(intern(source), positions[0], positions[1]))
    return Recipe(_spec_in(entry["spec"]), pieces, tuple(gathers))


def _walk_out(walk: Walk) -> list[Any]:
    return [walk.offset, list(walk.strides)]


def _walk_in(entry: list[Any]) -> Walk:
    return Walk(entry[0], tuple(entry[1]))
