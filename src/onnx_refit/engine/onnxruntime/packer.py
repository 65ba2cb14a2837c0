"""ONNX Runtime packs the weights for ONNX Runtime: its ReorderInput writes matrices in blocked layout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from onnx_refit.engine.onnxruntime.blocked import up
from onnx_refit.engine.onnxruntime.native import NCHWC_DOMAIN, Binding, Outlet, make_session, session_options, wrap
from onnx_refit.engine.onnxruntime.packing import Packing
from onnx_refit.tensors import Array

_OPSETS = (("", 17), (NCHWC_DOMAIN, 1))


class Mould:
    """A packing and the memory that it goes to, bound once and written again and again. Made by ``Packer.mould``.

    Different moulds may be written in different threads.
    """

    __slots__ = ("_begin", "_end", "_factors", "_outlet", "_owners", "_packing", "_shape")

    def __init__(self, packing: Packing, outlet: Outlet, owners: tuple[Array, ...]) -> None:
        self._packing = packing
        self._outlet = outlet
        self._owners = owners
        k, n = packing.rows, packing.columns
        self._begin, self._end = packing.offset, packing.offset + k * n
        self._shape = (1, 1, k, n) if packing.channels_last else (1, n, 1, k)
        scale = packing.scale
        if scale is not None:
            count = n if scale.stride else 1
            last = scale.offset + (count - 1) * scale.stride + 1
            self._factors = slice(scale.offset, last, scale.stride or 1), _column(packing, count)

    def write(self, fetch: Callable[[str], Array]) -> None:
        """Write it, from the flat float32 tensors that ``fetch`` gives."""
        packing = self._packing
        matrix = fetch(packing.source)[self._begin : self._end].reshape(self._shape)
        if packing.scale is None:
            self._outlet.run(("x", matrix))
            return
        where, shape = self._factors
        factors = fetch(packing.scale.name)[where]
        self._outlet.run(("x", matrix), ("factors", np.ascontiguousarray(factors).reshape(shape)))


def _column(packing: Packing, count: int) -> tuple[int, int, int, int]:
    """The shape of so many factors that fits each to its column."""
    return (1, 1, 1, count) if packing.channels_last else (1, count, 1, 1)


class Packer:
    """Writes blocked tensors, about as fast as memory allows. Thread-safe; releases the interpreter's lock.

    Args:
        block: the host's block size.
    """

    def __init__(self, block: int) -> None:
        self._block = block
        self._sessions: dict[tuple[bool, bool, bool], ort.InferenceSession] = {}

    def mould(self, packing: Packing, target: Array) -> Mould:
        """Bind the memory of a packing.

        Args:
            packing: what it is.
            target: flat float32, C-contiguous, ``up(N) * K`` elements.
        """
        b, k, n, window = self._block, packing.rows, packing.columns, packing.window
        session = self._session(scaled=packing.scale is not None, windowed=window > 1, last=packing.channels_last)
        if window == 1:
            blocked = target.reshape(1, up(n, b), 1, k)
            return Mould(packing, Outlet(session, {}, {"y": wrap(blocked)}), (blocked,))
        # [N/b][I/b][b][window] rows of b columns each become [N/b][I/b][window][b] of them: the same operator, for
        # which each row is a pixel's channels.
        tiles = np.array([n * k // window // b // b, b, 1, b * window])
        blocked = target.reshape(-1, b * window, b, 1)
        return Mould(packing, Outlet(session, {"tiles": wrap(tiles)}, {"y": wrap(blocked)}), (blocked, tiles))

    def _session(self, *, scaled: bool, windowed: bool, last: bool) -> ort.InferenceSession:
        key = scaled, windowed, last
        session = self._sessions.get(key)
        if session is None:
            # One thread a session: callers pack different tensors in different threads.
            session = make_session(_model(scaled=scaled, windowed=windowed, last=last), session_options(1))
            self._sessions[key] = session
        return session


def _model(*, scaled: bool, windowed: bool, last: bool) -> onnx.ModelProto:
    """``[1,1,K,N]`` or ``[1,N,1,K]``, perhaps times factors, into blocked layout, perhaps tiled once more."""
    any_shape = [f"d{k}" for k in range(4)]
    nodes, inputs, value = [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, any_shape)], "x"
    if scaled:
        nodes.append(helper.make_node("Mul", [value, "factors"], ["scaled"]))
        inputs.append(helper.make_tensor_value_info("factors", TensorProto.FLOAT, [f"f{k}" for k in range(4)]))
        value = "scaled"
    rows = "rows" if windowed else "y"
    nodes.append(helper.make_node("ReorderInput", [value], [rows], domain=NCHWC_DOMAIN, channels_last=int(last)))
    if windowed:
        nodes.append(helper.make_node("Reshape", [rows, "tiles"], ["tiled"]))
        nodes.append(helper.make_node("ReorderInput", ["tiled"], ["y"], domain=NCHWC_DOMAIN, channels_last=1))
        inputs.append(helper.make_tensor_value_info("tiles", TensorProto.INT64, [4]))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [f"e{k}" for k in range(4)])
    opsets = [helper.make_opsetid(domain, version) for domain, version in _OPSETS]
    return helper.make_model(helper.make_graph(nodes, "pack", inputs, [output]), opset_imports=opsets, ir_version=9)


class Caster:
    """Casts float16 tensors to float32 with ONNX Runtime, about four times as fast as NumPy. Thread-safe.

    Args:
        threads: threads of its session.
    """

    def __init__(self, threads: int) -> None:
        graph = helper.make_graph(
            [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)],
            "cast",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n"])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        self._session = make_session(model, session_options(threads, spinning=False))

    def widen(self, flat: Array) -> Array:
        """A flat float16 tensor as float32."""
        result: Array = Binding(self._session, {}, ("y",)).run((("x", flat),))[0]
        return result
