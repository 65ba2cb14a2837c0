"""Every figure in the README and docs is what the committed results give; ``make figures`` writes them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from benchmarks.pages import filled, names
from benchmarks.render import ROOT, blocks, stale

RESULTS = ROOT / "benchmarks/results"
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
MARKED = [(page, name) for page in PAGES for name in names((ROOT / page).read_text(encoding="utf-8"))]


def test_pages_and_plots_are_made_of_the_committed_results():
    assert stale() == [], "run make figures"


def test_every_block_of_a_page_has_its_results():
    assert sorted(MARKED) == sorted((block.page, block.name) for block in blocks(RESULTS))
    assert len(MARKED) >= 6


def test_the_sample_s_score_is_the_measured_one():
    score = json.loads((RESULTS / "bidaf-dev.json").read_text())
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"exact match {score['exact_match']:.2f}, F1 {score['f1']:.2f}" in readme


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in [*PAGES, "docs/cpu.svg", "docs/growth.svg"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(RESULTS, tmp_path / "benchmarks/results")
    return tmp_path


@pytest.mark.parametrize(("page", "name"), MARKED)
def test_a_figure_changed_by_hand_is_found(copy, page, name):
    (block,) = [block for block in blocks(RESULTS) if (block.page, block.name) == (page, name)]
    path = copy / page
    text = path.read_text(encoding="utf-8")
    figure = re.findall(r"\d+\.\d+", block.body)[-1]
    path.write_text(filled(text, name, block.body.replace(figure, f"{figure}1")), encoding="utf-8")
    assert stale(copy) == [f"{page}: {name}"]


def test_new_results_make_the_old_pages_and_plots_stale(copy):
    path = copy / "benchmarks/results/growth.json"
    data = json.loads(path.read_text())
    data["by_bytes"][0]["refit_seconds"] *= 1.5
    path.write_text(json.dumps(data))
    assert stale(copy) == ["README.md: growth", "docs/growth.svg"]


def test_a_page_without_its_markers_is_refused():
    with pytest.raises(ValueError, match="bench:cpu"):
        filled("no markers", "cpu", "body")
