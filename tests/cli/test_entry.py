"""The way into the command and the library: help at once, one quiet line for an interrupt at any time, public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import click
import pytest

import onnx_refit
from onnx_refit.cli.commands import COMMANDS, cli
from onnx_refit.cli.main import main


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def test_help_lists_every_command_with_its_own_summary_and_every_command_has_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, (_, summary) in COMMANDS.items():
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        assert command.name == name
        assert command.get_short_help_str(limit=200) == summary
        assert f"{name} {summary}" in text
        assert main([name, "--help"]) == 0
        assert command.help


def test_help_and_usage_errors_load_nothing_heavy():
    code = """
import sys
from onnx_refit.cli.main import main
codes = [main(["--help"]), main(["nonsense"]), main(["--version"])]
print(codes, sorted({"numpy", "onnx", "onnxruntime", "rich"} & set(sys.modules)), file=sys.stderr)
"""
    assert python(code).stderr.splitlines()[-1] == "[0, 2, 0] []"


def test_a_misspelt_command_is_told_what_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bulid"]) == 2
    assert "No such command 'bulid'. Meant: build?" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["click", "numpy", "onnx", "onnxruntime", "onnx_refit.cli.plans"])
def test_an_interrupt_while_loading_ends_with_one_line(module):
    code = """
import sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
from onnx_refit.cli.main import main
sys.exit(main(["inspect", "no.plan"]))
"""
    done = python(code, module)
    assert (done.returncode, done.stderr.strip()) == (130, "stopped")  # click begins a new line after the terminal's ^C


def test_the_command_is_installed_and_ends_with_its_exit_code(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "onnx_refit.cli.main"]
    good = subprocess.run([*run, "--version"], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stdout) == (0, f"onnx-refit, version {onnx_refit.__version__}\n")
    bad = subprocess.run([*run, "inspect", str(tmp_path / "no.plan")], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert "Traceback" not in bad.stderr


def test_public_names_are_those_that_type_checkers_see():
    tree = ast.parse(Path(onnx_refit.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("onnx_refit")
        for alias in node.names
    }
    assert sorted(seen) == sorted(onnx_refit.__all__)
    for name, module in seen.items():
        assert getattr(onnx_refit, name) is getattr(sys.modules[str(module)], name)
    assert set(onnx_refit.__all__) <= set(dir(onnx_refit))
    assert python("import onnx_refit; onnx_refit.errors.OnnxRefitError").returncode == 0
    assert python("from onnx_refit import *; Engine, load").returncode == 0
    with pytest.raises(AttributeError, match="'onnx_refit' has no attribute 'nonsense'"):
        getattr(onnx_refit, "nonsense")  # noqa: B009 - type checkers know that it is not there
