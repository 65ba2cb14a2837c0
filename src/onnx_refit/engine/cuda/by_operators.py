"""Source weights taken by PyTorch's operators, one by one: where there is no CuPy, or no GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from onnx_refit.engine.cuda.arena import Arena
from onnx_refit.engine.cuda.aside import Places
from onnx_refit.engine.cuda.attached import Attached
from onnx_refit.engine.cuda.lowering.operators import Tensor, torch_dtype
from onnx_refit.tensors import TensorSpec


class Given:
    """Weights as tensors hold them now.

    Args:
        attached: where they lie.
        tensors: the tensors.
        specs: of all source weights.
        places: where samples are taken.
        device: where everything is.

    Attributes:
        values: weight -> its value, dense and of the declared dtype, once they were taken.
    """

    def __init__(
        self,
        attached: Attached,
        tensors: Sequence[Any],
        specs: Mapping[str, TensorSpec],
        places: Places,
        device: Any,
    ) -> None:
        self._attached, self._tensors, self._specs = attached, tensors, specs
        self._places, self._device = places, device
        self.values: dict[str, Tensor] = {}

    def take(self, before: Tensor, after: Tensor, aside: Arena, *, look: bool) -> tuple[str, ...] | None:
        """Look at them, keep what is kept, take samples.

        Args:
            before: samples of the version before, as ``Marks`` has them.
            after: takes the new ones.
            aside: takes what is kept.
            look: whether to look for NaN and infinities.

        Returns:
            The weights whose samples are those of before; None where one is unsound or the tensors are others.
        """
        if not self._attached.form.same(self._tensors):
            return None
        places, attached = self._places, self._attached
        old, new = (one.view(torch.int64).view(-1, 32) for one in (before, after))
        alike = []
        for one in attached.lying:
            given = attached.value(one, self._tensors)
            value = given.to(torch_dtype(self._specs[one.name].dtype, one.name)).contiguous()
            self.values[one.name] = value
            if value.is_floating_point() and not _sound(given, value, rounding=attached.rounding, look=look):
                return None
            row = places.row[one.name]
            count = places.lengths[row]
            at = torch.from_numpy(places.positions[row, :count]).to(self._device)
            new[row, :count] = _words(value.reshape(-1)[at])
            if torch.equal(new[row, :count], old[row, :count]):
                alike.append(one.name)
            if one.name in aside.layout.slots:
                aside.raw(one.name).copy_(value.reshape(-1))
        return tuple(alike)


def _sound(given: Tensor, value: Tensor, *, rounding: bool, look: bool) -> bool:
    """Whether a weight may be taken: finite, and unchanged by its cast."""
    cast = given.dtype is not value.dtype
    if (look or cast) and not bool(torch.isfinite(given).all()):
        return False
    if not cast:
        return True
    return bool(torch.isfinite(value).all() if rounding else (value.to(given.dtype) == given).all())


def _words(elements: Tensor) -> Tensor:
    """The bits of elements, each in 8 bytes."""
    width = elements.element_size()
    found = torch.zeros((len(elements), 8), dtype=torch.uint8, device=elements.device)
    found[:, :width] = elements.contiguous().view(torch.uint8).view(-1, width)
    return found.view(torch.int64).view(-1)
