"""The form in which ONNX Runtime's kernels pack weights, learnt from what it writes and proved by what it answers.

Recurrences and plain matrix products are fast only with prepacked weights, which a session makes when it is created.
But ONNX Runtime can also read packed weights from a file (``session.save_external_prepacked_constant_initializers``),
and maps them into memory. So a session is created once over such a file (``hosts``), and a refit writes the new packed
weights into the mapping, while nobody runs the session: no packing, no second session, no second copy.

How a packed weight is put together from the plain one is learnt here: a weight in which each element is a number of its
own is packed, and the numbers read back. Then sessions whose packed weights were written that way must answer random
inputs to the bit like sessions that packed the same weights themselves. Where they do not, nothing is packed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper

from onnx_refit.engine.onnxruntime.boxes import PADDING, Numbers, boxes
from onnx_refit.engine.onnxruntime.native import PROVIDERS, session_options
from onnx_refit.model.graph import all_graphs, attribute
from onnx_refit.plan.trace.recipes import Operand, Piece, Recipe, evaluate, fill, leading, mapped
from onnx_refit.plan.trace.recognise import Numbering
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype, onnx_dtype

_CODE = 0x20000001
"""Bits of the float32 that stands for number 0; all that follow, to 1.6e9, are positive normal numbers."""
_MOST = 0x7F7FFFFF - _CODE
_INPUTS: Mapping[str, tuple[int, ...]] = {"LSTM": (1, 2), "GRU": (1, 2), "MatMul": (1,), "Gemm": (1,)}
"""Operator -> the inputs that its kernel reads only packed, if they are constant."""
_STATIC: Mapping[str, tuple[int, ...]] = {"LSTM": (3,), "GRU": (3,), "Gemm": (2,), "Add": (0, 1), "Mul": (0, 1)}
"""Operator -> inputs that its kernel reads anew at each run even if they are constant."""
_SMALL = 1 << 16  # bytes; not worth sharing between versions


@dataclass(frozen=True, slots=True)
class Block:
    """One packed tensor of a kernel.

    Attributes:
        weight: the engine weight that is packed.
        key: ONNX Runtime's name of the packing of the coded weight: of all blocks of one kernel.
        recipe: the packed tensor (flat) over the engine weight.
    """

    weight: str
    key: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """The packed tensor's name."""
        return self.recipe.spec.name


@dataclass(frozen=True)
class Packed:
    """What a graph's kernels pack.

    Attributes:
        specs: weights that are read only packed, with their specs: in the order of their numbers.
        blocks: their packed tensors, those of a kernel in its order.
        adopted: small weights that a session may hold as plain initializers that change.
    """

    specs: tuple[TensorSpec, ...]
    blocks: tuple[Block, ...]
    adopted: tuple[TensorSpec, ...]

    @property
    def weights(self) -> frozenset[str]:
        """The weights that are no inputs of a session any more."""
        return frozenset(spec.name for spec in (*self.specs, *self.adopted))

    def codes(self) -> Iterator[tuple[TensorSpec, Array]]:
        """Each weight with a number for each element, as float32."""
        return coded(self.specs)

    def unpacked(self, spec: TensorSpec, packed: Mapping[str, Array]) -> Array:
        """A weight read back from its packed tensors (flat)."""
        out = np.zeros(spec.size, np.float32)
        for block in self.blocks:
            if block.weight == spec.name:
                for piece in block.recipe.pieces:
                    back = Piece(piece.dims, piece.operands[0].walk, (Operand(block.name, piece.target),))
                    fill(Recipe(spec, (back,)), packed.__getitem__, out)
        return out.reshape(spec.static_shape)


def learn(model: onnx.ModelProto, weights: Mapping[str, TensorSpec]) -> Packed | None:
    """What the kernels of a graph pack; None if they pack nothing, or if it cannot be told how.

    Args:
        model: the graph; its weights are graph inputs.
        weights: these.
    """
    specs = tuple(_only_packed(model, weights))
    if not specs or sum(spec.size for spec in specs) > _MOST:
        return None
    blocks = _blocks(probe(model, specs), specs)
    if blocks is None:
        return None
    packs = {block.weight for block in blocks}
    if len(packs) < len(specs):
        # Numbers go with the order of the weights: learn again without those that no kernel packs.
        return learn(model, {name: spec for name, spec in weights.items() if name in packs or spec not in specs})
    return Packed(specs, blocks, tuple(_adoptable(model, weights, packs)))


