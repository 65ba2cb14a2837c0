"""What a refit from a trainer's tensors costs as a user sees it: ``Engine.refit``, from the call to the report.

    python -m benchmarks.gpu_refit --out benchmarks/results/gpu-h200-refit.json
    python -m benchmarks.gpu_refit --out smoke.json --device cpu --only mlp --quick      that this file works

Each figure is a whole transaction: tensors looked at (NaN and infinities too), a new version derived, its samples
compared with the version before, what a rollback and later partial refits need put aside, committed, reported. Before
each one all tensors get other values, as a trainer's step gives them; before each copy too. Interleaved in random
order; each call runs once more before it is timed, as its rivals used the caches meanwhile. The copy beside it is
PyTorch's, of the same bytes in one piece, waited for. Medians; and the tenth percentile, because virtual machines have
neighbours, and what is measured is Python of tens of microseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

import onnx_refit
from benchmarks.cases import CASES
from benchmarks.gpu import hardware, wide_mlp
from benchmarks.measure import alternate, once, ratio
from onnx_refit.engine.cuda.backend import CudaBackend
from onnx_refit.engine.cuda.options import CudaOptions, Precision
from onnx_refit.engine.registry import EngineOptions
from onnx_refit.model.prepare import prepare
from onnx_refit.plan.plan import Plan
from onnx_refit.refit.check import Casting
from onnx_refit.refit.live import Engine

Call = tuple[Callable[[], object], Callable[[], object]]
"""What is not timed, and what is."""


def raced(calls: Mapping[str, Call], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call; in each round all of them, in random order, each once before it is timed."""

    def timed(name: str) -> float:
        before, call = calls[name]
        before()
        if device != "cpu":
            torch.cuda.synchronize()
        return once(call)

    for name in calls:  # kernels are compiled, tables made
        for _ in range(4):
            timed(name)
    return alternate(timed, list(calls), rounds=rounds, repeats=_REPEATS)


