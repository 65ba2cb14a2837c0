"""Measure the engine "cuda" beside its peers and write JSON.

    python -m benchmarks.gpu --out gpu.json                      one GPU, all cases
    python -m benchmarks.gpu --out gpu.json --gpus 4 --only group
    python -m benchmarks.gpu --out smoke.json --device cpu --quick --only mlp     that this file works, without a GPU

Figures come from paired, interleaved rounds in one process (``benchmarks.measure.race``), but for what compiles, which
runs in processes of its own (``benchmarks.gpu_isolated``). All is float32 without TF32 unless its name says otherwise.
What failed or was not there is in the JSON with its reason. Needs torch; CuPy for our kernels; onnxruntime-gpu and a
C++ compiler for some peers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper

from benchmarks import gpu_isolated, gpu_peers
from benchmarks.cases import CASES
from benchmarks.gpu_case import Measured
from benchmarks.measure import machine, once
from onnx_refit.engine.cuda.backend import CudaBackend
from onnx_refit.engine.cuda.create import create
from onnx_refit.engine.cuda.group import CudaGroup
from onnx_refit.engine.cuda.options import CudaOptions
from onnx_refit.errors import OnnxRefitError
from onnx_refit.plan.compiled import CompiledModel, RefitProgram, SourceWeight
from onnx_refit.tensors import Array, spec_of, spec_of_value_info, value_info_of


def hardware(device: str) -> dict[str, object]:
    """The machine and, if there is one, its GPU."""
    found = machine()
    if device.startswith("cuda"):
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found |= {"gpus": names, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        try:
            import cupy

            found["cupy"] = cupy.__version__
        except ImportError:
            found["cupy"] = None
    return found


def wide_mlp(layers: int, width: int) -> tuple[CompiledModel, dict[str, Array]]:
    """A compiled model of layers * width * width parameters, made without a protobuf of that size."""
    rng = np.random.default_rng(0)
    one = rng.standard_normal((width, width), dtype=np.float32) / np.float32(np.sqrt(width))
    weights = {f"w{index}": one.copy() for index in range(layers)}
    names = ["x", *(f"h{index}" for index in range(layers - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(layers)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, width])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, width])
    specs = tuple(spec_of(name, array) for name, array in weights.items())
    graph = helper.make_graph(nodes, "wide", [x, *(value_info_of(spec) for spec in specs)], [y])
    compiled = CompiledModel(
        activation=helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9),
        program=RefitProgram(None, {s.name: s.name for s in specs}, {s.name: frozenset({s.name}) for s in specs}),
        sources=tuple(SourceWeight(spec, ()) for spec in specs),
        engine_weights=specs,
        inputs=(spec_of_value_info(x),),
        outputs=(spec_of_value_info(y),),
    )
    return compiled, weights


def large(device: str, quick: bool) -> dict[str, object]:
    """Refits of a model of about a billion parameters, from host and from device memory."""
    compiled, weights = wide_mlp(4, 512) if quick else wide_mlp(60, 4096)
    parameters = sum(array.size for array in weights.values())
    backend = CudaBackend(compiled, device, CudaOptions(devices=(device,)))
    backend.derive(weights)
    there = {name: torch.from_numpy(array).to(device) for name, array in weights.items()}
    from_host = statistics.median(once(lambda: backend.derive(weights)) for _ in range(5))
    from_device = statistics.median(once(lambda: backend.derive(there)) for _ in range(5))
    copied = torch.empty(sum(array.nbytes for array in weights.values()), dtype=torch.uint8, device=device)
    target = torch.empty_like(copied)
    copy = gpu_peers.synchronised(lambda: target.copy_(copied), device)
    copy()
    return {
        "parameters": parameters,
        "seconds from NumPy arrays": from_host,
        "seconds from device weights": from_device,
        "seconds of a copy within the device": statistics.median(once(copy) for _ in range(5)),
        "seconds a billion parameters, from NumPy arrays": from_host / parameters * 1e9,
    }


def group(devices: tuple[str, ...], quick: bool) -> dict[str, object]:
    """A full refit of a group from weights on the first device, beside NCCL's broadcast of the same bytes."""
    compiled, weights = wide_mlp(4, 512) if quick else wide_mlp(16, 4096)
    nbytes = sum(array.nbytes for array in weights.values())
    there: Any = {name: torch.from_numpy(array).to(devices[0]) for name, array in weights.items()}
    backend: Any = create(compiled, options=CudaOptions(devices=devices))[0]
    found: dict[str, object] = {"devices": list(devices), "bytes": nbytes}
    alone = CudaBackend(compiled, devices[0], CudaOptions(devices=devices[:1]))
    found["seconds of a refit of the first device"] = _median(lambda: alone.derive(there))
    refit = found["seconds of a group refit"] = _median(lambda: backend.derive(there))
    copies = CudaGroup([CudaBackend(compiled, device, CudaOptions(devices=devices)) for device in devices], nccl=False)
    found["seconds of a group refit by copies"] = _median(lambda: copies.derive(there))
    found["decisions"] = [d.reason for d in backend.decisions if d.subject == "group"]
    held = backend.derive(there)
    x = {"x": np.ones((1, 512 if quick else 4096), np.float32)}
    answers = [member.run(part, x)["y"] for member, part in zip(backend._members, held.members, strict=True)]
    found["all devices answer alike"] = all(np.allclose(answers[0], answer, rtol=1e-4) for answer in answers)
    if devices[0].startswith("cuda"):
        buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for device in devices]

        def broadcast() -> None:
            torch.cuda.nccl.broadcast(buffers)
            for device in devices:
                torch.cuda.synchronize(device)

        seconds = _median(broadcast)
        found |= {"seconds of an NCCL broadcast": seconds, "share of the broadcast bandwidth": seconds / refit}
        found["NCCL, GB/s"] = nbytes / seconds / 1e9
    backend.close()
    copies.close()
    return found