def coded(specs: Iterable[TensorSpec]) -> Iterator[tuple[TensorSpec, Array]]:
    """Weights with a number for each element, as float32."""
    start = _CODE
    for spec in specs:
        numbers = np.arange(start, start + spec.size, dtype=np.uint32)
        yield spec, numbers.view(np.float32).reshape(spec.static_shape)
        start += spec.size


def _uses(model: onnx.ModelProto) -> dict[str, list[tuple[NodeProto, int]]]:
    """Weight -> who reads it; what sub-graphs read or return is read by nobody known."""
    uses: dict[str, list[tuple[NodeProto, int]]] = {}
    for number, graph in enumerate(all_graphs(model.graph)):
        for node in graph.node:
            for index, name in enumerate(node.input):
                uses.setdefault(name, []).append((node if number == 0 else NodeProto(), index))
        for value in graph.output:
            uses.setdefault(value.name, []).append((NodeProto(), 0))
    return uses


def _only_packed(model: onnx.ModelProto, weights: Mapping[str, TensorSpec]) -> Iterable[TensorSpec]:
    """The weights that are read only where kernels pack, each by one kind of kernel."""
    uses = _uses(model)
    for name, spec in sorted(weights.items()):
        readers = uses.get(name, [])
        kinds = {(node.op_type, node.domain in {"", "ai.onnx"}, index) for node, index in readers}
        if spec.dtype == "float32" and spec.size and len(kinds) == 1:
            ((op_type, standard, index),) = kinds
            if standard and index in _INPUTS.get(op_type, ()):
                yield spec


def _adoptable(model: onnx.ModelProto, weights: Mapping[str, TensorSpec], packs: set[str]) -> Iterable[TensorSpec]:
    """Small weights that their kernels read anew each time."""
    uses = _uses(model)
    for name, spec in sorted(weights.items()):
        readers = uses.get(name, [])
        fit = all(node.domain in {"", "ai.onnx"} and i in _STATIC.get(node.op_type, ()) for node, i in readers)
        if readers and fit and name not in packs and spec.dtype == "float32" and 0 < spec.nbytes <= _SMALL:
            yield spec


def probe(model: onnx.ModelProto, specs: Sequence[TensorSpec]) -> onnx.ModelProto:
    """The packing nodes alone, each with inputs of its own; its weights are graph inputs."""
    shapes = {spec.name: spec.static_shape for spec in specs}
    nodes: list[NodeProto] = []
    inputs: list[onnx.ValueInfoProto] = []
    outputs: list[onnx.ValueInfoProto] = []
    for node in model.graph.node:
        indexes = [i for i in _INPUTS.get(node.op_type, ()) if i < len(node.input) and node.input[i] in shapes]
        if not indexes or node.domain not in {"", "ai.onnx"}:
            continue
        number = len(nodes)
        copy = NodeProto()
        copy.CopyFrom(node)
        del copy.input[:], copy.output[:]
        copy.name = f"probe{number}"
        names, made = _arguments(node, shapes, number)
        copy.input.extend(names)
        copy.output.append(f"y{number}")
        nodes.append(copy)
        inputs += made
        outputs.append(helper.make_tensor_value_info(f"y{number}", TensorProto.FLOAT, None))
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(nodes, "probe", inputs, outputs)
    return helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)


def _arguments(
    node: NodeProto, shapes: Mapping[str, tuple[int, ...]], number: int
) -> tuple[list[str], list[onnx.ValueInfoProto]]:
    """Inputs for a probe's node: activations of few rows, and stand-ins for weights that are not packed."""

    def given(name: str, *shape: int) -> str:
        made.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))
        return name

    made: list[onnx.ValueInfoProto] = []
    if node.op_type in {"MatMul", "Gemm"}:
        shape = shapes[node.input[1]]
        rows = shape[-1] if node.op_type == "Gemm" and attribute(node, "transB", 0) else shape[-2]
        turned = node.op_type == "Gemm" and attribute(node, "transA", 0)
        activation = given(f"x{number}", rows, 3) if turned else given(f"x{number}", 3, rows)
        bias = [given(f"b{number}", 1)] if node.op_type == "Gemm" else []  # optional only since opset 11
        return [activation, node.input[1], *bias], made
    size: Any = attribute(node, "hidden_size", 0)
    hidden = int(size)
    gates = 4 if node.op_type == "LSTM" else 3
    both = 2 if attribute(node, "direction", b"forward") == b"bidirectional" else 1
    width = shapes[node.input[1]][-1] if node.input[1] in shapes else 4
    sequence = (1, 3, width) if attribute(node, "layout", 0) else (3, 1, width)
    names = [given(f"x{number}", *sequence)]
    for index, shape in ((1, (both, gates * hidden, width)), (2, (both, gates * hidden, hidden))):
        name = node.input[index]
        names.append(name if name in shapes else given(f"w{number}_{index}", *shape))
    return names, made


