"""What a plan holds: everything that compilation made."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Self

from onnx import ModelProto

from onnx_refit.errors import PlanError, PlanMismatchError
from onnx_refit.files import read_error
from onnx_refit.model.graph import without_initializers
from onnx_refit.model.vocabulary import VocabularyMap
from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.tensors import Array, TensorSpec, spec_of
from onnx_refit.weights.name_map import NameMap


def model_fingerprint(model: ModelProto | str | os.PathLike[str]) -> str:
    """Sha256 (hex) of a model: of the file as it stands, or of a model in memory, tensor after tensor.

    External data is not read: two models that differ only there have the same fingerprint. A file and the model read
    from it have different ones.

    Raises:
        ReadError: the file cannot be read.
    """
    if isinstance(model, ModelProto):
        digest = hashlib.sha256(without_initializers(model).SerializeToString(deterministic=True))
        for tensor in model.graph.initializer:
            data = tensor.SerializeToString(deterministic=True)
            digest.update(b"initializer %d:" % len(data))
            digest.update(data)
        return digest.hexdigest()
    try:
        with Path(model).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise read_error(Path(model), error) from error


@dataclass(frozen=True)
class PlanContent:
    """A compiled model: graphs, refit program, tables, and (unless stripped) the weights it was built with.

    Attributes:
        engine: name of the engine it was built for.
        compiled: the portable engine.
        weights: source weight name -> array (read-only, memory-mapped when loaded from a file); None if stripped.
        model_fingerprint: sha256 of the model the plan was built from.
        preprocessors: host-side maps from the model's original (string) inputs to the engine's inputs.
        postprocessors: host-side maps from the engine's outputs to the model's original ones.
        names: how a checkpoint's tensor names map to the source weights, where that was asked for.
        artefacts: engine name -> cached result of specialising for a host; a cache, never needed.
        path: the file it was loaded from, if any.
    """

    engine: str
    compiled: CompiledModel
    weights: Mapping[str, Array] | None
    model_fingerprint: str
    preprocessors: tuple[VocabularyMap, ...] = ()
    postprocessors: tuple[VocabularyMap, ...] = ()
    names: NameMap | None = None
    artefacts: Mapping[str, bytes] = field(default_factory=dict)
    path: Path | None = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The engine's inputs (after preprocessing)."""
        return self.compiled.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The engine's outputs."""
        return self.compiled.outputs

    @cached_property
    def refittable(self) -> Mapping[str, TensorSpec]:
        """Name -> spec of every refittable weight."""
        return {source.spec.name: source.spec for source in self.compiled.sources}

    @property
    def stripped(self) -> bool:
        """Whether the plan holds no weights."""
        return self.weights is None

    def require_weights(self) -> Mapping[str, Array]:
        """The weights the plan holds; PlanError if it is stripped."""
        if self.weights is None:
            raise PlanError(
                "the plan is stripped: it holds no weights",
                where=self.path,
                hint="Give it a complete checkpoint to start with",
            )
        return self.weights

    @property
    def weight_bytes(self) -> int:
        """Bytes of all refittable weights."""
        return sum(spec.nbytes for spec in self.refittable.values())

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 (hex) of the compiled part: graphs and program, not the weights."""
        digest = hashlib.sha256()
        digest.update(self.compiled.activation.SerializeToString(deterministic=True))
        program = self.compiled.program
        if program.model is not None:
            digest.update(program.model.SerializeToString(deterministic=True))
        for engine_weight, source in sorted(program.passthrough.items()):
            digest.update(f"{engine_weight}\0{source}\0".encode())
        return digest.hexdigest()

    def with_weights(self, weights: Mapping[str, Array]) -> Self:
        """The same plan with other weights; PlanMismatchError unless they are exactly the refittable ones."""
        expected = self.refittable
        wrong = [name for name, spec in expected.items() if name not in weights or spec_of(name, weights[name]) != spec]
        extra = [name for name in weights if name not in expected]
        if wrong or extra:
            raise PlanMismatchError(
                f"the weights do not fit the plan: {len(wrong)} missing or of another dtype or shape "
                f"({', '.join(wrong[:3])}), {len(extra)} unknown ({', '.join(extra[:3])})"
            )
        # What the caller can write to is copied; maps of files are read-only.
        own = {name: array.copy() if array.flags.writeable else array for name, array in weights.items()}
        return replace(self, weights=own, path=None)

    def with_artefact(self, engine: str, artefact: bytes) -> Self:
        """The same plan with a cached host specialisation."""
        return replace(self, artefacts={**self.artefacts, engine: artefact})

    def require_model(self, fingerprint: str) -> None:
        """PlanMismatchError unless the plan was built from the model with this fingerprint."""
        if fingerprint != self.model_fingerprint:
            raise PlanMismatchError(
                f"the plan was built from another model (its fingerprint is {self.model_fingerprint[:12]}, "
                f"the model's is {fingerprint[:12]})",
                where=self.path,
                hint="Build the plan again",
            )

    def __repr__(self) -> str:
        weights = "stripped" if self.stripped else f"{self.weight_bytes / 1e6:.2f} MB"
        return f"<Plan for {self.engine}: {len(self.refittable)} refittable weights, {weights}>"
