"""The pins in constraints/ have hashes, name no host, and are versions that pyproject.toml takes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HASHED = sorted(path.name for path in (ROOT / "constraints").glob("*.txt") if path.name != "torch.txt")


def entries(name: str) -> list[str]:
    """The requirements of a file, each with its hashes on one line."""
    text = (ROOT / "constraints" / name).read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def pins(*names: str) -> dict[str, str]:
    """Version by canonical name; of a package that differs by platform, the last one."""
    found: dict[str, str] = {}
    for name in names:
        for entry in entries(name):
            requirement = Requirement(entry.split(" --hash=")[0])
            found[canonicalize_name(requirement.name)] = next(iter(requirement.specifier)).version
    return found


@pytest.mark.parametrize("name", HASHED)
def test_everything_is_pinned_with_hashes_and_no_host(name: str) -> None:
    for entry in entries(name):
        assert re.match(r"[A-Za-z0-9._-]+(\[[\w,-]+\])?==\S+ ", entry), entry
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry
        assert "://" not in entry, entry
        assert "--index" not in entry, entry


@pytest.mark.parametrize(
    ("names", "extras"),
    [
        (("base.txt",), ("plot",)),
        (("base.txt", "all.txt", "torch.txt"), ("plot", "torch", "train", "tensorrt")),
        (("serve.txt",), ("serve", "tracing")),
        (("ray.txt",), ("ray",)),
    ],
    ids=["base", "all", "serve", "ray"],
)
def test_the_pins_are_what_the_project_asks_for(names: tuple[str, ...], extras: tuple[str, ...]) -> None:
    pinned = pins(*names)
    wanted = [*PROJECT["dependencies"], *(one for extra in extras for one in PROJECT["optional-dependencies"][extra])]
    for text in wanted:
        requirement = Requirement(text)
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(version), f"{text}: pinned is {version}"


def test_environments_built_on_each_other_agree() -> None:
    base = pins("base.txt")
    for name in ("lint.txt", "all.txt"):
        assert {p: (v, base[p]) for p, v in pins(name).items() if p in base and base[p] != v} == {}, name