def initialised(model: onnx.ModelProto, arrays: Iterable[tuple[TensorSpec, Array]], path: Path) -> None:
    """Write the graph to a file with these of its inputs as initializers, their data in another one beside it."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    data = path.with_suffix(".bin")
    names = set()
    with data.open("wb") as file:
        for spec, array in arrays:
            names.add(spec.name)
            external(graph, spec, data.name, file.tell())
            file.write(array.data)
    kept = [value for value in graph.input if value.name not in names]
    del graph.input[:]
    graph.input.extend(kept)
    path.write_bytes(changed.SerializeToString())


def external(graph: onnx.GraphProto, spec: TensorSpec, file: str, offset: int) -> TensorProto:
    """Add an initializer whose data is in a file."""
    tensor: TensorProto = graph.initializer.add(name=spec.name, data_type=onnx_dtype(spec.dtype))
    tensor.dims.extend(spec.static_shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", str(offset)), ("length", str(spec.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _blocks(nodes: onnx.ModelProto, specs: Sequence[TensorSpec]) -> tuple[Block, ...] | None:
    """What a session of the probe packs, from the file that it writes."""
    with tempfile.TemporaryDirectory(prefix="onnx-refit-") as folder:
        source, target = Path(folder) / "coded.onnx", Path(folder) / "packed.onnx"
        initialised(nodes, coded(specs), source)
        options = session_options(1)
        options.optimized_model_filepath = str(target)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "0")
        options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        try:
            ort.InferenceSession(str(source), options, providers=PROVIDERS)
        except Exception:  # noqa: BLE001  onnxruntime raises a dozen unrelated classes; other tiers remain
            return None
        written = onnx.load_model(str(target), load_external_data=False)
        data = np.memmap(Path(folder) / "weights.bin", np.uint8, "r")
    numbering = Numbering.of(specs)
    found: list[Block] = []
    for tensor in sorted(written.graph.initializer, key=lambda tensor: tensor.name):
        for entry in sorted(tensor.external_data, key=lambda entry: entry.key):
            if not entry.key.startswith("prepacked"):
                continue
            key, *places = entry.value.split("|")
            for place in places:
                begin, nbytes, _ = (int(part) for part in place.split(";"))
                numbers = _decoded(data[begin : begin + nbytes], numbering.total)
                name = f"{tensor.name}@packed{len(found)}"
                spec = TensorSpec(name, "float32", (nbytes // 4,))
                recipe = None if numbers is None else boxes(spec, numbers, numbering)
                if recipe is None or recipe.sources != {tensor.name}:
                    return None
                found.append(Block(tensor.name, key, recipe))
    return tuple(found)


def _decoded(data: Array, total: int) -> Numbers | None:
    """The numbers of packed elements; None if there is anything else than numbers and zeros."""
    if data.size % 4:
        return None
    numbers: Numbers = data.view(np.int32) - np.int32(_CODE)  # as large as ``_MOST``; what is no code is negative
    numbers[numbers == -_CODE] = PADDING
    return numbers if numbers.min(initial=0) >= PADDING and numbers.max(initial=0) < total else None


def composed(block: Block, definition: Recipe, sizes: Mapping[str, int]) -> Recipe | None:
    """A packed tensor over what its weight is made of; None where that is more than a rearrangement.

    Args:
        block: the packed tensor.
        definition: the weight's own recipe.
        sizes: elements of each tensor that the definition reads.
    """
    if any(len(piece.operands) > 1 for piece in definition.pieces):
        return None
    same = leading(definition)
    if same is not None:
        return mapped(block.recipe, {block.weight: same})
    sources = sorted(definition.sources)
    numbering = Numbering.of([TensorSpec(name, "float32", (sizes[name],)) for name in sources])
    starts = dict(zip(sources, numbering.starts, strict=False))
    dtype = "int32" if numbering.total < np.iinfo(np.int32).max else "int64"
    plain = Recipe(TensorSpec("", dtype, definition.spec.shape), definition.pieces, definition.gathers)

    def numbers(name: str) -> Numbers:
        first = starts[name] + 1  # one more than the number, so that what nothing writes is zero
        return np.arange(first, first + sizes[name], dtype=numpy_dtype(dtype))

    weight = evaluate(plain, numbers).reshape(-1)
    into = Recipe(TensorSpec("", dtype, block.recipe.spec.shape), block.recipe.pieces)
    packed = evaluate(into, {block.weight: weight}.__getitem__)
    packed -= 1
    return boxes(block.recipe.spec, packed, numbering)
