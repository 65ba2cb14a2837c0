"""What others offer on a GPU: PyTorch eager, in a CUDA graph, compiled; AOTInductor; ONNX Runtime CUDA."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
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
        seconds: of building it, which is what a change of weights costs unless ``update`` exists.
        update: replace its weights, if it offers that.
    """

    name: str
    call: Callable[[], object]
    seconds: float
    update: Callable[[], object] | None = None
    notes: list[str] = field(default_factory=list)


def synchronised(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The call, and the wait for the device."""
    if not device.startswith("cuda"):
        return call

    def both() -> object:
        result = call()
        torch.cuda.synchronize(device)
        return result

    return both


def in_cuda_graph(call: Callable[[], Any], device: str) -> Callable[[], object]:
    """A recorded graph of a call on fixed tensors; the call itself on the CPU."""
    if not device.startswith("cuda"):
        return call
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def torch_peers(
    module: nn.Module, inputs: Mapping[str, Array], device: str, *, quick: bool
) -> list[Callable[[], Peer]]:
    """Makers of the PyTorch peers; each may fail, and the caller notes why."""
    module = module.eval().to(device)
    x = [torch.from_numpy(np.array(array)).to(device) for array in inputs.values()]

    def eager() -> Peer:
        return Peer("torch eager", synchronised(lambda: module(*x), device), 0.0)

    def graph() -> Peer:
        started = time.perf_counter()
        replay = in_cuda_graph(lambda: module(*x), device)
        return Peer("torch CUDA graph", synchronised(replay, device), time.perf_counter() - started)

    def compiled() -> Peer:
        torch._dynamo.reset()
        started = time.perf_counter()
        made = torch.compile(module, mode="default" if quick else "max-autotune", dynamic=False)
        call = synchronised(lambda: made(*x), device)
        for _ in range(3):
            call()
        return Peer("torch.compile", call, time.perf_counter() - started)

    def inductor() -> Peer:
        started = time.perf_counter()
        exported = torch.export.export(module, tuple(x))
        folder = tempfile.mkdtemp(prefix="aoti")
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(Path(folder) / "model.pt2"))
        made = torch._inductor.aoti_load_package(package)
        seconds = time.perf_counter() - started
        constants = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        peer = Peer("AOTInductor", synchronised(lambda: made(*x), device), seconds)
        if hasattr(made, "load_constants"):
            peer.update = synchronised(lambda: made.load_constants(constants, check_full_update=False), device)
        return peer

    return [eager, graph, compiled] if quick else [eager, graph, compiled, inductor]


def ort_peers(
    model: onnx.ModelProto, compiled: CompiledModel, weights: Mapping[str, Array], inputs: Mapping[str, Array]
) -> list[Callable[[], Peer]]:
    """Makers of the ONNX Runtime CUDA peers: baked, weights as inputs, each with and without a CUDA graph."""
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise RuntimeError("onnxruntime-gpu is not installed")

    def session(baked: bool, graph: bool) -> Peer:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        proto = model if baked else compiled.activation
        started = time.perf_counter()
        provider = ("CUDAExecutionProvider", {"enable_cuda_graph": str(int(graph))})
        made = ort.InferenceSession(proto.SerializeToString(), options, providers=[provider, "CPUExecutionProvider"])
        binding, held = made.io_binding(), []
        for name, array in {**inputs, **({} if baked else weights)}.items():
            value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), "cuda", 0)
            held.append(value)
            binding.bind_ortvalue_input(name, value)
        for output in made.get_outputs():
            binding.bind_output(output.name, "cuda", 0)
        made.run_with_iobinding(binding)
        seconds = time.perf_counter() - started

        def call() -> object:
            made.run_with_iobinding(binding)
            return held

        title = f"ORT CUDA {'baked' if baked else 'weights as inputs'}{', CUDA graph' if graph else ''}"
        return Peer(title, call, seconds)

    return [lambda b=b, g=g: session(b, g) for b in (True, False) for g in (False, True)]  # type: ignore[misc]
