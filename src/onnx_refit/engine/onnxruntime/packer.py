"""ONNX Runtime packs the weights for ONNX Runtime: its ReorderInput writes matrices in blocked layout."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from onnx_refit.engine.onnxruntime.blocked import up
from onnx_refit.engine.onnxruntime.native import NCHWC_DOMAIN, Binding, Outlet, make_session, session_options
from onnx_refit.engine.onnxruntime.packing import Packing
from onnx_refit.engine.protocol import Look
from onnx_refit.plan.trace.recipes import Walk, along
from onnx_refit.tensors import Array

_OPSETS = (("", 17), (NCHWC_DOMAIN, 1))


class Mould:
    """A packing and the memory that it goes to, bound once and written again and again. Made by ``Packer.mould``.

    Different moulds may be written in different threads.

    Attributes:
        begin: the first element that it reads of its flat source.
        end: one past the last.
    """

    __slots__ = (
        "_factors",
        "_outlets",
        "_packer",
        "_packing",
        "_shape",
        "_target",
        "_tiles",
        "begin",
        "end",
    )

    def __init__(self, packer: Packer, packing: Packing, target: Array, tiles: Array | None) -> None:
        self._packer = packer
        self._packing = packing
        self._target = target
        self._tiles = tiles
        self._outlets: list[Outlet | None] = [None, None]
        k, n = packing.rows, packing.columns
        self.begin, self.end = packing.offset, packing.offset + k * n
        self._shape = (1, 1, k, n) if packing.channels_last else (1, n, 1, k)
        scale = packing.scale
        if scale is not None:
            count = n if scale.stride else 1
            last = scale.offset + (count - 1) * scale.stride + 1
            self._factors = slice(scale.offset, last, scale.stride or 1), _column(packing, count)

    def write(self, fetch: Callable[[str], Array], look: Look | None = None) -> None:
        """Write it, and look at what it reads of its source.

        Args:
            fetch: gives the flat float32 tensors that it reads.
            look: what is to be done with the elements of the source.
        """
        begin, end, shape, packing = self.begin, self.end, self._shape, self._packing
        keep = None
        if look is not None:
            look.watch(begin, end)
            keep = look.keep
        outlet = self._outlet(kept=keep is not None)
        matrix = fetch(packing.source)[begin:end] if not packing.stride else self._gathered(fetch(packing.source))
        outlet.give("x", matrix.reshape(shape))
        if packing.scale is not None:
            where, column = self._factors
            outlet.give("factors", np.ascontiguousarray(fetch(packing.scale.name)[where]).reshape(column))
        if keep is not None:
            outlet.take("kept", keep[begin:end].reshape(shape))
        outlet.run()

    def _gathered(self, flat: Array) -> Array:
        """The matrix of which the source holds each column with other elements between."""
        packing = self._packing
        k, n = packing.rows, packing.columns
        matrix = self._packer.scratch(n * k)
        np.copyto(matrix.reshape(n, k), along(flat, (n, k), Walk(packing.offset, (packing.stride, 1))))
        return matrix

    def _outlet(self, *, kept: bool) -> Outlet:
        """The bound session, perhaps that which also keeps."""
        outlet = self._outlets[kept]
        if outlet is None:
            outlet = Outlet(self._packer.session(self._packing, kept=kept))
            outlet.take("y", self._target)
            if self._tiles is not None:
                outlet.give("tiles", self._tiles)
            self._outlets[kept] = outlet
        return outlet


def _column(packing: Packing, count: int) -> tuple[int, int, int, int]:
    """The shape of so many factors that fits each to its column."""
    return (1, 1, 1, count) if packing.channels_last else (1, count, 1, 1)


class Packer:
    """Writes blocked tensors, about as fast as memory allows. Thread-safe; releases the interpreter's lock.

    Args:
        block: the host's block size.
        arena: whether its sessions keep their memory, a few MB, for the next weights.
    """

    def __init__(self, block: int, *, arena: bool = True) -> None:
        self._arena = arena
        self._block = block
        self._sessions: dict[tuple[bool, ...], ort.InferenceSession] = {}
        self._local = threading.local()

    def scratch(self, size: int) -> Array:
        """Memory of this thread for so many float32 elements, kept: fresh pages cost more than the work on them."""
        held: Array | None = getattr(self._local, "scratch", None)
        if held is None or held.size < size:
            held = self._local.scratch = np.empty(size, np.float32)
        return held[:size]

    def mould(self, packing: Packing, target: Array) -> Mould:
        """Bind the memory of a packing.

        Args:
            packing: what it is.
            target: flat float32, C-contiguous, ``up(N) * K`` elements.
        """
        b, k, n, window = self._block, packing.rows, packing.columns, packing.window
        if window == 1:
            return Mould(self, packing, target.reshape(1, up(n, b), 1, k), None)
        # [N/b][I/b][b][window] rows of b columns each become [N/b][I/b][window][b] of them: the same operator, for
        # which each row is a pixel's channels.
        tiles = np.array([n * k // window // b // b, b, 1, b * window])
        return Mould(self, packing, target.reshape(-1, b * window, b, 1), tiles)

    def session(self, packing: Packing, *, kept: bool) -> ort.InferenceSession:
        """What writes such a packing; ``kept`` copies its source too."""
        scaled, windowed = packing.scale is not None, packing.window > 1
        key = scaled, windowed, packing.channels_last, kept
        session = self._sessions.get(key)
        if session is None:
            model = _model(scaled=scaled, windowed=windowed, last=packing.channels_last, kept=kept)
            # One thread a session: callers pack different tensors in different threads.
            session = self._sessions[key] = make_session(model, session_options(1, arena=self._arena))
        return session

    def rest(self) -> None:
        """Give back the memory that sessions keep for the next weights: by a run on next to nothing."""
        if not self._arena:
            return
        options = ort.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        b = self._block
        for (scaled, windowed, last, _), session in tuple(self._sessions.items()):
            inputs = {"x": np.zeros((1, 1, b, b) if last else (1, b, 1, b), np.float32)}
            if scaled:
                inputs["factors"] = np.zeros((1, 1, 1, b) if last else (1, b, 1, 1), np.float32)
            if windowed:
                inputs["tiles"] = np.array([1, b, 1, b])
            session.run(None, inputs, options)


def _model(*, scaled: bool, windowed: bool, last: bool, kept: bool) -> onnx.ModelProto:
    """``[1,1,K,N]`` or ``[1,N,1,K]``, perhaps times factors, into blocked layout, perhaps tiled once more."""
    nodes, value = [], "x"
    inputs, outputs = [_tensor("x")], [_tensor("y")]
    if kept:
        nodes.append(helper.make_node("Identity", ["x"], ["kept"]))
        outputs.append(_tensor("kept"))
    if scaled:
        nodes.append(helper.make_node("Mul", ["x", "factors"], ["scaled"]))
        inputs.append(_tensor("factors"))
        value = "scaled"
    rows = "rows" if windowed else "y"
    nodes.append(helper.make_node("ReorderInput", [value], [rows], domain=NCHWC_DOMAIN, channels_last=int(last)))
    if windowed:
        nodes.append(helper.make_node("Reshape", [rows, "tiles"], ["tiled"]))
        nodes.append(helper.make_node("ReorderInput", ["tiled"], ["y"], domain=NCHWC_DOMAIN, channels_last=1))
        inputs.append(helper.make_tensor_value_info("tiles", TensorProto.INT64, [4]))
    opsets = [helper.make_opsetid(domain, version) for domain, version in _OPSETS]
    return helper.make_model(helper.make_graph(nodes, "pack", inputs, outputs), opset_imports=opsets, ir_version=9)


def _tensor(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name}{k}" for k in range(4)])


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
