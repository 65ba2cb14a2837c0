"""Which tensors of a model are refittable: parameters are, structure is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np
from onnx import NodeProto

from onnx_refit.plan.roles import Role, main_operand, role
from onnx_refit.plan.strip import Stored
from onnx_refit.tensors import Array, dtype_name, is_floating

Use = tuple[NodeProto, int]
"""A node and the input at which it reads the tensor."""

# Operators that hand their first input on, element by element, to something else that gives it its meaning.
_REARRANGING = {
    "Cast",
    "Expand",
    "Flatten",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
}
_ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Gather", "Sum"}
_MASKING = {"Add", "Sub", "Where"}

_ZERO_POINTS: dict[str, int] = {
    "DequantizeLinear": 2,
    "QLinearConv": 5,
    "QLinearMatMul": 5,
    "ConvInteger": 3,
    "MatMulInteger": 3,
    "DynamicQuantizeMatMul": 3,
    "MatMulIntegerToFloat": 5,
    "QGemm": 5,
}


class Judge:
    """Decides for each tensor, from what reads it, whether it is refittable by default.

    Args:
        tensors: every tensor of the model.
        uses: value name -> what reads it, over all graphs.
    """

    def __init__(self, tensors: Mapping[str, Stored], uses: Mapping[str, Sequence[Use]]) -> None:
        self._tensors = tensors
        self._uses = uses
        self._makers = {output: node for readers in uses.values() for node, _ in readers for output in node.output}

    def reason_constant(self, name: str) -> str | None:
        """Why the tensor stays constant, or None where it is refittable."""
        stored, uses = self._tensors[name], self._uses.get(name, ())
        kind = dtype_name(stored.array.dtype)
        if any(self._is_quantised(node, index) for node, index in uses):
            return self._reason_quantised(stored.array, uses)
        if not is_floating(kind):
            return f"it is not a floating-point parameter ({kind})"
        ends = list(self._ends(uses))
        for node, index in ends:
            if role(node, index) is Role.STRUCTURE:
                return f"it is structure of {node.op_type} (input {index}), not a parameter"
        if stored.array.size == 0:
            return "it is empty"
        if stored.origin == "constant-of-shape" and not any(self._is_learned(*end) for end in ends):
            return "it is filled by ConstantOfShape and no operator reads it as a parameter"
        if stored.array.size == 1 and not self._is_parameter(uses):
            return "it has one element"
        return self._reason_by_value(stored, ends)

    @staticmethod
    def _reason_by_value(stored: Stored, ends: Sequence[Use]) -> str | None:
        """What only its values give away: states of zeros, masks, and the neutral parameters exporters insert."""
        array = stored.array
        if ends and all(role(*end) is Role.STATE for end in ends) and not array.any():
            return "it is an initial state of zeros"
        if ends and all(node.op_type in _MASKING for node, _ in ends) and _is_mask(array):
            return "it is a mask: it holds infinities or the largest numbers of its dtype"
        normalises = all(node.op_type == "InstanceNormalization" for node, _ in ends)
        if stored.origin == "constant" and ends and normalises and _is_neutral(array):
            return "it is the neutral parameter of a group normalisation: a Constant node of zeros or ones"
        return None

    def _ends(self, uses: Sequence[Use]) -> Iterator[Use]:
        """What reads the tensor, seen through operators that only rearrange it."""
        pending, seen = list(uses), set()
        while pending:
            node, index = pending.pop()
            if node.op_type not in _REARRANGING or index != 0:
                yield node, index
                continue
            for output in node.output:
                if output and output not in seen:
                    seen.add(output)
                    pending.extend(self._uses.get(output, ()))

    @staticmethod
    def _is_learned(node: NodeProto, index: int) -> bool:
        return role(node, index) is Role.PARAMETER or node.op_type in _ARITHMETIC

    def _is_quantised(self, node: NodeProto, index: int) -> bool:
        if role(node, index) is not Role.QUANTISED:
            return self._is_dynamic_scale(node, index)
        main = main_operand(node)
        return index == main or (main < len(node.input) and node.input[main] in self._tensors)

    def _is_dynamic_scale(self, node: NodeProto, index: int) -> bool:
        """The weight scale of the dynamic form: MatMulInteger(x, W) -> Cast -> Mul(., Mul(x_scale, w_scale))."""
        if node.op_type != "Mul" or self._tensors[node.input[index]].array.size != 1:
            return False
        for outer, at in self._uses.get(node.output[0], ()):
            other = self._makers.get(outer.input[1 - at]) if outer.op_type == "Mul" else None
            if other is None or other.op_type != "Cast":
                continue
            product = self._makers.get(other.input[0])
            if product is not None and product.op_type in {"MatMulInteger", "ConvInteger"}:
                return product.input[1] in self._tensors
        return False

    @staticmethod
    def _reason_quantised(array: Array, uses: Sequence[Use]) -> str | None:
        zeros = dtype_name(array.dtype) in {"int8", "int4", "int32"} and not array.astype(np.int32).any()
        if zeros and all(_ZERO_POINTS.get(node.op_type) == index for node, index in uses):
            return "it is the zero point of a symmetric quantisation"
        return None

    def _is_parameter(self, uses: Sequence[Use]) -> bool:
        return any(role(node, index) is Role.PARAMETER or self._is_bias(node, index) for node, index in uses)

    def _is_bias(self, node: NodeProto, index: int) -> bool:
        """Whether a one-element operand is added to a product of one column."""
        if node.op_type != "Add" or self._tensors[node.input[index]].array.ndim != 1:
            return False
        product = self._makers.get(node.input[1 - index])
        return product is not None and product.op_type in {"MatMul", "Gemm"}


def _is_mask(array: Array) -> bool:
    largest = float(ml_dtypes.finfo(array.dtype).max)  # type: ignore[no-untyped-call]
    return bool((np.abs(array.astype(np.float64)) >= 0.9 * largest).any())


def _is_neutral(array: Array) -> bool:
    flat = array.reshape(-1)
    first = float(flat[0])
    return first in {0.0, 1.0} and float(flat[-1]) == first and bool((flat == flat[0]).all())
