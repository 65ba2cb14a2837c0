"""From a portable compiled model to what this host runs: optimised, blocked, every weight with its recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from onnx_refit.engine.onnxruntime.blocked import block_size
from onnx_refit.engine.onnxruntime.forms import Forms
from onnx_refit.engine.onnxruntime.nchwc import rewrite
from onnx_refit.engine.onnxruntime.offline import CANDIDATES, optimise_file
from onnx_refit.engine.onnxruntime.options import OnnxRuntimeOptions
from onnx_refit.plan.compiled import CompiledModel, Decision, Verdict
from onnx_refit.plan.trace.compose import resolve
from onnx_refit.plan.trace.lower import lower
from onnx_refit.plan.trace.recipes import Recipe, mapped, whole
from onnx_refit.plan.trace.trace import Traced, Tracer
from onnx_refit.tensors import TensorSpec

# The name spaces of tensors that recipes read. Sources and computed values come from outside; the rest is staged.
SOURCE, COMPUTED, ENGINE, TRACED = "source:", "computed:", "engine:", "traced:"


@dataclass(frozen=True)
class Specialised:
    """What a host runs.

    Attributes:
        model: the inference graph, to be run as it is; its weights are graph inputs.
        buffers: weight of ``model`` -> its recipe, over sources, computed values and staged tensors.
        staged: tensors made on the way, in order: name -> recipe.
        computed: values of the refit program's graph that it has to compute.
        decisions: why it is as it is.
    """

    model: onnx.ModelProto
    buffers: Mapping[str, Recipe]
    staged: Mapping[str, Recipe]
    computed: Mapping[str, TensorSpec]
    decisions: tuple[Decision, ...]


def specialise(compiled: CompiledModel, options: OnnxRuntimeOptions) -> Specialised:
    """Optimise a compiled model for this host.

    Raises:
        EngineError: ONNX Runtime refuses the graph.
    """
    lowered = lower(compiled)
    computed = frozenset(lowered.computed)
    definitions: dict[str, Recipe] = {}
    for name, recipe in lowered.recipes.items():
        spaces = {s: (COMPUTED if s in computed else SOURCE) + s for s in recipe.sources}
        definitions[ENGINE + name] = mapped(recipe, spaces)
    traced = _traced(compiled, options)
    for name, recipe in traced.recipes.items():
        definitions[TRACED + name] = mapped(recipe, {s: ENGINE + s for s in recipe.sources})
    weights = {name: recipe.spec for name, recipe in traced.recipes.items()}
    block = block_size()
    forms = Forms(options.threads, block)
    rewritten = rewrite(traced.model, weights, forms.prefer_blocked, block) if options.optimise and block > 1 else None
    model = traced.model if rewritten is None else rewritten.model
    wanted: dict[str, Recipe] = {}
    for value in model.graph.input:
        if rewritten is not None and value.name in rewritten.recipes:
            recipe = rewritten.recipes[value.name]
            wanted[value.name] = mapped(recipe, {s: TRACED + s for s in recipe.sources})
        elif value.name in traced.recipes:
            wanted[value.name] = definitions[TRACED + value.name]
    buffers: dict[str, Recipe] = {}
    staged: dict[str, Recipe] = {}
    for name, recipe in wanted.items():
        buffers[name], before = resolve(recipe, definitions)
        staged.update(before)
    decisions = (*traced.decisions, *forms.decisions, *_blocking(0 if rewritten is None else rewritten.count))
    return Specialised(model, buffers, staged, lowered.computed, decisions)


def _traced(compiled: CompiledModel, options: OnnxRuntimeOptions) -> Traced:
    if options.optimise:
        return Tracer(compiled.activation, compiled.engine_weights, optimise_file).trace(CANDIDATES)
    return Traced(compiled.activation, {s.name: whole(s, s.name) for s in compiled.engine_weights}, ())


def _blocking(count: int) -> Sequence[Decision]:
    if not count:
        return ()
    return (
        Decision(
            f"{count} matrix products",
            "run as blocked 1x1 convolutions",
            Verdict.ACCEPTED,
            "their weights are plain data in that form, as fast as prepacked ones",
        ),
    )
