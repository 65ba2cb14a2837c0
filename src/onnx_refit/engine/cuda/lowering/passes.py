"""What is put together before a graph is lowered: fewer kernels, the same values up to rounding."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from onnx_refit.engine.cuda.lowering import pointwise, products
from onnx_refit.engine.cuda.lowering.drafts import Draft
from onnx_refit.engine.cuda.lowering.operators import OPERATORS, Node, Tensor, operator
from onnx_refit.engine.cuda.lowering.products import Products, Shapes


def improve(
    drafts: Sequence[Draft], outputs: Sequence[str], weights: Shapes, constants: Mapping[str, Tensor]
) -> Products:
    """The graph with biases, activations, scales and elementwise operators taken into their neighbours.

    Args:
        drafts: the nodes in order.
        outputs: the graph's outputs.
        weights: engine weight name -> shape.
        constants: the graph's own constants.
    """
    found = products.take_in_biases(drafts, outputs, weights)
    merged = products.merge(_biases_after_convolutions(found, weights), weights)
    scalars = {
        name: float(value.item())
        for name, value in constants.items()
        if value.numel() == 1 and value.dim() <= 1 and str(value.dtype) == "torch.float32"
    }
    made = products.scale(merged.drafts, outputs, hosted(merged.drafts, constants))
    made = pointwise.join(made, outputs, hosted(made, constants), scalars)
    return Products(made, merged.together)


def hosted(drafts: Sequence[Draft], constants: Collection[str]) -> set[str]:
    """The values that are on the host whatever the inputs are: constants, shapes, and what follows from them."""
    found = set(constants)
    for draft in drafts:
        known = OPERATORS.get(draft.op_type)
        if known is None:
            continue
        data = [name for place, name in enumerate(draft.inputs) if name and place not in known.host]
        if known.makes_host or all(name in found for name in data):
            found.update(draft.outputs)
    return found


def _biases_after_convolutions(drafts: Sequence[Draft], weights: Shapes) -> list[Draft]:
    """The bias of a convolution as an addition, which what follows takes in; cuDNN would add it by a kernel too."""
    made: list[Draft] = []
    for draft in drafts:
        bias = draft.inputs[2] if draft.op_type == "Conv" and len(draft.inputs) > 2 else ""
        rank = len(weights.get(draft.inputs[1], ())) - 2 if bias else 0
        if not bias or bias not in weights or rank < 1:
            made.append(draft)
            continue
        product, row = draft.outputs[0] + " before its bias", draft.outputs[0] + " bias by channels"
        made.append(replace(draft, inputs=draft.inputs[:2], outputs=(product,)))
        made.append(Draft("_Channels", draft.name + " bias", (bias,), (row,), {"rank": rank}))
        made.append(Draft("Add", draft.name + " with bias", (product, row), draft.outputs))
    return made


@operator("_Channels")
def channels(node: Node, bias: Tensor) -> Any:
    """A bias in the shape in which it adds to [batch, channels, ...]."""
    return bias.reshape(-1, *[1] * node.get("rank"))
