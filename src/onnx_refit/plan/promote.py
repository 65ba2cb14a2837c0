"""Promote: every tensor of the model becomes a named value of the main graph, and the refittable ones source weights.

Initializers, sparse initializers, Constant nodes and ConstantOfShape nodes, of the main graph, of the bodies of If,
Loop and Scan, and of model-local functions (which are inlined) are treated alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import ModelProto

from onnx_refit.errors import ModelError
from onnx_refit.model.graph import Names, all_graphs, attribute, value_names
from onnx_refit.plan.compiled import SourceWeight
from onnx_refit.plan.draft import Draft
from onnx_refit.plan.judge import Judge, Use
from onnx_refit.plan.program import ProgramBuilder
from onnx_refit.plan.strip import Stored, strip
from onnx_refit.tensors import Array, dtype_name, is_floating, spec_of


@dataclass(frozen=True)
class Promoted:
    """The draft with all tensors promoted, the source weights and their first values."""

    draft: Draft
    sources: tuple[SourceWeight, ...]
    weights: Mapping[str, Array]


def promote(
    model: ModelProto, refittable: Collection[str] = (), constant: Collection[str] = (), base_dir: Path | None = None
) -> Promoted:
    """Promote every tensor of the model; the model itself stays as it is.

    Args:
        model: the user's model, prepared, opset 7 or newer.
        refittable: names of tensors to make refittable that the rules would leave constant.
        constant: names of tensors to leave constant that the rules would make refittable.
        base_dir: the folder of external data.

    Raises:
        ModelError: a name is not in the model, or external data cannot be read.
    """
    bare, tensors = strip(model, base_dir)
    if len(bare.functions):
        bare, more = strip(onnx.inliner.inline_local_functions(bare), base_dir)
        tensors = {**tensors, **more}
    _fill_constant_of_shape(bare, tensors)
    _check_names(tensors, refittable, constant)
    names = Names({*value_names(bare.graph), *tensors, *(node.name for g in all_graphs(bare.graph) for node in g.node)})
    draft = Draft(bare, ProgramBuilder(bare.opset_import, bare.ir_version, names), names)
    for function in bare.functions:
        draft.reject(function.name, "inline the function", "it uses other operator versions than the model")
    return _sort(draft, tensors, frozenset(refittable), frozenset(constant))


def uses_of(draft: Draft) -> dict[str, list[Use]]:
    """Value name -> the (node, input index) pairs that read it, over all graphs."""
    uses: dict[str, list[Use]] = {}
    for node in draft.nodes():
        for index, name in enumerate(node.input):
            if name:
                uses.setdefault(name, []).append((node, index))
    return uses


def _sort(draft: Draft, tensors: Mapping[str, Stored], wished: frozenset[str], refused: frozenset[str]) -> Promoted:
    uses = uses_of(draft)
    outputs = {value.name for graph in draft.graphs() for value in graph.output}
    judge = Judge(tensors, uses)
    sources, weights, silent = [], {}, 0
    for name, stored in tensors.items():
        if name not in uses and name not in outputs:
            if is_floating(dtype_name(stored.array.dtype)):
                draft.reject(name, "make refittable", "nothing reads it")
            continue
        reason = judge.reason_constant(name)
        if name in refused:
            reason = "the caller asked for a constant"
        if reason is None or name in wished:
            array = np.asarray(stored.array, order="C")
            draft.program.add_source(spec_of(name, array))
            readers = tuple(f"{node.name} ({node.op_type})[{index}]" for node, index in uses.get(name, []))
            sources.append(SourceWeight(spec_of(name, array), readers, stored.origin))
            weights[name] = array
            continue
        draft.program.add_constant(stored.array, name)
        if stored.origin == "constant" and not is_floating(dtype_name(stored.array.dtype)):
            silent += 1
        else:
            draft.reject(name, "make refittable", reason)
    if silent:
        draft.reject("Constant nodes", "make refittable", f"{silent} hold integers, truth values or text")
    return Promoted(draft, tuple(sources), weights)


def _fill_constant_of_shape(model: ModelProto, tensors: dict[str, Stored]) -> None:
    """Replace ConstantOfShape nodes of known shape by tensors (all versions; the attribute ``value`` defaults to 0)."""
    for graph in all_graphs(model.graph):
        filled = []
        for index, node in enumerate(graph.node):
            if node.op_type != "ConstantOfShape" or node.input[0] not in tensors:
                continue
            shape = tuple(int(d) for d in tensors[node.input[0]].array)
            value = attribute(node, "value")
            one: Array = np.zeros(1, np.float32)
            if isinstance(value, onnx.TensorProto):
                one = onnx.numpy_helper.to_array(value)
            array = np.full(shape, one.reshape(-1)[0], one.dtype) if one.any() else np.zeros(shape, one.dtype)
            tensors[node.output[0]] = Stored(array, "constant-of-shape")
            filled.append(index)
        for index in reversed(filled):
            del graph.node[index]


def _check_names(tensors: Mapping[str, Stored], *wishes: Collection[str]) -> None:
    for name in _flat(wishes):
        if name not in tensors:
            near = get_close_matches(name, tensors, 3)
            hint = f"Did you mean {', '.join(map(repr, near))}?" if near else None
            raise ModelError("the model has no tensor of this name", where=name, hint=hint)


def _flat(wishes: Collection[Collection[str]]) -> Iterator[str]:
    for names in wishes:
        yield from names
