"""What ONNX shape inference finds for the values of a draft or an activation graph, without moving weights."""

from __future__ import annotations

import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnx_refit.errors import ModelError
from onnx_refit.model.graph import all_graphs
from onnx_refit.plan.draft import Draft
from onnx_refit.tensors import TensorSpec, spec_of_value_info, value_info_of

_INLINE = 1 << 12  # constants up to this many bytes are shown to shape inference with their values


def draft_specs(draft: Draft) -> dict[str, TensorSpec]:
    """Value name -> spec of every value of a draft that inference finds a type for, over all graphs."""
    program = draft.program
    made = {output for node in draft.nodes() for output in node.output}
    read = dict.fromkeys(name for node in draft.nodes() for name in node.input if name in program and name not in made)
    view = shallow(draft.model, keep_initializers=False)
    for name in read:
        array = program.constants.get(name)
        if array is not None and array.nbytes <= _INLINE and array.dtype != object:
            view.graph.initializer.append(numpy_helper.from_array(array, name))
        else:
            view.graph.input.append(value_info_of(program.specs[name]))
    specs = dict(program.specs)
    for graph in all_graphs(infer(view).graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            spec = _spec(value)
            if spec is not None:
                specs.setdefault(spec.name, spec)
    return specs


def _spec(value: onnx.ValueInfoProto) -> TensorSpec | None:
    try:
        spec = spec_of_value_info(value)
    except ModelError:  # a sequence, a map, or no type at all
        return None
    return spec


def infer(model: ModelProto) -> ModelProto:
    """The model with all the shapes that inference finds; as it was where inference fails."""
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return model


def infer_light(model: ModelProto) -> ModelProto:
    """As ``infer``, with large constants shown by their shape only."""
    large = [tensor for tensor in model.graph.initializer if tensor.ByteSize() > _INLINE]
    if not large:
        return infer(model)
    view = shallow(model, keep_initializers=False)
    view.graph.initializer.extend(t for t in model.graph.initializer if t.ByteSize() <= _INLINE)
    view.graph.input.extend(_declare(tensor) for tensor in large)
    inferred = infer(view)
    del inferred.graph.input[len(model.graph.input) :]
    inferred.graph.initializer.extend(large)
    return inferred


def _declare(tensor: TensorProto) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))


def shallow(model: ModelProto, *, keep_initializers: bool = True) -> ModelProto:
    """A copy of a model, with or without the initializers of its main graph."""
    copy = ModelProto()
    copy.ir_version = model.ir_version
    copy.producer_name, copy.producer_version = model.producer_name, model.producer_version
    copy.opset_import.extend(model.opset_import)
    copy.functions.extend(model.functions)
    copy.metadata_props.extend(model.metadata_props)
    copy.graph.name = model.graph.name
    copy.graph.node.extend(model.graph.node)
    copy.graph.input.extend(model.graph.input)
    copy.graph.output.extend(model.graph.output)
    copy.graph.value_info.extend(model.graph.value_info)
    if keep_initializers:
        copy.graph.initializer.extend(model.graph.initializer)
    return copy
