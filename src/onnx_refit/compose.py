"""Weights made of other weights: adapters merged, deltas applied, checkpoints interpolated.

Each function gives a weight source for ``Engine.refit``, ``check`` or ``diff``. All start from a base that is never
changed, so that adapter A, then B, then A again gives A's bits.
"""

from __future__ import annotations

import os

from onnx_refit.weights.delta import DeltaSource
from onnx_refit.weights.lerp import LerpSource
from onnx_refit.weights.lora import LoraSource, load_adapter
from onnx_refit.weights.name_map import NameMap
from onnx_refit.weights.open import WeightsLike, open_weights
from onnx_refit.weights.recover import RecoveredSource
from onnx_refit.weights.source import WeightSource

AdapterLike = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]
"""The folder or file of a PEFT adapter, alone or with how strong it is to be (1 is as trained)."""


def lora(base: WeightsLike, *adapters: AdapterLike, names: NameMap | None = None) -> WeightSource:
    """A base with LoRA adapters merged in (Hu et al., arXiv 2106.09685; PEFT's safetensors form).

    Args:
        base: the weights the adapters were trained on, by the names of the trained model.
        adapters: any number of adapters, each with its scale if it is not 1.
        names: the base has the names of the exported model, as ``engine.weights()`` has; the map of its plan
            (``plan.names``) leads back to those of the trained one. What the exporter scaled, folded or rounded cannot
            be recovered and is left out; refit with ``partial=True`` then, so that it stays.

    Returns:
        The merged weights, by the names of the trained model.

    Raises:
        WeightsError: an adapter cannot be read, or is for modules or shapes that the base does not have.
    """
    opened = open_weights(base) if names is None else RecoveredSource(names, open_weights(base))
    pairs = [one if isinstance(one, tuple) else (one, 1.0) for one in adapters]
    return LoraSource(opened, [(load_adapter(path), float(scale)) for path, scale in pairs])


def delta(base: WeightsLike, path: str | os.PathLike[str]) -> WeightSource:
    """A base with a delta file applied (``onnx-refit diff A B -o delta.safetensors`` makes one).

    Raises:
        WeightsError: the delta was made from another base.
        WeightsFormatError: the file is no delta, or damaged.
    """
    return DeltaSource(open_weights(base), path)


def lerp(a: WeightsLike, b: WeightsLike, t: float) -> WeightSource:
    """``(1 - t) * a + t * b``, computed in float32; values of ``t`` outside [0, 1] extrapolate.

    Raises:
        WeightsError: the two are not checkpoints of one model.
    """
    return LerpSource(open_weights(a), open_weights(b), t)
