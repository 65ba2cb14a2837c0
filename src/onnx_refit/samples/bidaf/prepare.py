"""Step one of the sample: the original model becomes one that an engine can run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from onnx_refit.errors import ModelError
from onnx_refit.files import atomic_write
from onnx_refit.model.load import load_model
from onnx_refit.model.prepare import Prepared, prepare
from onnx_refit.model.verify import verify_equivalent
from onnx_refit.model.vocabulary import VocabularyMap
from onnx_refit.samples.bidaf.answering import Say
from onnx_refit.samples.bidaf.vocabulary import Passage, feeds

CONTEXT = "A quick brown fox jumps over the lazy dog."
QUESTION = "What color is the fox?"
ANSWER = "brown"

MODIFIED = "bidaf-modified.onnx"

_CHECKS = (
    (CONTEXT, QUESTION),
    ("The treaty was signed in Osnabrück in 1648, and it ended the Thirty Years' War.", "When was it signed?"),
    ("Zyxqv!", "?"),
)


@dataclass(frozen=True)
class PreparedFiles:
    """What preparing wrote.

    Attributes:
        prepared: the model and how it came about.
        model: the modified model's file.
        maps: the vocabulary files beside it, one a CategoryMapper.
    """

    prepared: Prepared
    model: Path
    maps: tuple[Path, ...]


def prepare_bidaf(
    original: Path | ModelProto,
    target: Path,
    say: Say,
    *,
    verbose: bool = False,
    verify: bool = True,
    engine: str = "onnxruntime",
) -> PreparedFiles:
    """Rewrite the original model, compare both on a few questions, and save the result with its vocabularies.

    Args:
        original: the original model with string inputs.
        target: where the modified model goes; ``CategoryMapper_4.json`` and so on go beside it.
        say: takes the lines of the sample.
        verbose: say what each pass changed and why, too.
        verify: hold the modified model to the original's answers.
        engine: the engine to prepare for.

    Raises:
        ModelError: the model cannot be read or prepared, or the modified model answers differently.
        WriteError: a file cannot be written.
    """
    say("Modifying the ONNX model ...")
    model = load_model(original)
    prepared = prepare(model, for_engine=engine)
    if prepared.blockers:
        one = prepared.blockers[0]
        raise ModelError(f"cannot be prepared: {one.op_type}: {one.reason}", where=one.node)
    if not prepared.changes:
        raise ModelError(
            "there is nothing to modify: the model has no string inputs and no operator that engines lack",
            where=None if isinstance(original, ModelProto) else original,
            hint="Give the original model, not the modified one",
        )
    if verbose:
        for line in describe(prepared):
            say(line)
    if verify:
        cases = [feeds(Passage.of(context), Passage.of(question)) for context, question in _CHECKS]
        verify_equivalent(model, prepared, cases, rtol=1e-3, atol=1e-3)
    with atomic_write(target) as file:
        file.write(prepared.model.SerializeToString())
    maps = save_maps(prepared.preprocessors, target.parent)
    say(f"Modified ONNX model saved as {target.name}")
    say("Done.")
    return PreparedFiles(prepared, target, maps)


def describe(prepared: Prepared) -> list[str]:
    """What each pass changed and why, one line a change."""
    lines = []
    for step, result in prepared.results:
        lines += [f"  {step.name}: {c.op_type} {c.node}: {c.what} ({c.why})" for c in result.changes]
        lines += [f"  {step.name}: {b.op_type} {b.node} stays: {b.reason}" for b in result.blockers]
    return lines


def save_maps(maps: Sequence[VocabularyMap], directory: Path) -> tuple[Path, ...]:
    """Write each map as ``<node>.json``; the files."""
    paths = []
    for one in maps:
        path = directory / f"{_file_name(one.node)}.json"
        one.save(path)
        paths.append(path)
    return tuple(paths)


def load_maps(model: ModelProto, directory: Path) -> tuple[VocabularyMap, ...]:
    """The saved maps that feed inputs of a prepared model, in the order of its inputs.

    Other JSON files in the directory are passed over.
    """
    inputs = [value.name for value in model.graph.input]
    found: dict[str, VocabularyMap] = {}
    for path in sorted(directory.glob("*.json")):
        try:
            one = VocabularyMap.load(path)
        except ModelError:
            continue
        if one.output in inputs:
            found[one.output] = one
    return tuple(found[name] for name in inputs if name in found)


def _file_name(node: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in node) or "map"
