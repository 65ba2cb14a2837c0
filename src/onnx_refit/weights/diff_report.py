"""A diff for people: an HTML page that stands alone, and a plot."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path

from onnx_refit.errors import MissingExtraError
from onnx_refit.files import WriteError, atomic_write
from onnx_refit.weights.diff import HISTOGRAM_FROM, Diff, TensorDiff

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; }
th { position: sticky; top: 0; background: Canvas; }
.bar { fill: #3b7dd8; } .axis { font-size: 11px; fill: currentColor; }
"""


def to_html(diff: Diff) -> str:
    """The diff as one HTML page without scripts or references; all text from checkpoints is escaped."""
    changed = sorted(diff.changed, key=lambda t: -t.relative_change)
    same = len(diff.tensors) - len(changed)
    summary = (
        "The two are identical, bit for bit."
        if diff.identical
        else f"{len(changed)} tensors differ, {same} are equal, {len(diff.reshaped)} have another dtype or shape, "
        f"{len(diff.removed)} are gone, {len(diff.added)} are new."
    )
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>Difference of two checkpoints</title><style>{_STYLE}</style></head><body>",
        "<h1>Difference of two checkpoints</h1>",
        f"<p>From <code>{_text(diff.before)}</code> to <code>{_text(diff.after)}</code>. {summary}</p>",
    ]
    if changed:
        parts += ["<h2>How much elements changed, relative to themselves</h2>", _bars(diff.histogram)]
        parts += ["<h2>Tensors that differ</h2>", _table(changed)]
    for title, lines in (
        ("Another dtype or shape", [f"{a} became {b}" for a, b in diff.reshaped]),
        ("Gone", [_gone(str(s), diff.meant.get(s.name, ())) for s in diff.removed]),
        ("New", [str(s) for s in diff.added]),
    ):
        if lines:
            parts.append(f"<h2>{title}</h2><ul>" + "".join(f"<li>{_text(line)}</li>" for line in lines) + "</ul>")
    return "".join([*parts, "</body></html>\n"])


def write_plot(diff: Diff, path: str | os.PathLike[str]) -> None:
    """Write a plot of the relative change of each tensor and the histogram of all elements (PNG or SVG by suffix).

    Raises:
        MissingExtraError: matplotlib is not installed.
        WriteError: the file cannot be written, or its name ends otherwise.
    """
    kind = Path(path).suffix.removeprefix(".").lower() or "png"
    if kind not in ("png", "svg"):
        raise WriteError(f"a plot cannot be written as .{kind}", where=path, hint="Name a .png or .svg file")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "plotting a difference") from error
    figure = Figure(figsize=(10, 7), layout="constrained")
    layers, elements = figure.subplots(2, 1)
    names = [t.spec.name for t in diff.tensors]
    layers.bar(range(len(names)), [min(t.relative_change, 1e3) for t in diff.tensors])
    layers.set_yscale("symlog", linthresh=1e-6)
    layers.set_ylabel("norm of change / norm before")
    layers.set_xlabel("tensor, in the order of the file")
    if 0 < len(names) <= 40:
        layers.set_xticks(range(len(names)), names, rotation=90, fontsize=7, parse_math=False)
    counts = diff.histogram
    elements.bar([HISTOGRAM_FROM + i / 2 + 0.25 for i in range(len(counts))], counts, width=0.45)
    elements.set_xlabel("power of ten of the change of an element relative to itself")
    elements.set_ylabel("elements")
    with atomic_write(path) as file:
        figure.savefig(file, format=kind)


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _gone(name: str, meant: Sequence[str]) -> str:
    return f"{name} (now {' or '.join(meant)}?)" if meant else name


def _table(tensors: Sequence[TensorDiff]) -> str:
    head = "".join(
        f"<th>{title}</th>"
        for title in ("tensor", "changed bytes", "of", "norm before", "norm after", "relative change", "largest change")
    )
    rows = "".join(
        f"<tr><td>{_text(str(t.spec))}</td><td>{t.changed_bytes:,}</td><td>{t.spec.nbytes:,}</td>"
        f"<td>{t.norm_before:.4g}</td><td>{t.norm_after:.4g}</td><td>{t.relative_change:.3g}</td>"
        f"<td>{t.largest_relative_change:.3g}</td></tr>"
        for t in tensors
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _bars(counts: Sequence[int]) -> str:
    """The histogram as an inline picture."""
    most = max(counts) or 1
    width, height = 24, 120
    bars = "".join(
        f"<rect class='bar' x='{i * width + 2}' y='{height - height * n / most:.1f}' width='{width - 4}' "
        f"height='{height * n / most:.1f}'><title>{n:,}</title></rect>"
        for i, n in enumerate(counts)
    )
    labels = "".join(
        f"<text class='axis' x='{i * width}' y='{height + 16}'>1e{HISTOGRAM_FROM + i // 2}</text>"
        for i in range(0, len(counts), 4)
    )
    size = f"width='{len(counts) * width}' height='{height + 24}'"
    return f"<svg {size} role='img' aria-label='histogram of relative changes'>{bars}{labels}</svg>"
