"""Writes docs/operators.md: ``python -m tests.operators.page``."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

import onnx

from onnx_refit.files import write_text
from tests.operators.survey import Finding, Outcome, cases, survey

PAGE = Path(__file__).parents[2] / "docs" / "operators.md"
_WORKED = {Outcome.REFITTED, Outcome.NOTHING}
_INTRODUCTION = """\
# Operators

Every operator for which ONNX has backend node tests, run through the CPU engine: first with every floating-point input
but the first as a refittable weight (of quantised operators the integer ones too), then with the first one as well,
where an input has more than one element. The engine's answer is compared with that of a fresh ONNX Runtime session,
then the weights are replaced by others and compared again: to the bit where numbers are integers, else to {tolerance}
of the largest. What is computed from weights alone is computed at refit, by whatever operator; so an operator may stand
here as refitted though no engine could bake it in.

Made by `make operators` with {versions}; a slow test fails when this page does not say
what these versions give.
"""


def render(findings: Mapping[str, Finding]) -> str:
    """The page."""
    refitted = {op: f for op, f in findings.items() if Outcome.REFITTED in f.outcomes}
    plain = {op: f for op, f in findings.items() if op not in refitted and Outcome.NOTHING in f.outcomes}
    missing = {op: f for op, f in findings.items() if f.outcomes and op not in refitted and op not in plain}
    untested = sorted(_operators() - {op for op, finding in findings.items() if finding.outcomes})
    lines = [
        _INTRODUCTION.format(tolerance="1e-5", versions=versions()),
        f"## Refitted: {len(refitted)}",
        "",
        "| operator | inputs refitted | cases | of them left out, and why |",
        "|---|---|---|---|",
    ]
    for op, finding in sorted(refitted.items()):
        lines.append(f"| {op} | {_inputs(op, finding)} | {_count(finding)} | {_left_out(finding)} |")
    lines += ["", f"## Run, with nothing to refit: {len(plain)}", "", "| operator | why |", "|---|---|"]
    for op, finding in sorted(plain.items()):
        why = "; ".join(sorted(finding.reasons[Outcome.NOTHING]))
        lines.append(f"| {op} | {why or 'no floating-point input of more than one element'} |")
    lines += ["", f"## Not supported: {len(missing)}", "", "| operator | why |", "|---|---|"]
    lines += [f"| {op} | {_left_out(finding)} |" for op, finding in sorted(missing.items())]
    lines += [
        "",
        f"## Not looked at: {len(untested)}",
        "",
        "ONNX has no backend node test of opset 7 or newer for them: " + ", ".join(untested) + ".",
        "",
    ]
    return "\n".join(lines)


def versions() -> str:
    """What the page depends on."""
    return f"onnx {version('onnx')} and onnxruntime {version('onnxruntime')}"


def _operators() -> set[str]:
    schemas = [schema for schema in onnx.defs.get_all_schemas() if schema.domain in {"", "ai.onnx.ml"}]
    return {f"{schema.domain}.{schema.name}" if schema.domain else schema.name for schema in schemas}


def _inputs(op: str, finding: Finding) -> str:
    domain, _, name = op.rpartition(".")
    declared = [entry.name for entry in onnx.defs.get_schema(name, domain=domain).inputs]
    if not finding.places:
        return "weights inside of it"
    return ", ".join(dict.fromkeys(declared[min(place, len(declared) - 1)] for place in sorted(finding.places)))


def _count(finding: Finding) -> int:
    return len(set().union(*finding.outcomes.values()))


def _left_out(finding: Finding) -> str:
    worked = set().union(*(names for outcome, names in finding.outcomes.items() if outcome in _WORKED))
    parts = []
    for outcome, names in finding.outcomes.items():
        rest = names - worked
        if outcome not in _WORKED and rest:
            parts.append(f"{len(rest)}: {'; '.join(sorted({_short(reason) for reason in finding.reasons[outcome]}))}")
    return "; ".join(parts)


def _short(reason: str) -> str:
    """ONNX Runtime's words without paths, numbers of lines and names of nodes."""
    found = re.search(r"(?:implementation|kernel) for (\w+\(\d+\))", reason)
    if found:
        return f"ONNX Runtime has no kernel of {found[1]} for these types"
    found = re.search(r"([\w.:]+)\(-1\) is not a registered", reason)
    if found:
        return "ONNX Runtime does not know it"
    if re.search(r"its inputs are|kind (?:sequence|optional)|addOrtValueMethods", reason):
        return "sequences and optionals are no tensors"
    found = re.search(r"not finite", reason)
    if found:
        return "values that are not finite are refitted only when allowed"
    found = re.search(r"(?:dtype (\w+) has no|Tensor Type\. (\w+)|ONNX tensor type (\d+))", reason)
    if found:
        return f"the type {next(filter(None, found.groups()))} is not supported"
    words = re.sub(r"^.*(?:Status Message:|during initialization:)", "", reason)
    words = re.sub(r"^\s*/\S+ [^()]*\([^()]*\)\s*(?:\[[^\]]*\]\s*)?(?:const\s)?", "", words)
    return "ONNX Runtime refuses it: " + " ".join(words.split())[:120].replace("|", "\\|")


def found(some: Iterable[str] = ()) -> dict[str, Finding]:
    """The survey, of all operators or of some."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return survey(case for case in cases() if not some or case.operator in some)


def main() -> None:
    """Write the page."""
    write_text(PAGE, render(found()))
    sys.stdout.write(f"{PAGE}\n")


if __name__ == "__main__":
    main()
