"""From a training checkpoint's tensors to the tensors of the ONNX network: other names, other layouts, nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnx_refit.errors import WeightsError
from onnx_refit.tensors import Array

HIDDEN = 100
"""Units of an LSTM, a direction."""

LSTM_WEIGHTS = {
    "ctx_lstm": ("W_0", "R_0", "Parameter576_B_0"),
    "mod1": ("W_1", "R_1", "B_1"),
    "mod2": ("W_2", "R_2", "B_2"),
    "end_lstm": ("W_3", "R_3", "B_3"),
}
"""Layer in the checkpoint -> input weights [2, 400, in], recurrent weights [2, 400, 100], biases [2, 800]."""

REFITTED = ("Parameter576_B_0", "W_0")
"""The two tensors that NVIDIA's sample refits: bias and input weights of the LSTM that reads context and question."""

# PyTorch keeps the gates of an LSTM in the order input, forget, cell, output; ONNX wants input, output, forget, cell.
_GATES = (0, 3, 1, 2)


def onnx_weights(checkpoint: Mapping[str, Array]) -> dict[str, Array]:
    """Convert the tensors of a training checkpoint.

    Args:
        checkpoint: tensors under PyTorch's names: ``char_emb [chars, 8]``, ``word_emb [words, 50]``,
            ``conv.weight [100, 8, 5]``, ``hw.k.weight [300, 150]`` (transform, then gate), ``ctx_lstm``, ``mod1``,
            ``mod2``, ``end_lstm`` (both directions, gates i f g o, two biases), ``att [3, 200]``, ``start.weight`` and
            ``end.weight`` ``[1, 1000]``. ``start.bias`` and ``end.bias`` are not needed: they move all scores alike.

    Returns:
        Name of the ONNX network -> array of its own, C-contiguous, float32 (``word_embedding`` float16: half the
        size, and what is shipped).

    Raises:
        WeightsError: a tensor is missing, or of another shape.
    """
    take = _Taker(checkpoint)
    weights: dict[str, Array] = {
        "word_embedding": np.ascontiguousarray(take("word_emb", None, 50), np.float16),
        "char_embedding": take("char_emb", None, 8),
        "char_conv_W": np.ascontiguousarray(take("conv.weight", 100, 8, 5)[:, :, None, :]),
        "char_conv_B": take("conv.bias", 100),
    }
    for layer in (0, 1):
        weights[f"highway_{layer}_W"] = np.ascontiguousarray(take(f"hw.{layer}.weight", 300, 150).T)
        weights[f"highway_{layer}_B"] = take(f"hw.{layer}.bias", 300)
    for layer_name, inputs in (("ctx_lstm", 150), ("mod1", 800), ("mod2", 200), ("end_lstm", 1400)):
        weights |= zip(LSTM_WEIGHTS[layer_name], _lstm(take, layer_name, inputs), strict=True)
    attention = take("att", 3, 2 * HIDDEN)
    weights["attention_context"] = np.ascontiguousarray(attention[0, :, None])
    weights["attention_query"] = np.ascontiguousarray(attention[1])
    weights["attention_product"] = np.ascontiguousarray(attention[2])
    for side in ("start", "end"):
        weights[f"{side}_W"] = np.ascontiguousarray(take(f"{side}.weight", 1, 10 * HIDDEN).T)
    return {name: np.array(array, order="C") for name, array in weights.items()}


def _lstm(take: _Taker, layer: str, inputs: int) -> tuple[Array, Array, Array]:
    ends = ("l0", "l0_reverse")
    gates = 4 * HIDDEN
    w = np.stack([_reorder(take(f"{layer}.weight_ih_{end}", gates, inputs)) for end in ends])
    r = np.stack([_reorder(take(f"{layer}.weight_hh_{end}", gates, HIDDEN)) for end in ends])
    b = np.stack(
        [np.concatenate([_reorder(take(f"{layer}.bias_{kind}_{end}", gates)) for kind in ("ih", "hh")]) for end in ends]
    )
    return w, r, b


def _reorder(gates: Array) -> Array:
    """Rows of four gates in PyTorch's order -> in ONNX's order."""
    return np.concatenate([gates[HIDDEN * gate : HIDDEN * (gate + 1)] for gate in _GATES])


class _Taker:
    """Takes tensors of a checkpoint as float32, by name and shape (None: any size)."""

    def __init__(self, checkpoint: Mapping[str, Array]) -> None:
        self._checkpoint = checkpoint

    def __call__(self, name: str, *shape: int | None) -> Array:
        tensor = self._checkpoint.get(name)
        if tensor is None:
            raise WeightsError("the checkpoint has no such tensor", where=name)
        fits = tensor.ndim == len(shape) and all(
            want in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise WeightsError(f"has shape {list(tensor.shape)}, not [{wanted}]", where=name)
        return np.ascontiguousarray(tensor, np.float32)
