"""The kernels of processors without AVX-512 (block size 8), on an emulated one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EMULATOR = shutil.which("qemu-x86_64")
TESTS = Path(__file__).parent

pytestmark = [pytest.mark.slow, pytest.mark.skipif(EMULATOR is None, reason="needs qemu-x86_64 (Debian: qemu-user)")]

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.engine.test_models import Live
from onnx_refit.engine.onnxruntime.blocked import block_size
assert block_size() == 8, block_size()
for name in sys.argv[2:]:
    live = Live(name)
    made = live.backend.derive(live.weights)
    live.check(made, live.weights)
    other = live.other(1)
    made = live.backend.derive(other, made)
    live.check(made, other)
    assert made.full_speed.wait(300)
    live.check(made, other)
    live.backend.close()
    print(name, "ok")
"""


@pytest.mark.parametrize("names", [["chain", "feed_forward", "gemms"], ["convolutions", "lstm"]], ids="-".join)
def test_refits_on_a_processor_with_blocks_of_eight(names: list[str]) -> None:
    assert EMULATOR is not None
    command = [EMULATOR, "-cpu", "Haswell", sys.executable, "-c", PROGRAM, str(TESTS.parent.parent), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok") == len(names)
