"""Operators that work element by element."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch.nn import functional

from onnx_refit.engine.cuda.lowering.operators import Node, Tensor, operator

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Neg": torch.neg,
    "Exp": torch.exp,
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Tan": torch.tan,
    "Asin": torch.asin,
    "Acos": torch.acos,
    "Atan": torch.atan,
    "Sinh": torch.sinh,
    "Cosh": torch.cosh,
    "Tanh": torch.tanh,
    "Asinh": torch.asinh,
    "Acosh": torch.acosh,
    "Atanh": torch.atanh,
    "Erf": torch.erf,
    "Sigmoid": torch.sigmoid,
    "Relu": torch.relu,
    "Softsign": functional.softsign,
    "Softplus": functional.softplus,
    "HardSwish": functional.hardswish,
    "Mish": functional.mish,
    "Not": torch.logical_not,
    "IsNaN": torch.isnan,
    "BitwiseNot": torch.bitwise_not,
}

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}

_MANY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Sum": torch.add,
    "Mean": torch.add,
}


def _plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(node: Node, *operands: Tensor) -> Tensor:
        return function(*operands)

    return call


for _name, _unary in _UNARY.items():
    operator(_name)(_plain(_unary))
for _name, _binary in _BINARY.items():
    operator(_name)(_plain(_binary))


@operator(*_MANY)
def many(node: Node, *operands: Tensor) -> Tensor:
    """Fold any number of operands."""
    result = reduce(_MANY[node.op_type], operands)
    return result / len(operands) if node.op_type == "Mean" else result


@operator("Identity", "Dropout")
def identity(node: Node, x: Tensor, *_: Tensor) -> Any:
    """Give the operand back; the mask of a Dropout at inference is all true."""
    return x if node.outputs == 1 else (x, torch.ones_like(x, dtype=torch.bool))


@operator("Div")
def divide(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Divide; integers towards zero."""
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


@operator("Mod")
def modulo(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """The remainder, with the divisor's sign, or the dividend's if ``fmod``."""
    return torch.fmod(a, b) if node.get("fmod", 0) else torch.remainder(a, b)


@operator("Pow")
def power(node: Node, a: Tensor, b: Tensor) -> Tensor:
    """Raise; the result has the base's dtype."""
    return torch.pow(a, b).to(a.dtype)


@operator("Where")
def where(node: Node, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Choose element by element."""
    return torch.where(condition, a, b)


@operator("Cast", "CastLike")
def cast(node: Node, x: Tensor, like: Tensor | None = None) -> Tensor:
    """Convert; from floating point to integers towards zero."""
    return x.to(node.dtype(node.get("to")) if like is None else like.dtype)


@operator("Clip")
def clip(node: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Bound; the bounds were attributes before opset 11. The upper one wins where they cross."""
    if low is not None:
        x = torch.maximum(x, low)
    elif node.get("min") is not None:
        x = x.clamp(min=node.get("min"))
    if high is not None:
        return torch.minimum(x, high)
    return x if node.get("max") is None else x.clamp(max=node.get("max"))


@operator("LeakyRelu")
def leaky_relu(node: Node, x: Tensor) -> Tensor:
    """Scale what is negative."""
    return functional.leaky_relu(x, node.get("alpha", 0.01))


@operator("PRelu")
def parametric_relu(node: Node, x: Tensor, slope: Tensor) -> Tensor:
    """Scale what is negative by a weight."""
    return torch.where(x < 0, x * slope, x)


@operator("Elu")
def elu(node: Node, x: Tensor) -> Tensor:
    """Exponential below zero."""
    return functional.elu(x, node.get("alpha", 1.0))


@operator("Celu")
def celu(node: Node, x: Tensor) -> Tensor:
    """Exponential below zero, smooth for any alpha."""
    return functional.celu(x, node.get("alpha", 1.0))


@operator("Selu")
def selu(node: Node, x: Tensor) -> Tensor:
    """Scaled exponential linear unit; the defaults are those of its authors (arXiv 1706.02515)."""
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    return gamma * torch.where(x > 0, x, alpha * (torch.exp(x) - 1))


@operator("HardSigmoid")
def hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    """A sigmoid of straight lines."""
    return torch.clamp(node.get("alpha", 0.2) * x + node.get("beta", 0.5), 0, 1)


@operator("Gelu")
def gelu(node: Node, x: Tensor) -> Tensor:
    """Gaussian error linear unit."""
    return functional.gelu(x, approximate=node.get("approximate", "none"))


@operator("ThresholdedRelu")
def thresholded_relu(node: Node, x: Tensor) -> Tensor:
    """Keep what is above the threshold."""
    return torch.where(x > node.get("alpha", 1.0), x, torch.zeros_like(x))


@operator("IsInf")
def is_infinite(node: Node, x: Tensor) -> Tensor:
    """Which elements are infinite, of the signs asked for."""
    result = torch.zeros_like(x, dtype=torch.bool)
    if node.get("detect_positive", 1):
        result = result | torch.isposinf(x)
    if node.get("detect_negative", 1):
        result = result | torch.isneginf(x)
    return result
