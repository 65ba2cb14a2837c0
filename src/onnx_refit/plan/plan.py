"""The plan: everything compilation made, ready to be loaded onto a device or saved as one file."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from onnx_refit.plan.content import PlanContent


@dataclass(frozen=True, repr=False)
class Plan(PlanContent):
    """A compiled model that can be saved, loaded and described; what it holds: see ``PlanContent``."""

    def save(self, path: str | os.PathLike[str], *, strip: bool = False) -> Path:
        """Write the plan as one file, atomically.

        Args:
            path: where to; an existing file is replaced only once the new one is whole and synced.
            strip: leave the weights out.

        Raises:
            WriteError: full disk, read-only place, missing directory.
        """
        from onnx_refit.plan.file import write_plan

        return write_plan(self, Path(path), strip=strip)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Plan:
        """Read a plan file; weights are memory-mapped.

        Args:
            path: the file.
            verify: compare every weight with its digest (about 1 GB/s); graphs are always compared.

        Raises:
            ReadError: no such file, no permission.
            PlanFormatError: not a plan, another format version, damaged or cut short.
        """
        from onnx_refit.plan.file import read_plan

        content = read_plan(Path(path), verify=verify)
        return cls(**{each.name: getattr(content, each.name) for each in fields(content)})

    def _repr_html_(self) -> str:
        """A summary for notebooks."""
        from onnx_refit.plan.render import plan_html

        return plan_html(self)

    def describe(self) -> dict[str, Any]:
        """What the plan is, as JSON-able data (``onnx-refit inspect --json``)."""
        from onnx_refit.plan.render import describe_plan

        return describe_plan(self)
