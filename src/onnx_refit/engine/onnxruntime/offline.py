"""ONNX Runtime's own optimiser, run offline: a model file in, an optimised model file out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort

from onnx_refit.engine.onnxruntime.native import PROVIDERS, session_options
from onnx_refit.errors import EngineError

# Optimisations whose result can depend on the values of weights, the likely culprits first: left out where a weight of
# the result stays unexplained.
CANDIDATES = (
    (
        "ConvBNFusion",
        "ConvMulFusion",
        "ConvAddFusion",
        "MatMulBNFusion",
        "MatMulScaleFusion",
        "QDQSelectorActionTransformer",
        "ConstantSharing",
    ),
    ("NchwcTransformer", "ConstantFolding", "AttentionFusion", "EmbedLayerNormFusion", "WeightBiasQuantization"),
    (
        "LayerNormFusion",
        "SimplifiedLayerNormFusion",
        "BiasGeluFusion",
        "MatMulAddFusion",
        "MatmulTransposeFusion",
        "GemmSumFusion",
        "GemmTransposeFusion",
        "DynamicQuantizeMatMulFusion",
        "MatMulIntegerToFloatFusion",
        "DivMulFusion",
        "PadFusion",
        "ReshapeFusion",
        "TransposeOptimizer",
        "CommonSubexpressionElimination",
        "EliminateIdentity",
        "NoopElimination",
        "CastElimination",
        "BiasSoftmaxFusion",
        "ConcatSliceElimination",
        "FuseReluClip",
    ),
)


# Left out always: its fused kernel goes through the elements one by one and takes five times as long as the
# vectorised LayerNormalization and Adds that it replaces (onnxruntime 1.24 to 1.32, 128 x 512: 300 us for 55).
SLOWER = ("SkipLayerNormFusion",)


def optimise_file(source: Path, target: Path, disabled: Sequence[str]) -> None:
    """Write what ONNX Runtime's CPU engine makes of a model at its highest level, weights beside it.

    Raises:
        EngineError: ONNX Runtime refuses the model.
    """
    options = session_options(1, optimise=True)
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.bin")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    left_out = [*SLOWER, *disabled]
    try:
        ort.InferenceSession(str(source), options, providers=PROVIDERS, disabled_optimizers=left_out)
    except Exception as error:  # noqa: BLE001  onnxruntime raises a dozen unrelated classes
        # The file is a temporary one, which means nothing to the user.
        reason = str(error).replace(f"Load model from {source} failed:", "").replace(f"{source.parent}{os.sep}", "")
        raise EngineError(f"ONNX Runtime refused the model: {reason}") from None
