"""The sample's network with random weights and a handful of words: its structure is what TensorRT judges."""

from __future__ import annotations

import numpy as np
import onnx

from onnx_refit.samples.bidaf.convert import onnx_weights
from onnx_refit.samples.bidaf.network import build_network
from onnx_refit.samples.bidaf.vocabulary import Vocabulary
from onnx_refit.tensors import Array

_LAYERS = {"ctx_lstm": 150, "mod1": 800, "mod2": 200, "end_lstm": 1400}


def random_bidaf(seed: int = 0, *, scores: bool = True) -> onnx.ModelProto:
    """BiDAF as published: string inputs, CategoryMapper, Hardmax, Compress; 20 words, 10 characters."""
    rng = np.random.default_rng(seed)

    def random(*shape: int) -> Array:
        values: Array = (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        return values

    checkpoint = {
        "word_emb": random(20, 50),
        "char_emb": random(10, 8),
        "conv.weight": random(100, 8, 5),
        "conv.bias": random(100),
        "att": random(3, 200),
        "start.weight": random(1, 1000),
        "end.weight": random(1, 1000),
    }
    for layer in (0, 1):
        checkpoint |= {f"hw.{layer}.weight": random(300, 150), f"hw.{layer}.bias": random(300)}
    for layer_name, inputs in _LAYERS.items():
        for end in ("l0", "l0_reverse"):
            checkpoint |= {
                f"{layer_name}.weight_ih_{end}": random(400, inputs),
                f"{layer_name}.weight_hh_{end}": random(400, 100),
                f"{layer_name}.bias_ih_{end}": random(400),
                f"{layer_name}.bias_hh_{end}": random(400),
            }
    words = ("", "<unknown>", *(f"word{i}" for i in range(18)))
    chars = ("", "<unknown>", *"abcdefgh")
    return build_network(Vocabulary(words, chars), onnx_weights(checkpoint), scores=scores)
