"""The peers: what people use today, each as a function from inputs to outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
import onnx.numpy_helper
import onnxruntime as ort

from onnx_refit.tensors import Array

_LARGE = 1024  # bytes

Run = Callable[[Mapping[str, Array]], object]


def baked(model: onnx.ModelProto, threads: int) -> ort.InferenceSession:
    """An ordinary ONNX Runtime session: everything optimised, weights prepacked."""
    return ort.InferenceSession(model.SerializeToString(), _options(threads), providers=["CPUExecutionProvider"])


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    return options


class Rebuilder:
    """How users of ONNX Runtime get new weights into a session today: another session.

    Args:
        model: the model; what it needs that is the same each time is made here.
        threads: of the sessions.
        names: the weights that change.
    """

    def __init__(self, model: onnx.ModelProto, threads: int, names: frozenset[str]) -> None:
        self._threads = threads
        self._model = onnx.ModelProto()
        self._model.CopyFrom(model)
        graph = self._model.graph
        values = {tensor.name: tensor for tensor in graph.initializer}
        nodes = []
        for node in graph.node:
            # Some exporters keep weights in Constant nodes, or name equal ones by an Identity of one of them.
            held = node.attribute[0].t if node.op_type == "Constant" and node.attribute[0].name == "value" else None
            held = values.get(node.input[0]) if node.op_type == "Identity" else held
            if held is not None and node.output[0] in names:
                graph.initializer.append(held)
                graph.initializer[-1].name = node.output[0]
            else:
                nodes.append(node)
        missing = names - {tensor.name for tensor in graph.initializer}
        if missing:
            raise ValueError(f"weights that are not found in the model: {sorted(missing)[:3]}")
        del graph.node[:]
        graph.node.extend(nodes)
        self._tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.name in names}
        elsewhere = onnx.ModelProto()
        elsewhere.CopyFrom(self._model)
        self._large: list[str] = []
        for tensor in elsewhere.graph.initializer:
            if tensor.name in names and (nbytes := onnx.numpy_helper.to_array(tensor).nbytes) >= _LARGE:
                self._large.append(tensor.name)
                tensor.CopyFrom(
                    onnx.TensorProto(
                        name=tensor.name,
                        data_type=tensor.data_type,
                        dims=tensor.dims,
                        data_location=onnx.TensorProto.EXTERNAL,
                        external_data=[
                            onnx.StringStringEntryProto(key=key, value=value)
                            for key, value in (("location", "w"), ("offset", "0"), ("length", str(nbytes)))
                        ],
                    )
                )
        self._elsewhere = elsewhere
        self._small = {t.name: t for t in elsewhere.graph.initializer if t.name in names} if self._large else {}

    def serialised(self, weights: Mapping[str, Array]) -> ort.InferenceSession:
        """The usual way: the weights put into the model, the model serialised, a session made of it."""
        for name, tensor in self._tensors.items():
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights[name], name))
        return baked(self._model, self._threads)

    def handed_over(self, weights: Mapping[str, Array]) -> ort.InferenceSession:
        """The quickest way there is: large weights handed to the session as arrays, nothing of them serialised."""
        for name, tensor in self._small.items():
            if name not in self._large:
                tensor.CopyFrom(onnx.numpy_helper.from_array(weights[name], name))
        options = _options(self._threads)
        values = [ort.OrtValue.ortvalue_from_numpy(weights[name]) for name in self._large]
        options.add_external_initializers(list(self._large), values)
        return ort.InferenceSession(self._elsewhere.SerializeToString(), options, providers=["CPUExecutionProvider"])


def openvino(model: onnx.ModelProto, threads: int, precision: str) -> Run:
    """OpenVINO's CPU plugin with the given inference precision ("f32", "bf16")."""
    import openvino as ov

    core = ov.Core()
    configuration = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": 1}
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", configuration)
    request = compiled.create_infer_request()
    return lambda inputs: request.infer(dict(inputs), share_inputs=True, share_outputs=True)


def torch_eager(module: object, threads: int) -> Run:
    """PyTorch as it is."""
    import torch

    torch.set_num_threads(threads)

    def run(inputs: Mapping[str, Array]) -> object:
        with torch.inference_mode():
            return module(*(torch.from_numpy(array) for array in inputs.values()))  # type: ignore[operator]

    return run


def torch_compiled(module: object, threads: int) -> Run:
    """``torch.compile``, static shapes."""
    import torch

    torch.set_num_threads(threads)
    compiled = torch.compile(module, dynamic=False)

    def run(inputs: Mapping[str, Array]) -> object:
        with torch.inference_mode():
            return compiled(*(torch.from_numpy(array) for array in inputs.values()))

    return run
