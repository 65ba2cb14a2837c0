"""Preparing a model: rewrite it until an engine can run it, and say what was changed and why."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx
from onnx import ModelProto

from onnx_refit.errors import ModelError
from onnx_refit.model.argmax import ReplaceHardmax, SelectByArgMax
from onnx_refit.model.cleanup import RemoveDropout, RemoveIdentity, RemoveUnusedConstants
from onnx_refit.model.compress import ReplaceCompress
from onnx_refit.model.counting import ReplaceCounters, SimplifyPositions
from onnx_refit.model.extract import ExtractVocabularies
from onnx_refit.model.graph import all_graphs
from onnx_refit.model.load import check_model
from onnx_refit.model.order import SortNodes
from onnx_refit.model.passes import Blocker, Change, Pass, PassResult, run_passes
from onnx_refit.model.vocabulary import VocabularyMap

ENGINES = ("onnxruntime", "cuda", "tensorrt")
"""The engines that a model can be prepared for."""

# What remains in the way of an engine after all passes: operators by engine ("" is the standard domain).
_UNSUPPORTED: dict[str, frozenset[str]] = {
    "onnxruntime": frozenset(),
    "cuda": frozenset({"Compress", "Unique", "StringNormalizer", "TfIdfVectorizer", "StringConcat", "StringSplit"}),
    "tensorrt": frozenset(
        {"Hardmax", "Compress", "Unique", "StringNormalizer", "TfIdfVectorizer", "StringConcat", "StringSplit", "Det"}
    ),
}


@dataclass(frozen=True)
class Prepared:
    """A prepared model and how it came about.

    Attributes:
        model: the rewritten model; refittable weights keep the names they had.
        results: every pass with its result, in order.
        preprocessors: maps the host applies to the inputs before an inference, in order.
        postprocessors: maps the host applies to the outputs after it, in order.
        blockers: what stands in the way of the engine and could not be rewritten; empty for a model that is ready.
    """

    model: ModelProto
    results: tuple[tuple[Pass, PassResult], ...]
    preprocessors: tuple[VocabularyMap, ...] = field(default=())
    postprocessors: tuple[VocabularyMap, ...] = field(default=())
    blockers: tuple[Blocker, ...] = field(default=())

    @property
    def changes(self) -> tuple[Change, ...]:
        """All changes of all passes, in order."""
        return tuple(change for _, result in self.results for change in result.changes)

    @property
    def notes(self) -> tuple[Blocker, ...]:
        """What passes met and left as it was, whether or not the engine minds."""
        return tuple(blocker for _, result in self.results for blocker in result.blockers)


def passes_for(engine: str) -> tuple[Pass, ...]:
    """The passes that make a model ready for an engine; ModelError for an engine not known."""
    if engine not in ENGINES:
        raise ModelError(f"no such engine: {engine}", hint=f"Choose one of {', '.join(ENGINES)}")
    # ONNX Runtime runs mappers itself: what stands in its way is strings at the beginning, not names at the end.
    return (
        SortNodes(),
        ExtractVocabularies(outputs=engine != "onnxruntime"),
        RemoveDropout(),
        RemoveIdentity(),
        ReplaceCounters(),
        SelectByArgMax(),
        ReplaceHardmax(),
        ReplaceCompress(),
        SimplifyPositions(),
        RemoveUnusedConstants(),
    )


def prepare(model: ModelProto, *, for_engine: str = "onnxruntime") -> Prepared:
    """Rewrite a model until an engine can run it.

    Args:
        model: the model; it is not changed.
        for_engine: ``"onnxruntime"``, ``"cuda"`` or ``"tensorrt"``.

    Returns:
        The prepared model, what each pass changed and why, the host-side maps, and what could not be prepared.

    Raises:
        ModelError: the engine is not known, or the result is not valid ONNX.
    """
    new, results = run_passes(model, passes_for(for_engine))
    if new is not model:
        check_model(new)
    return Prepared(
        new,
        results,
        tuple(one for _, result in results for one in result.preprocessors),
        tuple(one for _, result in results for one in result.postprocessors),
        blockers_of(new, for_engine, tuple(note for _, result in results for note in result.blockers)),
    )


def blockers_of(model: ModelProto, engine: str, notes: tuple[Blocker, ...] = ()) -> tuple[Blocker, ...]:
    """What in a model an engine cannot run: node, operator and reason.

    Args:
        model: the prepared model.
        engine: the engine.
        notes: what the passes said about nodes they left; their reasons are used where they name the node.
    """
    known = {(note.node, note.op_type): note.reason for note in notes}
    found: list[Blocker] = []
    for graph in all_graphs(model.graph):
        for node in graph.node:
            title = node.name or next((output for output in node.output if output), "(unnamed)")
            standard = node.domain in ("", "ai.onnx")
            blocked = standard and node.op_type in _UNSUPPORTED[engine]
            if engine != "onnxruntime" and node.domain.startswith("ai.onnx."):
                blocked = True
            if blocked:
                reason = known.get((title, node.op_type), f"the engine {engine} has no such operator")
                found.append(Blocker(title, node.op_type, reason))
    if engine != "onnxruntime":
        found.extend(
            Blocker(value.name, "input", f"it is a tensor of strings, which the engine {engine} does not take")
            for value in model.graph.input
            if value.type.tensor_type.elem_type == onnx.TensorProto.STRING
        )
    return tuple(found)