def _median(call: Callable[[], object]) -> float:
    call()
    call()
    return statistics.median(once(call) for _ in range(11))


def main() -> None:
    """Measure what was asked for and write the JSON after each case, so that a cut run leaves what it had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--only", help="cases, comma-separated; also: large, group")
    parser.add_argument("--seconds", type=float, default=3.0, help="per race")
    parser.add_argument("--quick", action="store_true", help="nothing that compiles, small sizes")
    chosen = parser.parse_args()
    wanted = chosen.only.split(",") if chosen.only else ["bidaf", "encoder", "resnet18", "resnet50", "mlp", "large"]
    results: dict[str, Any] = {"machine": hardware(chosen.device), "cases": {}}
    isolated: Mapping[tuple[str, str], Any] = {}
    if not chosen.quick and chosen.device.startswith("cuda"):
        started = time.perf_counter()
        isolated = gpu_isolated.run_all(isolated_jobs(wanted), chosen.device)
        print(f"== what compiles, {time.perf_counter() - started:.0f} s", flush=True)
        chosen.out.write_text(json.dumps({" ".join(key): value for key, value in isolated.items()}, indent=2))
    for name in wanted:
        started = time.perf_counter()
        try:
            results["cases"][name] = measure(name, chosen, isolated)
        except (OnnxRefitError, RuntimeError) as error:
            results["cases"][name] = {"failed": f"{type(error).__name__}: {error}"}
        print(f"== {name}, {time.perf_counter() - started:.0f} s")
        print(json.dumps(results["cases"][name], indent=1, default=str), flush=True)
        chosen.out.write_text(json.dumps(results, indent=2, default=str))


def isolated_jobs(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """What compiles: case, input and kind."""
    inputs = {"encoder": ("S=16", "S=128"), "mlp": ("b=1", "b=64"), "resnet18": ("b=1", "b=32"), "resnet50": ("b=1",)}
    jobs = [(name, label, "compile") for name in inputs for label in inputs[name]]
    jobs += [("encoder", "S=16", "ours"), ("encoder", "S=128", "ours"), ("resnet18", "b=1", "ours")]
    jobs += [
        ("encoder", "S=16", "aoti"),
        ("mlp", "b=1", "aoti"),
        ("encoder", "S=16", "autotune"),
        ("mlp", "b=64", "autotune"),
    ]
    return [job for job in jobs if job[0] in names]


def measure(name: str, chosen: argparse.Namespace, isolated: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    """One case."""
    if name == "large":
        return large(chosen.device, chosen.quick)
    if name == "group":
        kind = chosen.device.split(":")[0]
        devices = tuple(f"cuda:{index}" if kind == "cuda" else "cpu" for index in range(max(2, chosen.gpus)))
        return group(devices, chosen.quick)
    case = Measured(CASES[name](), chosen.device)
    inputs = case.case.inputs if chosen.quick else gpu_isolated.inputs_of(name, case.case)
    return {
        "inference": [
            case.inference(label, feeds, chosen.seconds, isolated.get((name, label), {}))
            for label, feeds in inputs.items()
        ],
        "refit": case.refit(chosen.seconds),
        "under refits": case.under_refit(chosen.seconds),
    }


if __name__ == "__main__":
    main()
