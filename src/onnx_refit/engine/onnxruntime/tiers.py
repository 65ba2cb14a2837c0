"""The second tier: sessions with some weights baked in, for kernels that are only fast with prepacked weights.

A refit goes live at once with every weight as an input. For models with LSTM, GRU, transposed convolutions or
quantised operators a thread then builds, for each weight set that still lives, a session in which the weights are
initializers over the set's own buffers, prepacked by ONNX Runtime; the set switches to it by changing one reference.
"""

from __future__ import annotations

import tempfile
import threading
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import onnx
import onnxruntime as ort
from onnx import TensorProto

from onnx_refit.engine.onnxruntime.native import PROVIDERS, Value, public_value, session_options
from onnx_refit.model.graph import all_graphs
from onnx_refit.tensors import TensorSpec, onnx_dtype

# Operator -> the inputs that its kernel packs when they are initializers.
_PACKING: Mapping[str, tuple[int, ...]] = {
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "ConvTranspose": (1,),
    "QLinearConv": (3,),
    "QLinearMatMul": (3,),
    "QGemm": (3,),
    "MatMulInteger": (1,),
    "MatMulIntegerToFloat": (1,),
    "DynamicQuantizeMatMul": (1,),
    "DynamicQuantizeLSTM": (1, 2),
    "MatMulNBits": (1, 2, 3),
    "Attention": (1,),
    "QAttention": (1,),
}
_PLACEHOLDER = "placeholder.bin"
_IDLE = 1.0  # seconds between looks at what died without a successor
_PATIENCE = 0.05  # seconds that a new set has for its first answer


class Promotable(Protocol):
    """A weight set as this module sees it."""

    @property
    def answered(self) -> threading.Event:
        """Set once it has answered a request."""
        ...

    def values(self) -> Mapping[str, Value]:
        """Engine weight -> value."""
        ...

    def promote(self, session: ort.InferenceSession | None) -> None:
        """Switch to this session, or learn that there will be none."""
        ...


def gains_from_packing(model: onnx.ModelProto, weights: Iterable[str]) -> bool:
    """Whether a kernel of the graph is only fast with one of these weights prepacked."""
    known = set(weights)
    for graph in all_graphs(model.graph):
        for node in graph.node:
            indexes = (index for index in _PACKING.get(node.op_type, ()) if index < len(node.input))
            if any(node.input[index] in known for index in indexes):
                return True
    return False


class SecondTier:
    """Builds the prepacked sessions of weight sets, newest first, in one background thread.

    Attributes:
        baked: the weights of its graph; its sessions have them as initializers.
        dead: what ran dead weight sets; the thread takes it apart when it has nothing more urgent to do.

    Args:
        model: the second tier's graph, its weights being graph inputs.
        specs: every weight's spec.
        threads: intra-op threads of the sessions.
    """

    def __init__(self, model: onnx.ModelProto, specs: Mapping[str, TensorSpec], threads: int) -> None:
        read = frozenset(value.name for value in model.graph.input) & specs.keys()
        # All of them: those that no kernel packs are adopted as they are, and a request has no weights to bind.
        self.baked = read
        self._threads = threads
        self._folder = tempfile.TemporaryDirectory(prefix="onnx-refit-")
        self._path = _write(model, self.baked, specs, Path(self._folder.name))
        self._waiting: list[weakref.ref[Promotable]] = []
        self._changed = threading.Condition()
        self._asked = 0
        self.dead: list[object] = []
        self._closed = False
        self._building: ort.SessionOptions | None = None
        self._thread: threading.Thread | None = None

    def ask(self, weights: Promotable) -> None:
        """Build a session for a weight set as soon as possible; the set may die meanwhile."""
        with self._changed:
            if self._closed:
                weights.promote(None)
                return
            self._waiting.append(weakref.ref(weights))
            self._asked += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="onnx-refit-tier2", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting and not self._closed:
                    self._changed.wait(_IDLE)
                if self._closed:
                    return
                weights, asked = self._waiting.pop()() if self._waiting else None, self._asked
            if weights is not None:
                # Building takes the cores that the first answer needs.
                weights.answered.wait(_PATIENCE)
                with self._changed:
                    superseded = self._asked != asked and not self._closed  # a newer set came meanwhile
                    if superseded:
                        self._waiting.insert(0, weakref.ref(weights))
                if not superseded:
                    weights.promote(None if self._closed else self._build(weights))
                    self.dead.clear()  # however busy: each set built leaves a session behind
            del weights
            if not self._waiting:
                self.dead.clear()  # after what was asked for, and outside the lock: whoever asks must not wait for it

    def _build(self, weights: Promotable) -> ort.InferenceSession | None:
        try:
            options = session_options(self._threads)
            values = weights.values()
            for name in self.baked:
                options.add_initializer(name, public_value(values[name]))
            self._building = options
            return ort.InferenceSession(str(self._path), options, providers=PROVIDERS)
        except Exception:  # noqa: BLE001  the first tier serves on; onnxruntime raises a dozen unrelated classes
            return None
        finally:
            self._building = None

    def close(self) -> None:
        """Stop, abandoning what is being built, and wait for the thread."""
        with self._changed:
            self._closed = True
            abandoned = [reference() for reference in self._waiting]
            self._waiting.clear()
            self._changed.notify()
        building = self._building
        if building is not None:
            building.set_load_cancellation_flag(True)
        for weights in abandoned:
            if weights is not None:
                weights.promote(None)
        if self._thread is not None:
            self._thread.join()
        self.dead.clear()
        self._folder.cleanup()


def _write(model: onnx.ModelProto, baked: frozenset[str], specs: Mapping[str, TensorSpec], folder: Path) -> Path:
    """The graph with these weights as initializers whose data comes later; returns the file."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    kept = [value for value in graph.input if value.name not in baked]
    del graph.input[:]
    graph.input.extend(kept)
    for name in sorted(baked):
        spec = specs[name]
        tensor = graph.initializer.add(name=name, data_type=onnx_dtype(spec.dtype))
        tensor.dims.extend(spec.static_shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", _PLACEHOLDER), ("offset", "0"), ("length", str(spec.nbytes))):
            tensor.external_data.add(key=key, value=value)
    with (folder / _PLACEHOLDER).open("wb") as file:  # a sparse file: nobody reads it, but it must be there
        file.truncate(max(specs[name].nbytes for name in baked))
    path = folder / "model.onnx"
    path.write_bytes(changed.SerializeToString())
    return path
