"""What an operand of an operator is: a parameter, a quantised parameter, or structure that must stay constant.

Positions are input indices, the same in every version of the operators (opset 7 to the latest, com.microsoft 1).
"""

from __future__ import annotations

from enum import Enum

from onnx import NodeProto


class Role(Enum):
    """The part an operand plays in its operator."""

    PARAMETER = "a parameter"
    QUANTISED = "a quantised parameter"
    STRUCTURE = "structure"
    STATE = "an initial state"
    PLAIN = "an operand"


# Operands that are parameters whatever their size: a one-element bias is still a bias.
_PARAMETERS: dict[str, frozenset[int]] = {
    "Conv": frozenset({1, 2}),
    "ConvTranspose": frozenset({1, 2}),
    "DeformConv": frozenset({1, 3}),
    "Gemm": frozenset({0, 1, 2}),
    "MatMul": frozenset({0, 1}),
    "BatchNormalization": frozenset({1, 2, 3, 4}),
    "InstanceNormalization": frozenset({1, 2}),
    "LayerNormalization": frozenset({1, 2}),
    "GroupNormalization": frozenset({1, 2}),
    "RMSNormalization": frozenset({1}),
    "SimplifiedLayerNormalization": frozenset({1}),
    "SkipLayerNormalization": frozenset({2, 3, 4}),
    "EmbedLayerNormalization": frozenset({2, 3, 4, 5, 6}),
    "LSTM": frozenset({1, 2, 3, 7}),
    "GRU": frozenset({1, 2, 3}),
    "RNN": frozenset({1, 2, 3}),
    "PRelu": frozenset({1}),
    "Attention": frozenset({1, 2}),
    "FusedMatMul": frozenset({0, 1}),
    "FusedConv": frozenset({1, 2}),
    "FusedGemm": frozenset({0, 1, 2}),
    "BiasGelu": frozenset({1}),
}

# Quantised weights with their scales and zero points, and what is added to them.
_QUANTISED: dict[str, frozenset[int]] = {
    "DequantizeLinear": frozenset({0, 1, 2}),
    "QLinearConv": frozenset({3, 4, 5, 8}),
    "QLinearMatMul": frozenset({3, 4, 5}),
    "ConvInteger": frozenset({1, 3}),
    "MatMulInteger": frozenset({1, 3}),
    "DynamicQuantizeMatMul": frozenset({1, 2, 3, 4}),
    "MatMulIntegerToFloat": frozenset({1, 3, 5, 6}),
    "QGemm": frozenset({3, 4, 5, 6}),
    "QAttention": frozenset({1, 2, 4, 7}),
    "DynamicQuantizeLSTM": frozenset({1, 2, 3, 7, 8, 9, 10, 11}),
    "MatMulNBits": frozenset({1, 2, 3, 5}),
    "MatMulBnb4": frozenset({1, 2}),
    "GatherBlockQuantized": frozenset({0, 2, 3}),
}

# The operand that must be a weight for the others of the row above to be one.
_MAIN: dict[str, int] = {
    "DequantizeLinear": 0,
    "QLinearConv": 3,
    "QLinearMatMul": 3,
    "QGemm": 3,
    "GatherBlockQuantized": 0,
}

# Floating-point operands that say what the operator does, not what the model learned.
_STRUCTURE: dict[str, frozenset[int]] = {
    "Resize": frozenset({1, 2}),
    "Upsample": frozenset({1}),
    "OneHot": frozenset({1, 2}),
    "Range": frozenset({0, 1, 2}),
    "Pad": frozenset({2}),
    "Clip": frozenset({1, 2}),
    "Dropout": frozenset({1}),
    "QuantizeLinear": frozenset({1, 2}),
    "NonMaxSuppression": frozenset({2, 3, 4}),
    "MelWeightMatrix": frozenset({0, 1, 2, 3, 4}),
    "RoiAlign": frozenset({1}),
    "Loop": frozenset({0, 1}),
    "If": frozenset({0}),
}

_STATES: dict[str, frozenset[int]] = {"LSTM": frozenset({5, 6}), "GRU": frozenset({5}), "RNN": frozenset({5})}

_EMPTY: frozenset[int] = frozenset()


def role(node: NodeProto, index: int) -> Role:
    """The role of one operand of a node."""
    if index in _QUANTISED.get(node.op_type, _EMPTY):
        return Role.QUANTISED
    if index in _PARAMETERS.get(node.op_type, _EMPTY):
        return Role.PARAMETER
    if index in _STRUCTURE.get(node.op_type, _EMPTY):
        return Role.STRUCTURE
    if index in _STATES.get(node.op_type, _EMPTY):
        return Role.STATE
    return Role.PLAIN


def main_operand(node: NodeProto) -> int:
    """The operand whose being a weight makes the other quantised operands of the node weights (1 for most)."""
    return _MAIN.get(node.op_type, 1)
