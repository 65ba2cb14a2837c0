"""The pass that takes vocabularies out of a graph: string inputs become integer inputs.

An engine computes with numbers; CategoryMapper and LabelEncoder look strings up. Where such a node sits directly on
a graph input (or, behind everything else, directly on a graph output), the host does the same before (after) the
inference, and the graph begins (ends) at the node's other side.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import GraphProto, ModelProto, NodeProto

from onnx_refit.errors import ModelError
from onnx_refit.model.edit import copy_model, drop_value_info, label
from onnx_refit.model.graph import Names, all_graphs, attribute, consumers, opset, producers
from onnx_refit.model.passes import Blocker, Change, PassResult, Rewrite
from onnx_refit.model.vocabulary import Scalar, VocabularyMap
from onnx_refit.tensors import Array, dtype_name, onnx_dtype

_WHY = "engines compute with numbers; looking values up is the host's work"
_KEY_LISTS = {"keys_strings": "string", "keys_int64s": "int64", "keys_floats": "float32"}
_VALUE_LISTS = {"values_strings": "string", "values_int64s": "int64", "values_floats": "float32"}
_DEFAULTS: dict[str, tuple[str, Scalar]] = {
    "string": ("default_string", "_Unused"),
    "int64": ("default_int64", -1),
    "float32": ("default_float", -0.0),
}
_OPSET = 17  # of the default domain, where a model imports only others
_UNSET: dict[str, Scalar] = {"string": "_Unused", "float32": -0.0, "float64": -0.0}


class ExtractVocabularies(Rewrite):
    """CategoryMapper and LabelEncoder on graph inputs (and graph outputs) leave the graph.

    Args:
        outputs: extract at the graph outputs too, which makes postprocessors; False leaves mappers there alone.
    """

    name = "extract-vocabularies"

    def __init__(self, *, outputs: bool = True) -> None:
        self._outputs = outputs

    def call(self, model: ModelProto) -> PassResult:
        """Run the pass on a copy of the model."""
        if not any(_is_mapper(node) for graph in all_graphs(model.graph) for node in graph.node):
            return PassResult(model)
        work = _Extraction(copy_model(model))
        work.inputs()
        if self._outputs:
            work.outputs()
        work.rest()
        model = work.model if work.changes else model
        return PassResult(
            model, tuple(work.changes), tuple(work.blockers), tuple(work.before), tuple(reversed(work.after))
        )


class _Extraction:
    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.graph = model.graph
        self.key_dtypes: dict[str, str] = {}
        self.changes: list[Change] = []
        self.blockers: list[Blocker] = []
        self.before: list[VocabularyMap] = []
        self.after: list[VocabularyMap] = []
        self._refused: set[str] = set()

    def _map(self, node: NodeProto, source: str, target: str, key_dtype: str | None) -> VocabularyMap | None:
        """What a mapper node knows; None, and a blocker, where that cannot be said."""
        try:
            return vocabulary_of(node, source, target, opset(self.model, "ai.onnx.ml") or 1, key_dtype)
        except ModelError as error:
            self._refuse(node, error.message)
            return None

    def _refuse(self, node: NodeProto, reason: str) -> None:
        self._refused.add(node.output[0])
        self.blockers.append(Blocker(label(node), node.op_type, reason))

    def inputs(self) -> None:
        """Extract at the graph inputs; again and again, as one mapper may read another's output."""
        weights = {tensor.name for tensor in self.graph.initializer}
        progress = True
        while progress:
            progress = False
            free = {value.name: value for value in self.graph.input if value.name not in weights}
            for node in list(self.graph.node):
                if _is_mapper(node) and node.input[0] in free and node.output[0] not in self._refused:
                    progress |= self._take_input(node, free[node.input[0]])

    def _take_input(self, node: NodeProto, source: onnx.ValueInfoProto) -> bool:
        target = node.output[0]
        is_output = target in {value.name for value in self.graph.output}
        name = Names.of(self.graph).fresh(f"{target}_mapped") if is_output else target
        declared = source.type.tensor_type
        table = self._map(node, source.name, name, _name_of(declared.elem_type))
        if table is None:
            return False
        self.graph.node.remove(node)
        info = onnx.ValueInfoProto()
        info.CopyFrom(source)
        info.name = name
        info.type.tensor_type.elem_type = onnx_dtype(table.value_dtype)
        drop_value_info(self.graph, (name,))
        if is_output:  # a graph input cannot be a graph output: a node stays between the two
            self.graph.node.insert(0, onnx.helper.make_node("Identity", [name], [target], name=f"{label(node)}_result"))
            if opset(self.model) is None:  # a model of ai.onnx.ml alone
                self.model.opset_import.add(domain="", version=_OPSET)
        place = [value.name for value in self.graph.input].index(source.name)
        place += sum(one.input == source.name for one in self.before)  # behind the outputs of its other maps
        kept = source.name in consumers(self.graph) or source.name in {value.name for value in self.graph.output}
        if kept:
            self.graph.input.insert(place + 1, info)
        else:
            self.graph.input.remove(source)
            self.graph.input.insert(place, info)
        self.before.append(table)
        what = f"taken out of the graph with its {len(table)} entries: {source.name} ({table.key_dtype}) becomes the "
        what += f"input {name} ({table.value_dtype})" + (f"; {source.name} stays for its other readers" if kept else "")
        self.changes.append(Change(label(node), node.op_type, what, _WHY))
        return True

    def outputs(self) -> None:
        """Extract at the graph outputs, from the last mapper upwards."""
        progress = True
        while progress:
            progress = False
            made = producers(self.graph)
            for value in list(self.graph.output):
                node = made.get(value.name)
                if node is not None and _is_mapper(node) and node.output[0] not in self._refused:
                    progress |= self._take_output(node, value)

    def _take_output(self, node: NodeProto, value: onnx.ValueInfoProto) -> bool:
        source = node.input[0]
        if value.name in consumers(self.graph):
            self._refuse(node, "its output is a graph output and is also read inside of the graph")
            return False
        if source not in producers(self.graph):
            self._refuse(node, f"its input {source} comes from no node of the main graph")
            return False
        table = self._map(node, source, value.name, self._key_dtype(source))
        if table is None:
            return False
        self.graph.node.remove(node)
        place = list(self.graph.output).index(value)
        info = onnx.ValueInfoProto()
        info.CopyFrom(value)
        info.name = source
        info.type.tensor_type.elem_type = onnx_dtype(table.key_dtype)
        shared = source in {other.name for other in self.graph.output}
        self.graph.output.remove(value)
        if not shared:
            self.graph.output.insert(place, info)
            drop_value_info(self.graph, (source,))
        self.after.append(table)
        what = f"taken out of the graph with its {len(table)} entries: the output {value.name} ({table.value_dtype}) "
        what += f"is looked up from {source} ({table.key_dtype}) after the inference"
        self.changes.append(Change(label(node), node.op_type, what, _WHY))
        return True

    def _key_dtype(self, name: str) -> str | None:
        if not self.key_dtypes:
            inferred = onnx.shape_inference.infer_shapes(self.model).graph
            for value in (*inferred.value_info, *inferred.output, *inferred.input):
                known = _name_of(value.type.tensor_type.elem_type)
                if known is not None:
                    self.key_dtypes[value.name] = known
        return self.key_dtypes.get(name)

    def rest(self) -> None:
        """Say why the remaining mappers stay."""
        weights = {tensor.name for tensor in self.graph.initializer}
        for graph in all_graphs(self.graph):
            for node in graph.node:
                if _is_mapper(node) and node.output[0] not in self._refused:
                    self._refuse(node, _why_it_stays(graph, node, self.graph, weights))


