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
from onnx_refit.engine.onnxruntime.packed import Packed, composed, learn
from onnx_refit.engine.onnxruntime.proof import proved
from onnx_refit.engine.onnxruntime.tiers import gains_from_packing
from onnx_refit.plan.compiled import CompiledModel, Decision, Verdict
from onnx_refit.plan.trace.compose import resolve
from onnx_refit.plan.trace.lower import lower
from onnx_refit.plan.trace.recipes import Recipe, mapped, whole
from onnx_refit.plan.trace.related import bias_scales
from onnx_refit.plan.trace.trace import Traced, Tracer
from onnx_refit.tensors import TensorSpec

# The name spaces of tensors that recipes read. Sources and computed values come from outside; the rest is staged.
SOURCE, COMPUTED, ENGINE, TRACED, PLAIN = "source:", "computed:", "engine:", "traced:", "plain:"


@dataclass(frozen=True)
class Specialised:
    """What a host runs.

    Attributes:
        model: the inference graph, to be run as it is; its weights are graph inputs.
        second: the graph of the second tier, with its small matrix products plain, since baked-in weights are
            prepacked; None where no kernel gains from that.
        packed: what the kernels of ``model`` pack, where it is written in place; then there is no second tier.
        buffers: weight of ``model`` or ``second``, or packed tensor -> its recipe, over sources, computed values and
            staged tensors.
        staged: tensors made on the way, in order: name -> recipe.
        computed: values of the refit program's graph that it has to compute.
        decisions: why it is as it is.
    """

    model: onnx.ModelProto
    second: onnx.ModelProto | None
    packed: Packed | None
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
    graphs = [traced.model]
    count = 0
    wanted: dict[str, Recipe] = {name: definitions[TRACED + name] for name in weights}
    if options.optimise and block > 1:
        preferences = [forms.prefer_blocked]
        if gains_from_packing(traced.model, weights):
            preferences.append(forms.surely_blocked)
        rewrites = [rewrite(traced.model, weights, prefer, block) for prefer in preferences]
        graphs, count = [each.model for each in rewrites], rewrites[0].count
        for each in rewrites:
            for name, recipe in each.recipes.items():
                wanted[name] = mapped(recipe, {s: TRACED + s for s in recipe.sources})
    elif gains_from_packing(traced.model, weights):
        graphs.append(traced.model)
    packed: Packed | None = None
    found: tuple[Decision, ...] = ()
    if len(graphs) > 1 and options.in_place:
        packed, found = _in_place(graphs[1], {name: recipe.spec for name, recipe in wanted.items()})
        graphs = graphs[1:] if packed is not None else graphs
    read = {value.name for graph in graphs for value in graph.graph.input}
    wanted = {name: recipe for name, recipe in wanted.items() if name in read}
    buffers: dict[str, Recipe] = {}
    staged: dict[str, Recipe] = {}
    for name, recipe in wanted.items():
        buffers[name], before = resolve(recipe, definitions)
        staged.update(before)
    if packed is not None:
        sizes = {SOURCE + source.spec.name: source.spec.size for source in compiled.sources}
        sizes.update((COMPUTED + name, spec.size) for name, spec in lowered.computed.items())
        _replace(packed, buffers, staged, sizes)
    decisions = (*traced.decisions, *forms.decisions, *_blocking(count), *found)
    second = graphs[1] if len(graphs) > 1 else None
    return Specialised(graphs[0], second, packed, buffers, staged, lowered.computed, decisions)


def _in_place(model: onnx.ModelProto, weights: Mapping[str, TensorSpec]) -> tuple[Packed | None, tuple[Decision, ...]]:
    """What the kernels of the second tier's graph pack, if it can all be written in place; and why (not)."""
    read = {value.name for value in model.graph.input}
    packed = learn(model, {name: spec for name, spec in weights.items() if name in read})
    if packed is None or gains_from_packing(model, weights.keys() - packed.weights):
        reason = "there are kernels whose packed form is not known"
        packed = None
    elif not proved(model, packed):
        reason = "sessions written that way do not answer like others on this host"
        packed = None
    else:
        reason = "proved on random weights: to the bit what ONNX Runtime packs itself, without another session"
    verdict = Verdict.REJECTED if packed is None else Verdict.ACCEPTED
    return packed, (Decision("weights that kernels pack", "write them packed, in place", verdict, reason),)


def _replace(packed: Packed, buffers: dict[str, Recipe], staged: dict[str, Recipe], sizes: Mapping[str, int]) -> None:
    """Packed tensors instead of the weights that are packed."""
    known = {**sizes, **{name: recipe.spec.size for name, recipe in staged.items()}}
    plain = {spec.name: buffers.pop(spec.name) for spec in packed.specs}
    for block in packed.blocks:
        recipe = composed(block, plain[block.weight], known)
        if recipe is None:  # arithmetic, or pieces too small: the weight is made first, then packed
            staged[PLAIN + block.weight] = plain[block.weight]
            recipe = mapped(block.recipe, {block.weight: PLAIN + block.weight})
        buffers[block.name] = recipe


def _traced(compiled: CompiledModel, options: OnnxRuntimeOptions) -> Traced:
    if options.optimise:
        related = bias_scales(compiled)
        return Tracer(compiled.activation, compiled.engine_weights, optimise_file, related).trace(CANDIDATES)
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
