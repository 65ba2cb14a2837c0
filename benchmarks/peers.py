"""The peers: what people use today, each as a function from inputs to outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
import onnxruntime as ort

from onnx_refit.tensors import Array

Run = Callable[[Mapping[str, Array]], object]


def baked(model: onnx.ModelProto, threads: int) -> ort.InferenceSession:
    """An ordinary ONNX Runtime session: everything optimised, weights prepacked."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


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
