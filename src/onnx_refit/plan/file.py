"""The plan file: one safetensors file that any safetensors reader can open.

Weights are tensors named ``weights/NAME`` in their own dtype and shape. Graphs and tables are byte tensors named
``plan/…``. The header's metadata says what it is:

    format            "onnx-refit plan"
    format_version    "2"
    manifest          JSON: producer, engine, fingerprints, tables, the sha256 of every section and weight
    manifest_sha256   of the text of the manifest

So a plan is read by mapping it into memory; nothing in it is executed, and no part of it is trusted before its digest
was compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from sys import intern
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from onnx_refit._version import __version__
from onnx_refit.errors import ModelError, PlanFormatError, WeightsError
from onnx_refit.model.graph import has_external_tensors
from onnx_refit.model.vocabulary import VocabularyMap
from onnx_refit.plan.compiled import CompiledModel, Decision, RefitProgram, SourceWeight, Verdict
from onnx_refit.plan.content import PlanContent
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype
from onnx_refit.weights.name_map import NameMap
from onnx_refit.weights.sources.arrays import ArraysSource
from onnx_refit.weights.sources.safetensors import SafetensorsSource
from onnx_refit.weights.write import write_safetensors

FORMAT = "onnx-refit plan"
FORMAT_VERSION = 2
SUFFIX = ".plan"

_WEIGHT = "weights/"
_SECTION = "plan/"
_ARTEFACT = "plan/artefact/"
_AGAIN = "The file is damaged: copy it again, or build the plan again"
# Stored as bytes: safetensors has no name for these.
_PACKED = {"int4": np.dtype(np.int8), "uint4": np.dtype(np.uint8)}


def write_plan(plan: PlanContent, path: Path, *, strip: bool) -> Path:
    """Write a plan; see ``Plan.save``."""
    sections = _sections(plan)
    weights = {} if strip or plan.weights is None else {n: _storable(a) for n, a in plan.weights.items()}
    stored = {**{_WEIGHT + name: array for name, array in weights.items()}, **sections}
    manifest = {
        "producer": f"onnx-refit {__version__}",
        "engine": plan.engine,
        "model_fingerprint": plan.model_fingerprint,
        "stripped": bool(strip or plan.weights is None),
        "sources": [
            {**_spec_json(source.spec), "uses": list(source.uses), "origin": source.origin}
            for source in plan.compiled.sources
        ],
        "engine_weights": [_spec_json(spec) for spec in plan.compiled.engine_weights],
        "inputs": [_spec_json(spec) for spec in plan.compiled.inputs],
        "outputs": [_spec_json(spec) for spec in plan.compiled.outputs],
        "passthrough": dict(plan.compiled.program.passthrough),
        "dependencies": {name: sorted(on) for name, on in plan.compiled.program.dependencies.items()},
        "decisions": [
            {"subject": d.subject, "action": d.action, "verdict": d.verdict.value, "reason": d.reason}
            for d in plan.compiled.decisions
        ],
        "derived": {name: list(factors) for name, factors in plan.compiled.derived.items()},
        "sha256": _digests(stored),
    }
    text = json.dumps(manifest)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "manifest": text,
        "manifest_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    write_safetensors(path, ArraysSource(stored), metadata)
    return path


def _sections(plan: PlanContent) -> dict[str, Array]:
    sections = {_SECTION + "activation.onnx": plan.compiled.activation.SerializeToString(deterministic=True)}
    if plan.compiled.program.model is not None:
        sections[_SECTION + "program.onnx"] = plan.compiled.program.model.SerializeToString(deterministic=True)
    for kind, maps in (("preprocessor", plan.preprocessors), ("postprocessor", plan.postprocessors)):
        for index, vocabulary in enumerate(maps):
            sections[f"{_SECTION}{kind}/{index:03d}.json"] = vocabulary.to_json().encode()
    if plan.names is not None:
        sections[_SECTION + "names.json"] = json.dumps(plan.names.to_json()).encode()
    for engine, artefact in plan.artefacts.items():
        sections[_ARTEFACT + engine] = artefact
    return {name: np.frombuffer(data, np.uint8) for name, data in sections.items()}


def _storable(array: Array) -> Array:
    packed = _PACKED.get(array.dtype.name)
    return array if packed is None else array.view(packed)


def _digests(arrays: Mapping[str, Array]) -> dict[str, str]:
    """Name -> sha256; hashlib lets go of the interpreter lock, so two threads help."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(arrays, pool.map(_digest, arrays.values()), strict=True))


