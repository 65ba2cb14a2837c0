"""Everything in the README and docs that is made from benchmarks/results: ``python -m benchmarks.render``.

``make figures`` runs it. A test fails where a page or a plot is not what this makes of the committed results.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pages import filled
from benchmarks.plots import digest, plots
from benchmarks.render_cpu import cpu_tables, growth_table
from benchmarks.render_gpu import gpu_tables, refit_summary, refit_tables, summary
from benchmarks.render_serving import cluster_table, serving_tables
from onnx_refit.files import write_text

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Block:
    """What belongs between two markers of a page.

    Attributes:
        page: the file, below the repository's root.
        name: as the markers name it.
        body: Markdown.
    """

    page: str
    name: str
    body: str


def blocks(results: Path) -> list[Block]:
    """All blocks that there are results for."""
    made = []
    if (data := _read(results, "cpu")) is not None:
        made.append(Block("README.md", "cpu", cpu_tables(data)))
    if (data := _read(results, "growth")) is not None:
        made.append(Block("README.md", "growth", growth_table(data)))
    if (data := _read(results, "serving")) is not None:
        made.append(Block("docs/serving.md", "serving", serving_tables(data)))
    if (data := _read(results, "cluster")) is not None:
        made.append(Block("docs/serving.md", "cluster", cluster_table(data)))
    if (data := _read(results, "gpu-h200")) is not None:
        groups = [json.loads(found.read_text()) for found in sorted(results.glob("gpu-*-group.json"))]
        made.append(Block("docs/gpu.md", "gpu", gpu_tables(data, groups)))
        made.append(Block("README.md", "gpu", summary(data)))
    if (data := _read(results, "gpu-h200-refit")) is not None:
        made.append(Block("docs/gpu.md", "gpu-refit", refit_tables(data)))
        made.append(Block("README.md", "gpu-refit", refit_summary(data)))
    return made


def stale(root: Path = ROOT) -> list[str]:
    """Pages with their blocks, and plots, that are not what the results make of them."""
    results = root / "benchmarks/results"
    found = []
    for block in blocks(results):
        text = (root / block.page).read_text(encoding="utf-8")
        if filled(text, block.name, block.body) != text:
            found.append(f"{block.page}: {block.name}")
    for name in plots(results):
        source = digest(results / name.replace(".svg", ".json"))
        if source not in (root / "docs" / name).read_text(encoding="utf-8"):
            found.append(f"docs/{name}")
    return found


def render(root: Path = ROOT) -> None:
    """Write all blocks into their pages, and draw the plots whose results changed."""
    results = root / "benchmarks/results"
    old = stale(root)
    for block in blocks(results):
        page = root / block.page
        write_text(page, filled(page.read_text(encoding="utf-8"), block.name, block.body))
    for name, draw in plots(results).items():
        if f"docs/{name}" in old:
            write_text(root / "docs" / name, draw())


def _read(results: Path, name: str) -> Any:
    path = results / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


if __name__ == "__main__":
    render()
