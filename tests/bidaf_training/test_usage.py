"""Every script of the sample explains itself, or says in one line what it lacks, also without PyTorch."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "samples/bidaf").glob("*.py"))
WITHOUT_TORCH = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ImportError("no torch here")

sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_explains_itself(script):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    if done.returncode == 0:
        assert "usage" in done.stdout.lower()
    else:
        assert done.stderr.startswith("error: ")
        assert "needs the package 'torch'" in done.stderr
        assert len(done.stderr.splitlines()) == 1
