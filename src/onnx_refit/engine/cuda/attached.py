"""A trainer's tensors on this device as source weights: where each weight lies in them, and whether it still does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

import torch

from onnx_refit.engine.cuda.expressions import computed, view_of
from onnx_refit.engine.cuda.gather import KINDS
from onnx_refit.engine.cuda.lowering.operators import Tensor, torch_dtype
from onnx_refit.engine.cuda.lowering.pointwise import walk_of
from onnx_refit.tensors import TensorSpec
from onnx_refit.weights.provenance.expression import Expression, tensors_of

_ALIGNMENT = 16  # bytes, of what kernels read as it lies
_DTYPE, _SHAPE = attrgetter("dtype"), attrgetter("shape")
_WIDEST = 8  # bytes of an element
# Casts that give on the device, bit for bit, what they give on the host: each rounds at most once.
_CASTS = {
    (source, target)
    for source, targets in {
        torch.float16: (torch.bfloat16, torch.float32, torch.float64),
        torch.bfloat16: (torch.float16, torch.float32, torch.float64),
        torch.float32: (torch.float16, torch.bfloat16, torch.float64),
        torch.float64: (torch.float32,),
    }.items()
    for target in targets
}


@dataclass(frozen=True)
class Lying:
    """Where a weight lies.

    Attributes:
        name: the weight.
        tensor: which of the tensors it is a view of; None where it is computed from some.
        dtype: PyTorch's, as given.
        shape: of the weight.
        strides: of the view, in elements.
        offset: of the view in its tensor, in elements.
        expression: how it is made of the tensors.
        dense: whether kernels can read it as it lies, and it has the dtype declared.
    """

    name: str
    tensor: int | None
    dtype: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    expression: Expression
    dense: bool


class Form:
    """Where some tensors lie, and how: asked again at each refit, in few calls. It keeps none of them alive.

    Args:
        tensors: all tensors.
        chosen: which of them; None for all.
    """

    def __init__(self, tensors: Sequence[Tensor], chosen: Sequence[int] | None = None) -> None:
        some = list(tensors) if chosen is None else [tensors[place] for place in chosen]
        self._choose = None if chosen is None else itemgetter(*chosen) if len(chosen) > 1 else None
        self._only = chosen[0] if chosen is not None and len(chosen) == 1 else None
        self.addresses = list(map(torch.Tensor.data_ptr, some))
        self._places = list(range(len(some)))
        self._lie_at = _comparing_addresses(some, self.addresses, self._places)
        self._same_form = _same_form(some)

    def same(self, tensors: Sequence[Any]) -> bool:
        """Whether these lie where those did, and have their dtypes, shapes, orders of elements and device."""
        if self._choose is not None:
            tensors = self._choose(tensors)
        elif self._only is not None:
            tensors = (tensors[self._only],)
        try:
            if self._lie_at is None:
                there = list(map(torch.Tensor.data_ptr, tensors)) == self.addresses
            else:
                there = len(tensors) == len(self._places)
                there = there and self._lie_at(list(tensors), self.addresses, self._places)
            return there and self._same_form(*tensors)
        except (TypeError, RuntimeError):  # something else by now, or without memory
            return False


class Attached:
    """Tensors that were looked at once; their values are read at each refit. It keeps none of them alive.

    Attributes:
        lying: each weight that they give, in the plan's order.
        names: those weights.
        rounding: whether casts may round.
        dense: whether kernels can read all of them as they lie.
        held: whether their memory stays readable, whatever becomes of the tensors.
        pointers: the address of each weight's first element; 0 for a computed one.
        form: of all tensors.

    Args:
        keys: the tensors' names.
        tensors: the tensors.
        lying: the weights.
        rounding: see above.
    """

    def __init__(self, keys: Sequence[str], tensors: Sequence[Tensor], lying: Sequence[Lying], rounding: bool) -> None:
        self.lying = tuple(lying)
        self.names = tuple(one.name for one in lying)
        self.rounding = rounding
        self.dense = all(one.dense for one in lying)
        self.form = Form(tensors)
        self.held = False
        self._storages: list[object] = []
        self._keys = tuple(keys)
        self._parted: tuple[frozenset[str] | None, tuple[Form, Form]] | None = None
        addresses = self.form.addresses
        self.pointers = [
            0 if one.tensor is None else addresses[one.tensor] + one.offset * one.dtype.itemsize for one in lying
        ]

    def begins(self, tensors: Sequence[Any]) -> bool:
        """Whether the first of these lies where the first of those did."""
        first = tensors[0]
        try:
            return isinstance(first, torch.Tensor) and first.data_ptr() == self.form.addresses[0]
        except RuntimeError:  # without memory by now
            return False

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """Keep the memory of these very tensors from being given back."""
        self._storages = [tensor.untyped_storage() for tensor in tensors]
        self.held = bool(self._storages)

    def parted(self, first: frozenset[str], tensors: Sequence[Tensor]) -> tuple[Form, Form]:
        """The form of the tensors that some weights lie in, and of all others.

        Args:
            first: those weights, each a view of a tensor.
            tensors: the tensors; only looked at when this is asked for first, once they are known to be the same.
        """
        if self._parted is None or (self._parted[0] is not first and self._parted[0] != first):
            chosen = {one.tensor for one in self.lying if one.name in first and one.tensor is not None}
            left = [place for place in range(len(tensors)) if place not in chosen]
            self._parted = first, (Form(tensors, sorted(chosen)), Form(tensors, left))
        return self._parted[1]

    def value(self, one: Lying, tensors: Sequence[Tensor]) -> Tensor:
        """A weight in the dtype given: a view, or a new tensor where it is computed."""
        if one.tensor is None:
            named = dict(zip(self._keys, tensors, strict=True))
            return computed(one.expression, lambda name: named[name].detach())
        tensor = tensors[one.tensor].detach()
        return tensor.as_strided(one.shape, one.strides, tensor.storage_offset() + one.offset)


def attach(
    parts: Mapping[str, Expression],
    tensors: Mapping[str, object],
    specs: Mapping[str, TensorSpec],
    device: Any,
    *,
    rounding: bool,
) -> Attached | None:
    """Look at tensors; None where one of them lies elsewhere, or a weight cannot be made of them on the device.

    Args:
        parts: weight -> how it is made of the tensors.
        tensors: name -> tensor.
        specs: all weights, in the plan's order.
        device: the device.
        rounding: whether casts may round.
    """
    used = dict.fromkeys(name for part in parts.values() for name in tensors_of(part))
    given: list[Tensor] = []
    for name in used:
        tensor = tensors.get(name)
        if not isinstance(tensor, torch.Tensor) or tensor.device != device or tensor.layout is not torch.strided:
            return None
        if tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.element_size() > _WIDEST:
            return None
        given.append(tensor)
    index = {name: place for place, name in enumerate(used)}
    lying = []
    for name, spec in specs.items():
        part = parts.get(name)
        if part is None:
            continue
        found = _lying(name, part, given, index, spec)
        if found is None:
            return None
        lying.append(found)
    return Attached(list(used), given, lying, rounding)


def _lying(
    name: str, part: Expression, tensors: Sequence[Tensor], index: Mapping[str, int], spec: TensorSpec
) -> Lying | None:
    found = view_of(part, lambda key: tensors[index[key]].detach())
    wanted = torch_dtype(spec.dtype, name)
    if wanted.is_floating_point and wanted not in KINDS:
        return None  # a dtype that kernels do not look for NaN in
    if found is None or walk_of([found[0].shape], [found[0].stride()]) is None:
        made = computed(part, lambda key: tensors[index[key]].detach(), check=True)
        if made is None or made.dtype is not wanted or tuple(made.shape) != spec.static_shape:
            return None
        return Lying(name, None, wanted, spec.static_shape, made.stride(), 0, part, dense=False)
    view, origin = found
    if tuple(view.shape) != spec.static_shape or (view.dtype is not wanted and (view.dtype, wanted) not in _CASTS):
        return None
    dense = view.dtype is wanted and view.is_contiguous() and view.data_ptr() % _ALIGNMENT == 0
    offset = view.storage_offset() - tensors[index[origin]].storage_offset()
    return Lying(
        name, index[origin], view.dtype, spec.static_shape, tuple(view.stride()), offset, part, dense or not spec.size
    )


def _comparing_addresses(tensors: Sequence[Tensor], addresses: list[int], places: list[int]) -> Any:
    """What compares the addresses of tensors in C++, where this PyTorch can (those built for GPUs); else None."""
    equal: Any = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
    try:
        works = equal is not None and equal(list(tensors), addresses, places)
        return equal if works and not (places and equal(list(tensors), [a + 1 for a in addresses], places)) else None
    except (TypeError, RuntimeError):
        return None


def _same_form(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Tells whether other tensors have the form of these, in few calls: there may be thousands.

    PyTorch's compiler guards what it compiled by such a check, in C++. Where this PyTorch has none, or another one, we
    ask each tensor. Either holds no tensor.
    """
    sizes: Any = [list(tensor.shape) for tensor in tensors]
    strides: Any = [list(tensor.stride()) for tensor in tensors]
    try:
        from torch._C._dynamo.guards import TensorGuards

        guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        if guards.check(*tensors):
            check: Callable[..., bool] = guards.check
            return check
    except (ImportError, AttributeError, TypeError, RuntimeError, AssertionError):
        pass
    devices = {tensor.device for tensor in tensors}
    dtypes, shapes = [tensor.dtype for tensor in tensors], [tensor.shape for tensor in tensors]
    steps = [tensor.stride() for tensor in tensors]

    def alike(*others: Any) -> bool:
        return (
            all(isinstance(other, torch.Tensor) for other in others)
            and list(map(_DTYPE, others)) == dtypes
            and list(map(_SHAPE, others)) == shapes
            and list(map(torch.Tensor.stride, others)) == steps
            and {other.device for other in others} <= devices
        )

    return alike
