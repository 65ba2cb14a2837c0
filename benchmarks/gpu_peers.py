"""What others offer on a GPU, in this process: PyTorch eager and in a CUDA graph, ONNX Runtime CUDA.

What compiles (TorchInductor, AOTInductor) runs in processes of its own: see ``gpu_isolated``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.tensors import Array


@dataclass
class Peer:
    """One peer on one input.

    Attributes:
        name: what the tables call it.
        call: one inference from inputs on the device to outputs on the device, waited for.
        seconds: of building it from weights on the host, which is what a change of weights costs.
        alike: whether it does what ours does: float32, inputs the caller's own, outputs the caller's to keep.
    """

    name: str
    call: Callable[[], object]
    seconds: float
    alike: bool = True


def synchronised(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The call, and the wait for the device."""
    if not device.startswith("cuda"):
        return call

    def both() -> object:
        result = call()
        torch.cuda.synchronize(device)
        return result

    return both


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Products and convolutions in TF32, or exact ones (PyTorch's default for convolutions is TF32)."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def recorded(module: nn.Module, x: list[Any], device: str, *, own: bool) -> Callable[[], object]:
    """A recorded graph of a module's call; the call itself on the CPU.

    Args:
        module: on the device.
        x: its inputs on the device.
        device: where.
        own: copy the inputs in and the output out at each call, as a server must; without it, the graph alone.
    """
    if not device.startswith("cuda"):
        return lambda: module(*x)
    static = [tensor.clone() for tensor in x]
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        for _ in range(3):
            module(*static)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = module(*static)
    if not own:
        replay: Callable[[], object] = graph.replay
        return replay

    def call() -> object:
        for target, source in zip(static, x, strict=True):
            target.copy_(source, non_blocking=True)
        graph.replay()
        return output.clone()

    return call


def torch_peers(module: nn.Module, inputs: Mapping[str, Array], device: str) -> dict[str, Callable[[], Peer]]:
    """Makers of the PyTorch peers, by the peer's name; each may fail, and the caller notes why."""
    module = module.eval().cpu()
    x = [torch.from_numpy(np.array(array)).to(device) for array in inputs.values()]

    def eager(name: str) -> Peer:
        there = copy.deepcopy(module).to(device)
        return Peer(name, synchronised(lambda: there(*x), device), 0.0)

    def graph(name: str, *, own: bool, allowed: bool) -> Peer:
        started = time.perf_counter()
        with tf32(allowed):
            call = synchronised(recorded(copy.deepcopy(module).to(device), x, device, own=own), device)
            call()
        return Peer(name, call, time.perf_counter() - started, own and not allowed)

    makers: dict[str, Callable[[str], Peer]] = {
        "torch eager": eager,
        "torch CUDA graph": partial(graph, own=True, allowed=False),
        "torch CUDA graph, replay only": partial(graph, own=False, allowed=False),
        "torch CUDA graph, tf32": partial(graph, own=True, allowed=True),
    }
    return {name: partial(make, name) for name, make in makers.items()}


def ort_peers(
    model: onnx.ModelProto, compiled: CompiledModel, weights: Mapping[str, Array], inputs: Mapping[str, Array]
) -> dict[str, Callable[[], Peer]]:
    """Makers of the ONNX Runtime CUDA peers, by name: baked, weights as inputs, each with and without a CUDA graph."""
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise RuntimeError("onnxruntime-gpu is not installed")

    names = [output.name for output in model.graph.output]

    def session(name: str, baked: bool, graph: bool, own: bool) -> Peer:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        proto = model if baked else compiled.activation
        started = time.perf_counter()
        provider = ("CUDAExecutionProvider", {"enable_cuda_graph": str(int(graph)), "use_tf32": "0"})
        made = ort.InferenceSession(proto.SerializeToString(), options, providers=[provider, "CPUExecutionProvider"])
        binding, held = made.io_binding(), []
        for key, array in {} if baked else weights.items():
            value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), "cuda", 0)
            held.append(value)
            binding.bind_ortvalue_input(key, value)
        given = {key: torch.from_numpy(np.ascontiguousarray(array)).cuda() for key, array in inputs.items()}
        static = {key: tensor.clone() for key, tensor in given.items()}
        for key, tensor in static.items():
            binding.bind_input(key, "cuda", 0, inputs[key].dtype, tuple(tensor.shape), tensor.data_ptr())
        results = []
        for key, array in zip(names, expected(), strict=True):
            results.append(torch.from_numpy(np.array(array)).cuda())
            place = results[-1].data_ptr()
            binding.bind_output(key, "cuda", 0, np.asarray(array).dtype, tuple(results[-1].shape), place)
        torch.cuda.synchronize()
        made.run_with_iobinding(binding)
        seconds = time.perf_counter() - started

        def call() -> object:
            if graph and own:  # a recorded graph has its own inputs and outputs; without one, the caller's are bound
                for key, tensor in given.items():
                    static[key].copy_(tensor, non_blocking=True)
                torch.cuda.current_stream().synchronize()
            made.run_with_iobinding(binding)
            if not (graph and own):
                return held
            copies = [result.clone() for result in results]
            torch.cuda.current_stream().synchronize()
            return copies

        return Peer(name, call, seconds, own)

    found: list[Any] = []

    def expected() -> list[Any]:
        if not found:
            made = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
            found.extend(made.run(names, dict(inputs)))
        return found

    makers: dict[str, Callable[[], Peer]] = {}
    for baked, graph, own in (
        (True, False, True),
        (True, True, True),
        (False, False, True),
        (False, True, True),
        (True, True, False),
    ):
        title = f"ORT CUDA {'baked' if baked else 'weights as inputs'}{', CUDA graph' if graph else ''}"
        title = title if own else f"{title}, replay only"
        makers[title] = partial(session, title, baked, graph, own)
    return makers
