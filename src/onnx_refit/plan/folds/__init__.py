"""Symbolic folds: what an optimiser would do to weight values, done as nodes of the refit program."""

from __future__ import annotations

from collections.abc import Mapping

from onnx_refit.plan.folds.attention import SplitAttention
from onnx_refit.plan.folds.batchnorm import FoldBatchNorm, NormaliseBatchNorm
from onnx_refit.plan.folds.elementwise import FoldElementwise
from onnx_refit.plan.folds.framework import Fold
from onnx_refit.plan.folds.gemm import NormaliseGemm
from onnx_refit.plan.folds.matmul import FoldScaleIntoMatMul
from onnx_refit.plan.folds.quantised import DeriveBiasScale
from onnx_refit.plan.folds.recipes import Recipes
from onnx_refit.tensors import Array


def all_folds(recipes: Recipes, values: Mapping[str, Array]) -> tuple[Fold, ...]:
    """The folds, in the order in which they are tried at a node.

    Args:
        recipes: the recipes of this compilation.
        values: the first values of the source weights.
    """
    return (
        NormaliseGemm(recipes),
        SplitAttention(recipes),
        DeriveBiasScale(recipes, values),
        FoldBatchNorm(recipes),
        NormaliseBatchNorm(recipes),
        FoldScaleIntoMatMul(recipes),
        FoldElementwise(recipes),
    )