def _why_it_stays(graph: GraphProto, node: NodeProto, main: GraphProto, weights: set[str]) -> str:
    source = node.input[0]
    if graph is not main:
        return "it is inside of a sub-graph, which the host cannot run a part of"
    if source in weights:
        return f"its input {source} is an initializer"
    maker = producers(graph).get(source)
    return (
        f"its input {source} is no graph input but the output of {label(maker)} ({maker.op_type})"
        if maker
        else (f"its input {source} is not known")
    )


def _is_mapper(node: NodeProto) -> bool:
    return node.domain == "ai.onnx.ml" and node.op_type in ("CategoryMapper", "LabelEncoder")


def _name_of(code: int) -> str | None:
    if code == onnx.TensorProto.UNDEFINED:
        return None
    return dtype_name(onnx.helper.tensor_dtype_to_np_dtype(code)) if code != onnx.TensorProto.STRING else "string"


def vocabulary_of(
    node: NodeProto, source: str, target: str, version: int, key_dtype: str | None = None
) -> VocabularyMap:
    """What a CategoryMapper or LabelEncoder node (``ai.onnx.ml`` 1, 2 or 4) knows.

    Args:
        node: the node.
        source: the name of the map's input.
        target: the name of the map's output.
        version: the model's opset of ``ai.onnx.ml``.
        key_dtype: dtype of the node's input; it decides the direction of a CategoryMapper and of a LabelEncoder-1.

    Raises:
        ModelError: attributes are missing, contradict each other or map one key to two values.
    """
    if node.op_type == "CategoryMapper" or version < 2:
        keys, values, default, dtypes = _two_way(node, key_dtype)
    else:
        keys, values, default, dtypes = _one_way(node)
    if key_dtype is not None and key_dtype != dtypes[0]:
        raise ModelError(f"its keys are {dtypes[0]} but its input is {key_dtype}", where=label(node))
    keys, values = _unique(keys, values, node)
    return VocabularyMap(source, target, label(node), node.op_type, keys, values, default, *dtypes)