def told(figures: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What is written down of them."""
    medians = {name: statistics.median(values) for name, values in figures.items()}
    found: dict[str, Any] = {
        "microseconds": {name: round(value * 1e6, 1) for name, value in medians.items()},
        "tenth percentile, microseconds": {
            name: round(float(np.quantile(values, 0.1)) * 1e6, 1) for name, values in figures.items()
        },
    }
    if "copy" in medians:
        others = [name for name in medians if name != "copy"]
        found["over a copy"] = {name: round(ratio(figures, name, "copy"), 2) for name in others}
    return found


_REPEATS = 5


class Trainer:
    """Tensors on the device whose values change at each step.

    Args:
        values: name -> value.
        device: where.
        dtype: of the floating-point ones; None as they are.
        turned: whether they lie in another order of elements than the model's.
    """

    def __init__(
        self, values: Mapping[str, Any], device: str, dtype: torch.dtype | None = None, *, turned: bool = False
    ) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        for name, value in values.items():
            tensor = torch.from_numpy(np.array(value)).to(device)
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            if turned and tensor.dim() > 1:
                tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)
            self.tensors[name] = tensor
        self._moved = [tensor for tensor in self.tensors.values() if tensor.is_floating_point()]
        self._states = [[tensor.clone() for tensor in self._moved] for _ in range(2)]
        for tensor in self._states[1]:
            tensor.mul_(1.25).add_(0.125)
        self._turn = 0
        self.nbytes = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def step(self) -> None:
        """Give every tensor other values."""
        self._turn ^= 1
        torch._foreach_copy_(self._moved, self._states[self._turn])


def loaded(plan: Plan, device: str, **options: Any) -> Any:
    """An engine of its own."""
    return onnx_refit.load(plan, options=EngineOptions(cuda=CudaOptions(devices=(device,), measure=False, **options)))


def measure(name: str, device: str, rounds: int) -> dict[str, Any]:
    """One model."""
    model = prepare(CASES[name]().model, for_engine="cuda").model
    plan = onnx_refit.build(model, engine="cuda", options=onnx_refit.BuildOptions(specialise=False))
    assert plan.weights is not None
    weights = dict(plan.weights)
    keys = ("mapping", "new mapping", "bound", "half", "turned", "partial", "bf16", "frozen")
    trainers = {key: Trainer(weights, device) for key in keys}
    trainers["half"] = Trainer(weights, device, torch.bfloat16)
    trainers["turned"] = Trainer(weights, device, turned=True)
    engines = {key: loaded(plan, device) for key in keys if key != "bf16"}
    engines["bf16"] = loaded(plan, device, precision=Precision.BF16)
    nbytes = trainers["bound"].nbytes
    flat, target = (torch.zeros(nbytes // 4, dtype=torch.float32, device=device) for _ in range(2))
    bound = engines["bound"].bind(trainers["bound"].tensors)
    single = trainers["partial"].tensors
    some = {name: single[name] for name in list(single)[: max(1, len(single) // 2)]}
    frozen = Trainer(weights, device)
    engines["frozen"].refit(frozen.tensors)
    rounding = onnx_refit.CheckOptions(casting=Casting.ROUND)  # BiDAF has weights of float16

    def copy() -> None:
        target.copy_(flat)
        if device != "cpu":
            torch.cuda.synchronize()

    def of(key: str, call: Callable[[Any, Any], object]) -> Call:
        return trainers[key].step, lambda: call(engines[key], trainers[key].tensors)

    anew: dict[str, torch.Tensor] = {}

    def again() -> None:
        trainers["new mapping"].step()
        anew.clear()
        anew.update(detached(trainers["new mapping"].tensors))

    calls: dict[str, Call] = {
        "copy": (lambda: flat.mul_(0.97), copy),
        "bound": of("bound", lambda engine, _: engine.refit(bound)),
        "mapping": of("mapping", lambda engine, tensors: engine.refit(tensors)),
        "new mapping of new tensors": (again, lambda: engines["new mapping"].refit(anew)),
        "from bfloat16": of("half", lambda engine, tensors: engine.refit(tensors, rounding)),
        "from another order": of("turned", lambda engine, tensors: engine.refit(tensors)),
        "half of the weights": of("partial", lambda engine, _: engine.refit(some, partial=True)),
        "into bfloat16": of("bf16", lambda engine, tensors: engine.refit(tensors)),
        "nothing changed": (lambda: None, lambda: engines["frozen"].refit(frozen.tensors)),
    }
    figures = told(raced(calls, rounds, device))
    trainers["bound"].step()
    report = engines["bound"].refit(bound)
    for engine in engines.values():
        engine.close()
    return {
        "bytes": nbytes,
        "bytes kept": sum(
            spec.nbytes for n, spec in plan.refittable.items() if n not in engines["mapping"]._backend.recoverable
        ),
        "bytes of half of the weights": sum(t.numel() * t.element_size() for t in some.values()),
        "tensors": len(weights),
        **figures,
        "stages of a refit, microseconds": {key: round(value * 1e6, 1) for key, value in report.seconds.items()},
    }


def detached(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As a state dict is made anew at each step."""
    return {"".join(name): tensor.detach() for name, tensor in tensors.items()}


def fixed(device: str, rounds: int) -> dict[str, Any]:
    """The same of weights of a few bytes, one and a hundred: what a refit costs that moves nothing."""
    calls: dict[str, Call] = {}
    for count, key in product((1, 100), ("bound", "mapping")):
        compiled, weights = wide_mlp(count, 16)
        trainer = Trainer(weights, device)
        backend = CudaBackend(compiled, device, CudaOptions(devices=(device,)))
        engine = Engine(Plan("cuda", compiled, weights, ""), backend, weights)
        given = engine.bind(trainer.tensors) if key == "bound" else trainer.tensors
        calls[f"{key}, {count}"] = trainer.step, partial(engine.refit, given)
    flat, target = (torch.zeros(64, dtype=torch.float32, device=device) for _ in range(2))

    def copy() -> None:
        target.copy_(flat)
        if device != "cpu":
            torch.cuda.synchronize()

    calls["copy"] = lambda: flat.mul_(0.97), copy
    return told(raced(calls, rounds, device))


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--only", default="fixed,bidaf,encoder,resnet18,resnet50,mlp")
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    rounds = 3 if chosen.quick else 120
    results: dict[str, Any] = {"machine": hardware(chosen.device), "rounds": rounds, "cases": {}}
    for name in chosen.only.split(","):
        found = fixed(chosen.device, rounds) if name == "fixed" else measure(name, chosen.device, rounds)
        results["cases"][name] = found
        print(name, json.dumps(found), flush=True)
        chosen.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
