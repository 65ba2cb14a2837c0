"""Build hook: compiles ``moves.c`` where there is a C compiler; without one the package is pure Python and slower."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = Path("src/onnx_refit/moves")
# No -march: the file chooses by processor when it runs. No contraction: products are rounded as NumPy rounds them.
_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra")


class NativeHook(BuildHookInterface):  # type: ignore[type-arg, misc]
    """Puts ``_moves.so`` beside its source, for editable installs too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; a failure is a warning."""
        if self.target_name != "wheel":
            return
        target = Path(self.root) / _FOLDER / "_moves.so"
        problem = compiled(Path(self.root) / _FOLDER / "moves.c", target)
        if problem:
            with contextlib.suppress(OSError):  # what is left there is refused by its version, if it is another
                target.unlink(missing_ok=True)
            self.app.display_warning(f"onnx-refit is built without native code, its refits will be slower: {problem}")
            return
        build_data["artifacts"].append(f"/{_FOLDER.as_posix()}/_moves.so")
        build_data["pure_python"] = False
        # The library knows nothing of Python: one file for every version of it.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def compiled(source: Path, target: Path) -> str:
    """Compile; what went wrong, or nothing. A running process keeps the file that it has mapped."""
    if sys.platform == "win32":
        return "not tried on Windows"
    try:
        command = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or ""]
        if not command[0]:
            return "there is no C compiler (cc)"
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            done = subprocess.run(
                [*command, *_FLAGS, "-o", str(made), str(source)],
                check=False,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=300,
            )
            if done.returncode:
                return done.stderr.strip()[-2000:] or f"{command[0]} failed"
            made.replace(target)
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # a folder that is read-only, say
        return str(error)
    return ""