def _digest(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def read_plan(path: Path, *, verify: bool) -> PlanContent:
    """Read a plan; see ``Plan.load``."""
    try:
        file = SafetensorsSource(path)
    except WeightsError as error:
        if type(error) is WeightsError:  # the operating system refused: no such file, no permission
            raise
        if _looks_like_onnx(path):
            raise PlanFormatError(
                "this is an ONNX model, not a plan", where=path, hint="Build a plan from it: onnx-refit build"
            ) from error
        raise PlanFormatError(f"this is no whole plan: {error.message}", where=path, hint=_AGAIN) from error
    metadata = file.metadata
    if metadata.get("format") != FORMAT:
        raise PlanFormatError("this is a safetensors file, but not a plan", where=path)
    version = metadata.get("format_version")
    if version != str(FORMAT_VERSION):
        raise PlanFormatError(
            f"the plan is in version {version} of the format, this library reads version {FORMAT_VERSION}",
            where=path,
            hint="Build the plan again with this version of onnx-refit",
        )
    try:
        text = metadata["manifest"]
        if metadata["manifest_sha256"] != hashlib.sha256(text.encode()).hexdigest():
            raise PlanFormatError("the manifest is damaged", where=path, hint=_AGAIN)
        manifest = json.loads(text)
        digests: dict[str, str] = manifest["sha256"]
        plan = _assemble(path, file, manifest, digests)
        _require_consistent(plan, path)
    except (KeyError, TypeError, ValueError, AttributeError, DecodeError, WeightsError, ModelError) as error:
        if isinstance(error, PlanFormatError):
            raise
        raise PlanFormatError(f"the plan's tables do not hold together: {error}", where=path, hint=_AGAIN) from error
    if verify and plan.weights is not None:
        found = _digests({_WEIGHT + name: _storable(array) for name, array in plan.weights.items()})
        damaged = [name for name, digest in found.items() if digests[name] != digest]
        if damaged:
            raise PlanFormatError(
                f"{len(damaged)} weights are damaged, the first is {damaged[0][len(_WEIGHT) :]!r}",
                where=path,
                hint=_AGAIN,
            )
    return plan


def is_plan(path: Path) -> bool:
    """Whether a file says of itself that it is a plan, of whatever version."""
    try:
        return SafetensorsSource(path).metadata.get("format") == FORMAT
    except WeightsError:
        return False


def _looks_like_onnx(path: Path) -> bool:
    """Whether the first field of the file is the IR version of an ONNX model."""
    with path.open("rb") as file:
        start = file.read(2)
    return len(start) == 2 and start[0] == 0x08 and start[1] <= onnx.IR_VERSION + 10


def _require_consistent(plan: PlanContent, path: Path) -> None:
    """PlanFormatError unless the tables name each other's entries only."""
    compiled = plan.compiled
    for model in (compiled.activation, compiled.program.model):
        if model is not None and has_external_tensors(model):
            raise PlanFormatError("a graph of the plan reads from other files", where=path, hint=_AGAIN)
    sources = {source.spec.name for source in compiled.sources}
    engine = {spec.name for spec in compiled.engine_weights}
    program = compiled.program
    on = {name for names in program.dependencies.values() for name in names}
    declared = {value.name for value in compiled.activation.graph.input}
    constants = {tensor.name for tensor in compiled.activation.graph.initializer}
    factors = {factor for pair in compiled.derived.values() for factor in pair}
    if not (
        set(program.passthrough) <= engine
        and set(program.passthrough.values()) <= sources
        and set(program.dependencies) <= engine
        and on <= sources
        and engine <= declared
        and factors <= sources | constants
    ):
        raise PlanFormatError("the plan's tables name what is not there", where=path, hint=_AGAIN)


def _assemble(path: Path, file: SafetensorsSource, manifest: dict[str, Any], digests: dict[str, str]) -> PlanContent:
    if set(file.specs) != set(digests):
        raise PlanFormatError("the file does not hold what its manifest lists", where=path, hint=_AGAIN)
    sections: dict[str, bytes] = {}
    for name in file.specs:
        if name.startswith(_SECTION):
            data = file.read(name)
            if _digest(data) != digests[name]:
                raise PlanFormatError(f"the section {name!r} is damaged", where=path, hint=_AGAIN)
            sections[name] = data.tobytes()
    program = sections.get(_SECTION + "program.onnx")
    compiled = CompiledModel(
        activation=onnx.load_model_from_string(sections[_SECTION + "activation.onnx"]),
        program=RefitProgram(
            model=None if program is None else onnx.load_model_from_string(program),
            passthrough=dict(manifest["passthrough"]),
            dependencies={intern(name): frozenset(map(intern, on)) for name, on in manifest["dependencies"].items()},
        ),
        sources=tuple(
            SourceWeight(_spec(entry), tuple(entry["uses"]), entry["origin"]) for entry in manifest["sources"]
        ),
        engine_weights=tuple(map(_spec, manifest["engine_weights"])),
        inputs=tuple(map(_spec, manifest["inputs"])),
        outputs=tuple(map(_spec, manifest["outputs"])),
        decisions=tuple(
            Decision(d["subject"], d["action"], Verdict(d["verdict"]), d["reason"]) for d in manifest["decisions"]
        ),
        derived={name: (left, right) for name, (left, right) in manifest["derived"].items()},
    )
    names = sections.get(_SECTION + "names.json")
    return PlanContent(
        engine=manifest["engine"],
        compiled=compiled,
        weights=None if manifest["stripped"] else _weights(path, file, compiled.sources),
        model_fingerprint=manifest["model_fingerprint"],
        preprocessors=_maps(sections, "preprocessor"),
        postprocessors=_maps(sections, "postprocessor"),
        names=None if names is None else NameMap.from_json(json.loads(names)),
        artefacts={n[len(_ARTEFACT) :]: data for n, data in sections.items() if n.startswith(_ARTEFACT)},
        path=path,
    )


def _maps(sections: Mapping[str, bytes], kind: str) -> tuple[VocabularyMap, ...]:
    names = sorted(name for name in sections if name.startswith(f"{_SECTION}{kind}/"))
    return tuple(VocabularyMap.from_json(sections[name]) for name in names)


def _weights(path: Path, file: SafetensorsSource, sources: tuple[SourceWeight, ...]) -> dict[str, Array]:
    weights: dict[str, Array] = {}
    for source in sources:
        spec = source.spec
        array = file.read(_WEIGHT + spec.name)
        wanted = numpy_dtype(spec.dtype)
        if spec.dtype in _PACKED:
            array = array.view(wanted)
        if array.dtype != wanted or array.shape != spec.shape:
            raise PlanFormatError(f"the weight {spec.name!r} is not as its table says", where=path, hint=_AGAIN)
        weights[spec.name] = array
    return weights


def _spec_json(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": None if spec.shape is None else list(spec.shape)}


def _spec(entry: Mapping[str, Any]) -> TensorSpec:
    shape = entry["shape"]
    numpy_dtype(entry["dtype"])
    return TensorSpec(intern(entry["name"]), intern(entry["dtype"]), None if shape is None else tuple(shape))
