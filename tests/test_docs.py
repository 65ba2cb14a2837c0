"""Pages say what is true of the tree: their links lead somewhere, the architecture's floors and names exist."""

from __future__ import annotations

import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

from onnx_refit.plan.file import FORMAT_VERSION

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/onnx_refit"
PAGES = sorted(
    path
    for place in (ROOT, ROOT / "docs", *(path.parent for path in SOURCE.rglob("*.md")))
    for path in place.glob("*.md")
)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@cache
def floors() -> dict[str, str]:
    """What each row of the table of floors says, by the names in its column of packages."""
    text = prose(ROOT / "docs/architecture.md").split("## The floors", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.+) \|$", text, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(reversed(range(len(rows))))
    return {packages: what for _, packages, what in rows}


def test_the_floors_are_those_that_the_linter_holds() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    held = {name.removeprefix("onnx_refit.") for layer in contract["layers"] for name in layer.split(" | ")}
    assert {name for packages in floors() for name in re.findall(r"`(\w+)`", packages)} == held
    there = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there - {"__init__", "_version"} == held


def exists(name: str) -> bool:
    """Whether a name, dotted or a path, is a module or folder of the package, or a class or function of a module."""
    *folders, last = name.replace("/", ".").removesuffix(".py").split(".")
    path = "/".join(folders)
    if any(SOURCE.glob(f"**/{path}/{last}.py")) or any(SOURCE.glob(f"**/{path}/{last}/__init__.py")):
        return True
    definition = re.compile(rf"^(class|def) {last}\b", re.MULTILINE)
    return any(definition.search(module.read_text(encoding="utf-8")) for module in SOURCE.glob(f"**/{path or '*'}.py"))


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/weights.md", "docs/gpu.md", "docs/serving.md"])
def test_modules_that_a_page_names_exist(page: str) -> None:
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py|onnx_refit(?:\.[a-z_]+){2,})`", prose(ROOT / page)))
    if page == "docs/architecture.md":
        named |= {name for what in floors().values() for name in re.findall(r"`([\w.]+)`", what)}
        named |= set(re.findall(r"`([a-z]+(?:\.[a-z_]+)+)`", prose(ROOT / page)))
    roots = ("tests/", "benchmarks/", "samples/")
    missing = [
        name
        for name in sorted(named)
        if not ((ROOT / name).exists() if name.startswith(roots) else exists(re.sub(r"^onnx_refit[./]", "", name)))
    ]
    assert not missing


def test_commands_that_pages_name_exist() -> None:
    from onnx_refit.cli.commands import COMMANDS

    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"\bonnx-refit ([a-z][a-z-]+)\b", text):
            # "onnx-refit takes …" in prose is no command; in code it is.
            if re.search(rf"(?:`|^)onnx-refit {name}\b", text, re.MULTILINE):
                assert name in COMMANDS, f"{page.name}: onnx-refit {name}"
        for target in re.findall(r"`make ([a-z-]+)`", text):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make {target}"
        for module in re.findall(r"python -m ((?:benchmarks|tests|onnx_refit)[\w.]*)", text):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{page.name}: {module}"


def test_the_runtime_of_kserve_takes_plans_of_this_format() -> None:
    named = re.findall(r'name: onnx-refit-plan\n\s+version: "(\d+)"', (ROOT / "deploy/kserve.yaml").read_text())
    assert named == [str(FORMAT_VERSION)]


def test_no_machine_and_no_registry_is_named() -> None:
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout.split(b"\0")
    paths = [ROOT / name.decode() for name in files if name]
    if not paths:
        pytest.skip("not a git checkout")
    told = re.compile(rb"--(?:extra-)?index-url|--trusted-host|(?<![\w.])/(?:work|root|home/\w+|opt/pypi)\b[/\w-]*/")
    found = [path for path in paths if path.is_file() and path != Path(__file__) and told.search(path.read_bytes())]
    assert found == []