_Parts = tuple[Sequence[Scalar], Sequence[Scalar], Scalar, tuple[str, str]]


def _two_way(node: NodeProto, key_dtype: str | None) -> _Parts:
    """The operators that know strings and integers and map whichever comes to the other."""
    if node.op_type == "CategoryMapper":
        strings, integers = _list(node, "cats_strings"), _list(node, "cats_int64s")
    else:
        strings = _list(node, "classes_strings")
        integers = None if strings is None else list(range(len(strings)))
    if strings is None or integers is None:
        raise ModelError("it holds no categories", where=label(node))
    if len(strings) != len(integers):
        raise ModelError(f"it holds {len(strings)} strings but {len(integers)} integers", where=label(node))
    if key_dtype == "string":
        return strings, integers, _scalar(node, "default_int64", -1), ("string", "int64")
    if key_dtype == "int64":
        return integers, strings, _scalar(node, "default_string", "_Unused"), ("int64", "string")
    raise ModelError(f"its input is {key_dtype or 'of an unknown dtype'}, so its direction is not known")


def _one_way(node: NodeProto) -> _Parts:
    keys, key_dtype = _column(node, _KEY_LISTS, "keys_tensor")
    values, value_dtype = _column(node, _VALUE_LISTS, "values_tensor")
    if len(keys) != len(values):
        raise ModelError(f"it holds {len(keys)} keys but {len(values)} values", where=label(node))
    return keys, values, _default(node, value_dtype), (key_dtype, value_dtype)


def _default(node: NodeProto, dtype: str) -> Scalar:
    given = attribute(node, "default_tensor")
    if isinstance(given, onnx.TensorProto):
        listed, default_dtype = _tensor(given, label(node))
        if len(listed) != 1 or default_dtype != dtype:
            raise ModelError(f"its default is not one {dtype}", where=label(node))
        return listed[0]
    if dtype in _DEFAULTS:
        return _scalar(node, *_DEFAULTS[dtype])
    return _UNSET.get(dtype, -1)


def _column(node: NodeProto, lists: dict[str, str], tensor: str) -> tuple[Sequence[Scalar], str]:
    found = [(name, _list(node, name)) for name in lists]
    present = [(name, values) for name, values in found if values is not None]
    given = attribute(node, tensor)
    if len(present) + isinstance(given, onnx.TensorProto) != 1:
        raise ModelError(f"it must have exactly one of {', '.join((*lists, tensor))}", where=label(node))
    if isinstance(given, onnx.TensorProto):
        return _tensor(given, label(node))
    name, values = present[0]
    return values, lists[name]


def _tensor(tensor: onnx.TensorProto, node: str) -> tuple[list[Scalar], str]:
    array: Array = onnx.numpy_helper.to_array(tensor)
    elements = [one.decode() if isinstance(one, bytes) else one for one in array.ravel().tolist()]
    if array.dtype.kind not in "OUSif":
        raise ModelError(f"its tensors are {array.dtype}, which no map holds", where=node)
    return elements, dtype_name(array.dtype) if array.dtype.kind in "if" else "string"


def _list(node: NodeProto, name: str) -> list[Scalar] | None:
    values = attribute(node, name)
    if values is None:
        return None
    return [value.decode() if isinstance(value, bytes) else value for value in values]  # type: ignore[attr-defined]


def _scalar(node: NodeProto, name: str, default: Scalar) -> Scalar:
    value = attribute(node, name, default)
    return value.decode() if isinstance(value, bytes) else value  # type: ignore[return-value]


def _unique(
    keys: Sequence[Scalar], values: Sequence[Scalar], node: NodeProto
) -> tuple[tuple[Scalar, ...], tuple[Scalar, ...]]:
    """Keys listed twice with one value are harmless; with two values, runtimes differ in which one counts."""
    seen: dict[Scalar, Scalar] = {}
    for key, value in zip(keys, values, strict=True):
        canonical = "nan" if isinstance(key, float) and key != key else key
        if seen.setdefault(canonical, value) != value:
            raise ModelError(f"the key {key!r} is listed with two values, and runtimes differ in which one counts")
    originals = {("nan" if isinstance(key, float) and key != key else key): key for key in keys}
    return tuple(originals[key] for key in seen), tuple(seen.values())
