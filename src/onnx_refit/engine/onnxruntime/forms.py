"""Which form of a matrix product is faster on this host: the plain one or the blocked one."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnx_refit.engine.onnxruntime.blocked import up
from onnx_refit.engine.onnxruntime.native import NCHWC_DOMAIN, Binding, make_session, session_options, wrap
from onnx_refit.plan.compiled import Decision, Verdict
from onnx_refit.tensors import Array

_FEWEST_COLUMNS = 16  # below, the blocked form computes mostly padding
_SURELY_BLOCKED = 512 * 1024  # elements of the matrix from which the plain form never won a race
_ROWS = (1, 8, 64)
_ROUNDS = 24
_TIE = 1.05  # chains of blocked products save the conversions that a race of one has to pay


class Forms:
    """Chooses the form of each product by its size, timing small ones once.

    Args:
        threads: threads of the sessions timed.
        block: the host's block size.
        known: choices made earlier on this host: ``"K,N,M"`` -> latency of the blocked form over the plain one.
    """

    def __init__(self, threads: int, block: int, known: Mapping[str, float] | None = None) -> None:
        self._threads = threads
        self._block = block
        self.ratios: dict[str, float] = dict(known or {})
        self.decisions: list[Decision] = []

    def prefer_blocked(self, rows: int, columns: int, count: int | None) -> bool:
        """Whether a product of ``count`` (None: any number of) vectors of K=rows by [K, N=columns] runs blocked."""
        if columns < _FEWEST_COLUMNS:
            return False
        if rows * columns >= _SURELY_BLOCKED:
            return True
        key = f"{rows},{columns},{count or 'any'}"
        if key not in self.ratios:
            self.ratios[key] = self._race(rows, columns, _ROWS if count is None else (count,))
            blocked = self.ratios[key] <= _TIE
            self.decisions.append(
                Decision(
                    f"matrix products of {rows}x{columns}",
                    "run as blocked 1x1 convolutions",
                    Verdict.ACCEPTED if blocked else Verdict.REJECTED,
                    f"timed on this host at {self.ratios[key]:.2f} of the plain form's latency",
                )
            )
        return self.ratios[key] <= _TIE

    @staticmethod
    def surely_blocked(rows: int, columns: int, count: int | None) -> bool:
        """Whether a product runs blocked even where its weights could be prepacked."""
        return rows * columns >= _SURELY_BLOCKED

    def _race(self, rows: int, columns: int, counts: tuple[int, ...]) -> float:
        plain, blocked = self._plain(rows, columns), self._blocked(rows, columns)
        ratios = []
        for count in counts:
            x: Array = np.ones((count, rows), np.float32)
            best = [float("inf"), float("inf")]  # the least disturbed run of each
            for _ in range(_ROUNDS):
                for form, binding in enumerate((plain, blocked)):
                    start = time.perf_counter()
                    binding.run((("x", x),))
                    best[form] = min(best[form], time.perf_counter() - start)
            ratios.append(best[1] / best[0])
        return float(np.exp(np.mean(np.log(ratios))))

    def _plain(self, rows: int, columns: int) -> Binding:
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"])]
        return self._binding(nodes, rows, columns, (rows, columns), columns, ())

    def _blocked(self, rows: int, columns: int) -> Binding:
        ints = [
            onnx.numpy_helper.from_array(np.array([1, 1, -1, rows], np.int64), "into"),
            onnx.numpy_helper.from_array(np.array([-1, columns], np.int64), "out"),
            onnx.numpy_helper.from_array(np.array([0, 0, 0, 0, 0, 0, 0, -rows % 4], np.int64), "pads"),
        ]
        nodes = [
            helper.make_node("Reshape", ["x", "into"], ["a"]),
            helper.make_node("Pad", ["a", "pads"], ["p"]) if rows % 4 else helper.make_node("Identity", ["a"], ["p"]),
            helper.make_node("ReorderInput", ["p"], ["r"], domain=NCHWC_DOMAIN, channels_last=1),
            helper.make_node("Conv", ["r", "w", "b"], ["c"], domain=NCHWC_DOMAIN, kernel_shape=[1, 1]),
            helper.make_node("ReorderOutput", ["c"], ["d"], domain=NCHWC_DOMAIN, channels=columns, channels_last=1),
            helper.make_node("Reshape", ["d", "out"], ["y"]),
        ]
        if not rows % 4:
            nodes = [node for node in nodes if node.op_type != "Identity"]
            nodes[1].input[0] = "a"
        padded = up(columns, self._block)
        return self._binding(nodes, rows, columns, (padded, up(rows, self._block), 1, 1), padded, ints)

    def _binding(
        self,
        nodes: list[onnx.NodeProto],
        rows: int,
        columns: int,
        weight: tuple[int, ...],
        bias: int,
        initializers: list[TensorProto] | tuple[()],
    ) -> Binding:
        graph = helper.make_graph(
            nodes,
            "race",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", rows]),
                helper.make_tensor_value_info("w", TensorProto.FLOAT, weight),
                helper.make_tensor_value_info("b", TensorProto.FLOAT, [bias]),
            ],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", columns])],
            list(initializers),
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(NCHWC_DOMAIN, 1)]
        session = make_session(
            helper.make_model(graph, opset_imports=opsets, ir_version=9), session_options(self._threads)
        )
        arrays = {"w": np.full(weight, 0.01, np.float32), "b": np.zeros(bias, np.float32)}
        binding = Binding(session, {name: wrap(array) for name, array in arrays.items()}, ["y"])
        binding.keep(arrays)
        return binding
