"""ONNX Runtime packs the weights for ONNX Runtime: its ReorderInput writes matrices in blocked layout."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from onnx_refit.engine.onnxruntime.blocked import Packing, up
from onnx_refit.engine.onnxruntime.native import NCHWC_DOMAIN, Binding, make_session, session_options, wrap
from onnx_refit.tensors import Array


class Packer:
    """Writes blocked matrices, about as fast as memory allows. Thread-safe; releases the interpreter's lock.

    Args:
        block: the host's block size.
    """

    def __init__(self, block: int) -> None:
        self._block = block
        # One thread a session: callers pack different matrices in different threads.
        self._sessions = [make_session(_model(last), session_options(1)) for last in (0, 1)]

    def pack(self, packing: Packing, source: Array, target: Array) -> None:
        """Write a matrix.

        Args:
            packing: how the source holds it.
            source: flat float32, C-contiguous.
            target: flat float32, C-contiguous, ``up(N) * K`` elements.
        """
        k, n = packing.rows, packing.columns
        view = source[packing.offset : packing.offset + k * n]
        shape = (1, 1, k, n) if packing.channels_last else (1, n, 1, k)
        binding = Binding(self._sessions[packing.channels_last], {}, ())
        binding.run_into(
            (("x", wrap(view.reshape(shape))),),
            (("y", wrap(target.reshape(1, up(n, self._block), 1, k))),),
        )


def _model(channels_last: int) -> onnx.ModelProto:
    node = helper.make_node("ReorderInput", ["x"], ["y"], domain=NCHWC_DOMAIN, channels_last=channels_last)
    graph = helper.make_graph(
        [node],
        "pack",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b", "c", "d"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["e", "f", "g", "h"])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(NCHWC_DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)
