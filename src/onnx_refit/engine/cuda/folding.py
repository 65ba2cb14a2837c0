"""Weights that a refit leaves to be computed: it copies what they are made of, and the first request makes them.

A convolution with a folded BatchNormalization is arithmetic, which the engine cannot give back: its sources have to be
kept anyway. Writing the folded weights beside them would be half of the work of a refit once more, only to copy them
again to where recorded graphs read them. So a whole refit from device tensors writes the sources only, and where the
copy would be made, between two requests on their own stream, the weights are computed straight to their place.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch

from onnx_refit.engine.cuda import kernels
from onnx_refit.engine.cuda.arena import Arena, Layout
from onnx_refit.engine.cuda.families import families, half_of
from onnx_refit.engine.cuda.filling import Filler
from onnx_refit.engine.cuda.gather import upload
from onnx_refit.engine.cuda.lowering.operators import Tensor
from onnx_refit.engine.cuda.memory import Memory
from onnx_refit.engine.cuda.streams import on_device
from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.tensors import TensorSpec


def foldable(compiled: CompiledModel, formulas: Mapping[str, object], held: frozenset[str]) -> frozenset[str]:
    """The engine weights that are formulas of sources which the engine has to keep, and of no others.

    Args:
        compiled: the plan's portable part.
        formulas: engine weights that are elementwise formulas.
        held: source weights that lie in other engine weights bit for bit; these are not kept.
    """
    dependencies = compiled.program.dependencies
    return frozenset(name for name in formulas if dependencies[name] and not dependencies[name] & held)


class _Offsets:
    """Where kept weights lie, from the beginning of an arena, as kernels read it."""

    def __init__(self, offsets: list[int], device: Any) -> None:
        self.device = device
        self._there = upload(np.array(offsets, np.uint64), device)
        self.address = int(self._there.data_ptr())


class Folding:
    """Makes the weights that lie behind all others in a layout, from kept source weights. Thread-safe.

    Args:
        layout: of a whole weight set.
        aside: of the kept source weights.
        specs: of the source weights.
        filler: knows the formulas, and how to do without kernels.
        device: where.

    Attributes:
        names: the weights that it makes.
    """

    def __init__(
        self, layout: Layout, aside: Layout, specs: Mapping[str, TensorSpec], filler: Filler, device: Any
    ) -> None:
        self.names = layout.behind
        self.layout, self.aside = layout, aside
        self.nbytes = max(1, layout.stem + aside.nbytes)
        self.device = device
        self._specs, self._filler = specs, filler
        self._lock = threading.Lock()
        self._kernels: list[kernels.Prepared] | None = None
        if device.type == "cuda" and kernels.available():
            sources = list(aside.slots)
            table = _Offsets([layout.stem + aside.slots[name].offset for name in sources], device)
            places = {name: layout.slots[name].offset for name in sorted(self.names)}
            index = {name: row for row, name in enumerate(sources)}
            found = {name: filler.formulas[name] for name in places}
            self._made, _ = families(found, places, table, index, half_of(layout, places))
            self._kernels = [family.prepared(0) for family in self._made]

    def enqueue(self, storage: Tensor, target: Arena) -> None:
        """Enqueue what makes the weights, on the current stream.

        Args:
            storage: holds the sources, behind the layout's other weights.
            target: of the layout; takes the weights.
        """
        with self._lock:
            if self._kernels is None:
                kept = Arena(self.aside, self.device, storage, self.layout.stem)
                sources = {n: kept.raw(n).view(self._specs[n].static_shape) for n in self.aside.slots}
                with torch.no_grad():
                    self._filler.one_by_one(target, sources, self.names)
                return
            stream, begin, to = kernels.current_stream(self.device), storage.data_ptr(), target.pointer
            for compute in self._kernels:
                compute(stream, begin, to, 0)


class Unfolded(Arena):
    """An arena of a whole layout without those weights that a folding makes, and the sources of these behind it.

    Args:
        folding: makes them.
        memory: of ``folding.nbytes`` bytes.
    """

    def __init__(self, folding: Folding, memory: Memory) -> None:
        super().__init__(folding.layout, folding.device, memory.storage, 0, memory)
        self.folding = folding

    @property
    def later(self) -> frozenset[str]:
        """See ``Arena``."""
        return self.folding.names

    def finish(self, target: Arena) -> None:
        """See ``Arena``."""
        self.folding.enqueue(self.storage, target)

    def kept(self) -> Arena:
        """The sources."""
        return Arena(self.folding.aside, self.folding.device, self.storage, self.layout.stem, self.memory)

    @cached_property
    def _whole(self) -> Arena:
        """Where somebody looks at single weights; requests never do."""
        whole = Arena(self.layout, self.folding.device)
        with on_device(self.folding.device):
            self.finish(whole)
            if self.storage.is_cuda:
                kernels.synchronize(self.folding.device)
        return whole

    def raw(self, name: str) -> Tensor:
        """See ``Arena``."""
        return self._whole.raw(name) if name in self.later else super().raw(name)
