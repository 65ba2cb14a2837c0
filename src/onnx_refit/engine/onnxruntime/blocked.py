"""Weights in the layout that ``com.microsoft.nchwc.Conv`` reads: columns in blocks, each row of a block contiguous.

A matrix ``[K, N]`` becomes ``[N/b][K][b]``, with N padded to the block size b and K to the input's padding; as a
convolution weight its declared shape is ``[up(N), up(K), 1, 1]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from onnx_refit.engine.onnxruntime.native import NCHWC_DOMAIN, make_session, session_options
from onnx_refit.plan.trace.recipes import Operand, Piece, Recipe, Walk
from onnx_refit.tensors import TensorSpec


@dataclass(frozen=True)
class Matrix:
    """How a tensor holds a matrix ``[rows, columns]``: K inputs by N outputs.

    Attributes:
        name: the tensor.
        rows: K.
        columns: N.
        transposed: whether the tensor is ``[N, K]``.
    """

    name: str
    rows: int
    columns: int
    transposed: bool


def up(extent: int, block: int) -> int:
    """The extent rounded up to whole blocks."""
    return -(-extent // block) * block


def blocked_matrix(name: str, matrix: Matrix, block: int) -> Recipe:
    """The recipe, over ``matrix.name``, of the matrix in blocked layout."""
    k, n = matrix.rows, matrix.columns
    rows, row, column = up(k, block), n, 1
    if matrix.transposed:
        row, column = 1, k
    pieces = []
    whole_blocks, rest = divmod(n, block)
    if whole_blocks:
        target = Walk(0, (rows * block, block, 1))
        source = Operand(matrix.name, Walk(0, (block * column, row, column)))
        pieces.append(Piece((whole_blocks, k, block), target, (source,)))
    if rest:
        target = Walk(whole_blocks * rows * block, (block, 1))
        source = Operand(matrix.name, Walk(whole_blocks * block * column, (row, column)))
        pieces.append(Piece((k, rest), target, (source,)))
    return Recipe(TensorSpec(name, "float32", (up(n, block), rows, 1, 1)), tuple(pieces))


def padded_vector(name: str, source: str, size: int, block: int) -> Recipe:
    """The recipe of a bias with zeros behind it up to whole blocks."""
    walk = Walk(0, (1,))
    return Recipe(TensorSpec(name, "float32", (up(size, block),)), (Piece((size,), walk, (Operand(source, walk),)),))


def block_size() -> int:
    """The NCHWc block size of ONNX Runtime's kernels on this processor: 16 with AVX-512, otherwise 8 (1: no NCHWc)."""
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("ReorderInput", ["x"], ["y"], domain=NCHWC_DOMAIN)],
        "block",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 4, 1, 1])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid(NCHWC_DOMAIN, 1)], ir_version=9
    )
    session = make_session(model, session_options(1))
    shape = session.run(None, {"x": np.zeros((1, 4, 1, 1), np.float32)})[0].shape
    return int(shape[1])
