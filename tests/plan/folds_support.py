"""Convolutions and batch normalisations to fold."""

from __future__ import annotations

from typing import Any

from onnx import NodeProto

from onnx_refit.tensors import Array
from tests.plan.support import array, node, positive

REL = 1e-5


IMAGE = array(0, 2, 4, 9, 9)


def batch_norm(channels: int, seed: int = 10) -> dict[str, Array]:
    return {
        "scale": array(seed, channels),
        "shift": array(seed + 1, channels),
        "mean": array(seed + 2, channels),
        "variance": positive(seed + 3, channels),
    }


def bn_node(x: str, y: str, **attributes: Any) -> NodeProto:
    return node("BatchNormalization", [x, "scale", "shift", "mean", "variance"], [y], name="bn", **attributes)


CONVOLUTIONS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "plain": ("Conv", (6, 4, 3, 3), {}),
    "grouped": ("Conv", (6, 2, 3, 3), {"group": 2}),
    "depthwise": ("Conv", (4, 1, 3, 3), {"group": 4}),
    "strided": ("Conv", (6, 4, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "transposed": ("ConvTranspose", (4, 6, 3, 3), {}),
    "transposed-grouped": ("ConvTranspose", (4, 3, 3, 3), {"group": 2}),
    "transposed-depthwise": ("ConvTranspose", (4, 1, 3, 3), {"group": 4}),
}


def channels_of(kind: str) -> int:
    op_type, shape, attributes = CONVOLUTIONS[kind]
    return shape[0] if op_type == "Conv" else shape[1] * int(attributes.get("group", 1))


def convolution(kind: str, *, bias: bool) -> tuple[NodeProto, dict[str, Array]]:
    op_type, shape, attributes = CONVOLUTIONS[kind]
    weights = {"w": array(1, *shape)}
    if bias:
        weights["b"] = array(2, channels_of(kind))
    return node(op_type, ["x", *weights], ["c"], name="conv", **attributes), weights
