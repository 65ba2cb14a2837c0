"""The README's plots, drawn from the result files; each names the file's content it was drawn from."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any


def plots(results: Path) -> dict[str, Callable[[], str]]:
    """What draws each plot of the folder docs as SVG, by the plot's file name; only those with results."""
    made: dict[str, Callable[[], str]] = {}
    for name, draw in (("cpu", _cpu), ("growth", _growth)):
        path = results / f"{name}.json"
        if path.exists():
            made[f"{name}.svg"] = partial(_svg, path, draw)
    return made


def digest(path: Path) -> str:
    """What a plot says about where its figures are from: the sha256 of the result file."""
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def _subplots(*shape: int, **options: Any) -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the plots need matplotlib: pip install 'onnx-refit[plot]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "onnx-refit"  # the same figures give the same file
    from matplotlib import pyplot

    return pyplot.subplots(*shape, **options)


def _cpu(data: Mapping[str, Any]) -> Any:
    labels, ours, refit = [], [], []
    for entry in data["cases"].values():
        row = entry["rows"][0]
        for label, figures in row["inference"].items():
            labels.append(f"{row['case']} {label}")
            ours.append(figures["over_baked"]["onnx-refit"])
            refit.append(row["refit"]["over_copy"])
    figure, (left, right) = _subplots(1, 2, figsize=(11, 0.38 * len(labels) + 1.4), sharey=True)
    places = range(len(labels))
    left.barh(places, ours, color="#3b6ea5")
    left.axvline(1, color="black", linewidth=1)
    left.set_yticks(list(places), labels)
    left.invert_yaxis()
    left.set_xlabel("inference time over a baked session (1 thread)")
    right.barh(places, refit, color="#c07a2c")
    right.axvline(1, color="black", linewidth=1)
    right.set_xlabel("refit over a plain copy of the weights (1 thread)")
    for axis, values in ((left, ours), (right, refit)):
        for place, value in zip(places, values, strict=True):
            axis.text(value, place, f" {value:.2f}", va="center", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, max(values) * 1.15)
    figure.tight_layout()
    return figure


def _growth(data: Mapping[str, Any]) -> Any:
    figure, (left, right) = _subplots(1, 2, figsize=(10, 3.6))
    for axis, key, unit, label in (
        (left, "bytes", 1e6, "weights, MB (few large tensors)"),
        (right, "tensors", 1, "tensors (4 kB each, with small biases)"),
    ):
        rows = data["by_bytes" if key == "bytes" else "by_tensors"]
        x = [row[key] / unit for row in rows]
        axis.loglog(x, [row["refit_seconds"] * 1e3 for row in rows], "o-", color="#c07a2c", label="refit")
        axis.loglog(x, [row["copy_seconds"] * 1e3 for row in rows], "s--", color="#555555", label="plain copy")
        axis.set_xlabel(label)
        axis.set_ylabel("ms")
        axis.grid(True, which="major", alpha=0.3)
        axis.legend()
    figure.tight_layout()
    return figure


def _svg(path: Path, draw: Callable[[Mapping[str, Any]], Any]) -> str:
    buffer = io.StringIO()
    figure = draw(json.loads(path.read_text()))
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Source": digest(path)})
    return buffer.getvalue()
