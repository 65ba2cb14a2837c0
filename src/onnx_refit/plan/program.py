"""Build the refit program: weight-only nodes from source weights to engine weights, every shape static and known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, TypeProto, helper, numpy_helper

from onnx_refit.errors import ModelError
from onnx_refit.model.graph import Names
from onnx_refit.plan.compiled import RefitProgram
from onnx_refit.plan.evaluate import run_model
from onnx_refit.tensors import Array, TensorSpec, onnx_dtype, onnx_dtype_name, spec_of, value_info_of

_SMALL = 4096  # constants up to this many elements are shown to shape inference
_ELEMENTWISE = {"Add": 2, "Sub": 2, "Mul": 2, "Div": 2, "Sqrt": 1, "Neg": 1, "Reciprocal": 1}
"""Operator of the default domain (7 to the latest) -> inputs, all of the output's dtype, whose shapes are broadcast."""
_FLOATS = frozenset({"float16", "float32", "float64"})


class NotStaticError(ModelError):
    """A node cannot join the program: its output's dtype or shape does not follow from its inputs' shapes alone."""


class ProgramBuilder:
    """The refit program while it grows.

    Values are sources, constants, or outputs of pushed nodes; a value that depends on no source is a constant
    expression. Nodes are kept in the order pushed, which is topological.
    """

    def __init__(self, opsets: Sequence[onnx.OperatorSetIdProto], ir_version: int, names: Names) -> None:
        self.opsets = list(opsets)
        self.ir_version = ir_version
        self.constants: dict[str, Array] = {}
        self.specs: dict[str, TensorSpec] = {}
        self.depends: dict[str, frozenset[str]] = {}
        self.nodes: list[NodeProto] = []
        self._names = names
        self._known: dict[bytes, list[str]] = {}
        self._types: dict[str, TypeProto] = {}
        self._data: dict[str, TensorProto] = {}
        self._versions = {entry.domain: entry.version for entry in opsets}

    def add_source(self, spec: TensorSpec) -> None:
        """Declare a source weight; its shape must be static."""
        self._add(spec, frozenset({spec.name}))

    def add_constant(self, array: Array, name: str) -> str:
        """Declare a constant under this name."""
        self.constants[name] = array
        self._add(spec_of(name, array), frozenset())
        return name

    def constant(self, array: Array, wish: str) -> str:
        """A new constant under a fresh name."""
        return self.add_constant(array, self._names.fresh(wish))

    def _add(self, spec: TensorSpec, depends: frozenset[str]) -> None:
        self.specs[spec.name] = spec
        self.depends[spec.name] = depends

    def _type(self, name: str) -> TypeProto:
        if name not in self._types:
            spec = self.specs[name]
            self._types[name] = helper.make_tensor_type_proto(onnx_dtype(spec.dtype), spec.static_shape)
        return self._types[name]

    def __contains__(self, name: object) -> bool:
        """Whether the name is a source, a constant or computed from them."""
        return name in self.specs

    def is_weight(self, name: str) -> bool:
        """Whether the value depends on at least one source weight."""
        return bool(self.depends.get(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """The static shape of a value of the program."""
        return self.specs[name].static_shape

    def dtype(self, name: str) -> str:
        """The dtype of a value of the program."""
        return self.specs[name].dtype

    def push(self, node: NodeProto) -> dict[str, str]:
        """Append a node whose inputs are all in the program, and whose operator gives the same for the same inputs.

        Returns:
            Output of the node -> the value to read in its place: itself; or the input, where the node changes nothing;
            or the output of an equal node that reads weights, where there is one already. A node that is not needed
            is not appended. Constant expressions are not merged: they live on in the graphs they came from.

        Raises:
            NotStaticError: the operator has no schema, or an output's shape depends on values.
        """
        specs = self.infer(node)
        outputs = [name for name in node.output if name]
        if self._changes_nothing(node, specs[0]):
            return {outputs[0]: node.input[0]}
        depends = frozenset().union(*(self.depends[name] for name in node.input if name))
        key = _signature(node)
        known = self._known.get(key)
        if known is not None and depends:
            return {name: known[index] for index, name in enumerate(node.output) if name}
        for spec in specs:
            self._add(spec, depends)
        self.nodes.append(node)
        self._known[key] = list(node.output)
        return {name: name for name in outputs}

    def _changes_nothing(self, node: NodeProto, output: TensorSpec) -> bool:
        if node.domain:
            return False
        if node.op_type == "Transpose":
            order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
            return order == sorted(order) if order else len(output.static_shape) < 2
        if node.op_type not in {"Identity", "Cast", "Reshape", "Flatten", "Expand"}:
            return False
        given = self.specs[node.input[0]]
        return (given.dtype, given.shape) == (output.dtype, output.shape)

    def infer(self, node: NodeProto) -> list[TensorSpec]:
        """The specs of a node's outputs, its inputs being values of the program; raises as ``push``."""
        plain = self._infer_elementwise(node)
        if plain is not None:
            return [plain]
        try:
            schema = onnx.defs.get_schema(node.op_type, self._versions.get(node.domain, 1), node.domain)
            types = onnx.shape_inference.infer_node_outputs(
                schema,
                node,
                {name: self._type(name) for name in node.input if name},
                {name: data for name in node.input if (data := self._small(name)) is not None},
                opset_imports=self.opsets,
                ir_version=self.ir_version,
            )
        except (
            onnx.defs.SchemaError,
            onnx.shape_inference.InferenceError,
            onnx.checker.ValidationError,
        ) as error:
            raise NotStaticError(str(error).strip().splitlines()[0], where=node.name) from error
        specs = []
        for output in (name for name in node.output if name):
            inferred = types.get(output)
            tensor = inferred.tensor_type if inferred is not None else None
            if tensor is None or not tensor.HasField("shape"):
                raise NotStaticError("its output shape cannot be inferred", where=node.name)
            if not all(d.HasField("dim_value") for d in tensor.shape.dim):
                raise NotStaticError("its output shape depends on values", where=node.name)
            shape = tuple(int(d.dim_value) for d in tensor.shape.dim)
            specs.append(TensorSpec(output, onnx_dtype_name(tensor.elem_type), shape))
        return specs

    def _infer_elementwise(self, node: NodeProto) -> TensorSpec | None:
        """The spec of a broadcasting node's output; None for other nodes. Folds make hundreds of these."""
        if node.op_type not in _ELEMENTWISE or node.domain or len(node.attribute) or len(node.output) != 1:
            return None
        given = [self.specs[name] for name in node.input]
        kinds = {spec.dtype for spec in given}
        if len(given) != _ELEMENTWISE[node.op_type] or len(kinds) > 1 or not kinds <= _FLOATS:
            return None
        try:
            shape = np.broadcast_shapes(*(spec.static_shape for spec in given))
        except ValueError:
            return None
        return TensorSpec(node.output[0], given[0].dtype, shape)

    def _small(self, name: str) -> TensorProto | None:
        """The value of a small constant, or of a small constant expression of integers, for shape inference."""
        if name not in self._data and name in self.specs and not self.is_weight(name):
            array = self.constants.get(name)
            spec = self.specs[name]
            if array is None and spec.size <= _SMALL and spec.dtype in {"int32", "int64"}:
                array = run_model(self._model({name: name}), {})[name]
            if array is not None and array.size <= _SMALL and array.dtype != object:
                self._data[name] = numpy_helper.from_array(array, name)
        return self._data.get(name)

    def add(self, op_type: str, inputs: Sequence[str], wish: str, **attributes: Any) -> str:
        """Append a new node of the default domain and give the name of its output.

        Args:
            op_type: the operator, in the version the model imports.
            inputs: values of the program.
            wish: the name wished for the output.
            attributes: its attributes.
        """
        output = self._names.fresh(wish)
        node = helper.make_node(op_type, list(inputs), [output], name=f"{output}/{op_type}", **attributes)
        return self.push(node)[output]

    def prune(self, wanted: Iterable[str]) -> list[NodeProto]:
        """The nodes that the wanted values need, in order."""
        live = set(wanted)
        kept = []
        for node in reversed(self.nodes):
            if any(output in live for output in node.output):
                live.update(name for name in node.input if name)
                kept.append(node)
        return kept[::-1]

    def finish(self, engine: Mapping[str, str]) -> RefitProgram:
        """The program that computes the engine weights.

        Args:
            engine: engine weight name -> the value of this program that it is.
        """
        passthrough = {name: value for name, value in engine.items() if self.depends[value] == {value}}
        computed = {name: value for name, value in engine.items() if name not in passthrough}
        dependencies = {name: self.depends[value] for name, value in engine.items()}
        return RefitProgram(self._model(computed) if computed else None, passthrough, dependencies)

    def _model(self, computed: Mapping[str, str]) -> onnx.ModelProto:
        nodes = self.prune(computed.values())
        renamed = {value: name for name, value in computed.items()}
        copies = []
        for node in nodes:
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = [renamed.get(name, name) for name in node.input]
            copy.output[:] = [renamed.get(name, name) for name in node.output]
            copies.append(copy)
        read = dict.fromkeys(name for node in nodes for name in node.input if name)
        inputs = [value_info_of(self.specs[name]) for name in read if self.depends[name] == {name}]
        constants = [
            numpy_helper.from_array(np.asarray(self.constants[n], order="C"), n) for n in read if n in self.constants
        ]
        outputs = [
            value_info_of(TensorSpec(name, self.specs[value].dtype, self.specs[value].shape))
            for name, value in computed.items()
        ]
        # With the specs of all values in it, nobody has to infer them again.
        inner = dict.fromkeys(output for node in nodes for output in node.output if output and output not in renamed)
        types = [value_info_of(self.specs[name]) for name in inner]
        graph = helper.make_graph(copies, "refit", inputs, outputs, constants, value_info=types)
        return helper.make_model(graph, opset_imports=self.opsets, ir_version=self.ir_version)


def _signature(node: NodeProto) -> bytes:
    """What a node computes from what, whatever it and its outputs are called."""
    bare = NodeProto(op_type=node.op_type, domain=node.domain, input=node.input)
    bare.attribute.extend(sorted(node.attribute, key=lambda attribute: attribute.name))
    bare.output.extend("x" if name else "" for name in node.output)
    return bytes(bare.SerializeToString(deterministic=True))
