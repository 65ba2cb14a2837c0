"""The table of operators, and what an operator's function is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from onnx import NodeProto

from onnx_refit.errors import EngineError
from onnx_refit.tensors import onnx_dtype_name

Tensor = Any
"""A ``torch.Tensor``."""

# PyTorch's dtypes by our names, as far as PyTorch has kernels for them.
TORCH_DTYPES: dict[str, Any] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def torch_dtype(name: str, where: str | None = None) -> Any:
    """PyTorch's dtype of ours; EngineError for one without kernels (strings, uint64, float8, ...)."""
    found = TORCH_DTYPES.get(name)
    if found is None:
        raise EngineError(f"the engine 'cuda' has no tensors of {name}", where=where)
    return found


@dataclass(frozen=True)
class Node:
    """One node as its function sees it.

    Attributes:
        op_type: the operator.
        name: the node's name or that of its first output.
        opset: the version of its domain's operator set.
        outputs: how many outputs are wanted, trailing unused ones left out.
        attributes: its attributes (bytes decoded to str; tensors, graphs as they are).
        real: the floating-point dtype that stands for float32 where this node runs.
        recurrent: how LSTM and GRU run, see ``recurrent.choose``.
    """

    op_type: str
    name: str
    opset: int
    outputs: int
    attributes: Mapping[str, Any] = field(default_factory=dict)
    real: Any = torch.float32
    recurrent: str = "auto"

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or the default."""
        return self.attributes.get(name, default)

    def dtype(self, code: int) -> Any:
        """PyTorch's dtype of an ONNX element type; float32 is what stands for it here."""
        found = torch_dtype(onnx_dtype_name(code), self.name)
        return self.real if found is torch.float32 else found


Function = Callable[..., Any]
"""Takes the node and its operands (None for absent ones); gives a tensor, or a tuple of them."""


@dataclass(frozen=True)
class Operator:
    """How an operator runs.

    Attributes:
        function: see ``Function``.
        host: operands that must be on the host (their values decide shapes or axes).
        makes_host: its result is known on the host whatever its operands are (Shape, Size).
    """

    function: Function
    host: frozenset[int] = frozenset()
    makes_host: bool = False


OPERATORS: dict[str, Operator] = {}
"""Operator name -> how it runs; standard domain."""


def operator(*names: str, host: tuple[int, ...] = (), makes_host: bool = False) -> Callable[[Function], Function]:
    """Register a function for these operators."""

    def add(function: Function) -> Function:
        for name in names:
            OPERATORS[name] = Operator(function, frozenset(host), makes_host)
        return function

    return add


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """The attributes of a node, bytes decoded."""
    found = {}
    for attribute in node.attribute:
        value: Any = onnx.helper.get_attribute_value(attribute)
        found[attribute.name] = value.decode() if isinstance(value, bytes) else value
    return found


def ints(tensor: Tensor) -> list[int]:
    """The values of an integer tensor on the host."""
    return [int(value) for value in tensor.reshape(-1).tolist()]
