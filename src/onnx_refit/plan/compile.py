"""The refit compiler's front end: a model in, an activation graph and a refit program out. It knows no backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from onnx_refit.errors import UnsupportedModelError
from onnx_refit.model.graph import opset
from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.plan.draft import run_draft_passes
from onnx_refit.plan.finish import finish
from onnx_refit.plan.folds import all_folds
from onnx_refit.plan.folds.framework import FoldPass
from onnx_refit.plan.folds.recipes import Recipes
from onnx_refit.plan.hoist import Hoist, ResolveCastLike
from onnx_refit.plan.promote import promote
from onnx_refit.tensors import Array

OLDEST_OPSET = 7


@dataclass(frozen=True)
class CompileOptions:
    """What the caller may ask of the compiler.

    Attributes:
        refittable: names of tensors to make refittable that the rules would leave constant (one-element parameters,
            integer tables).
        constant: names of tensors to leave constant that the rules would make refittable.
        base_dir: the folder of the model file, where weights are stored outside it.
    """

    refittable: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    base_dir: Path | None = None


@dataclass(frozen=True)
class Compilation:
    """A compiled model and the weights that the user's model held.

    Attributes:
        compiled: the portable engine.
        weights: source weight name -> its value in the user's model; read-only arrays, maps of external files where
            the model stores them so.
    """

    compiled: CompiledModel
    weights: Mapping[str, Array]


def compile_model(model: ModelProto, options: CompileOptions | None = None) -> Compilation:
    """Compile a prepared model; the model itself stays as it is.

    Args:
        model: a valid model of opset 7 or newer. It may have been loaded without its external data.
        options: see ``CompileOptions``.

    Raises:
        UnsupportedModelError: the model's opset is older than 7.
        ModelError: an option names a tensor that the model does not have, or external data cannot be read.
    """
    options = options or CompileOptions()
    version = opset(model)
    if version is not None and version < OLDEST_OPSET:
        raise UnsupportedModelError(
            f"operator set {version} is older than {OLDEST_OPSET}, the first with today's broadcasting",
            where=model.graph.name or "model",
            hint="Convert the model with onnx.version_converter",
        )
    promoted = promote(model, options.refittable, options.constant, options.base_dir)
    recipes = Recipes(promoted.draft.program)
    run_draft_passes(promoted.draft, (ResolveCastLike(), Hoist(), FoldPass(all_folds(recipes, promoted.weights))))
    compiled = finish(promoted.draft, promoted.sources)
    weights = {source.spec.name: promoted.weights[source.spec.name] for source in compiled.sources}
    return Compilation(compiled, weights)
