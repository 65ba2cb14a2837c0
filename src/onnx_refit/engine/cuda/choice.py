"""Which way of running a network is fastest here: measured once, recorded in the plan, used again on such a GPU."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from onnx_refit.engine.cuda import kernels, ortnetwork
from onnx_refit.engine.cuda.inductor import InductorNetwork
from onnx_refit.engine.cuda.lowering.program import Lowered
from onnx_refit.engine.cuda.options import CudaOptions, Precision, Recurrent
from onnx_refit.engine.cuda.torchlib import real_dtype
from onnx_refit.errors import EngineError, UnsupportedModelError
from onnx_refit.plan.compiled import CompiledModel, Decision, Verdict

Network = Any
"""A ``Lowered``, an ``InductorNetwork`` or an ``OrtNetwork``: the same interface."""

_VERSION = 1


@dataclass(frozen=True)
class Choice:
    """How a network runs.

    Attributes:
        runner: ``"torch"``, ``"inductor"`` or ``"onnxruntime"``.
        recurrent: how recurrent layers run, a value of ``Recurrent``.
        here: what it was measured on: GPU, PyTorch, precision.
        microseconds: what each candidate took; empty where there was only one.
        version: of this record's format.
    """

    runner: str
    recurrent: str
    here: str
    microseconds: Mapping[str, float]
    version: int = _VERSION

    @property
    def label(self) -> str:
        """The choice in a word or two."""
        return f"{self.runner}, recurrence {self.recurrent}"

    def pack(self) -> bytes:
        """The record for the plan file."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    def decision(self) -> Decision:
        """The choice with its reason."""
        figures = ", ".join(f"{name} {value:.0f} us" for name, value in self.microseconds.items())
        return Decision("network", f"run by {self.label}", Verdict.ACCEPTED, figures or "it is the only way here")


def here(device: str, options: CudaOptions) -> str:
    """What a measurement depends on, in words."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    own = "with persistent kernels" if kernels.available() else "without persistent kernels"
    tried = "with" if options.inductor else "without"
    return f"{name}, torch {torch.__version__}, {options.precision.value}, {own}, {tried} TorchInductor"


def unpack(artefact: bytes | None, place: str) -> Choice | None:
    """The recorded choice, if it was made in such a place; None otherwise (it is a cache: measure again)."""
    if artefact is None:
        return None
    try:
        record = json.loads(artefact)
        made = Choice(**{field.name: record[field.name] for field in fields(Choice)})
    except (ValueError, KeyError, TypeError):
        return None
    return made if made.version == _VERSION and made.here == place else None


def make_network(compiled: CompiledModel, device: str, options: CudaOptions, choice: Choice) -> Network:
    """The network of a choice; UnsupportedModelError where it cannot run it."""
    if choice.runner == "onnxruntime":
        return ortnetwork.OrtNetwork(compiled, device, tf32=options.precision is Precision.TF32)
    # The compiler puts operators together itself.
    weights = None if choice.runner == "inductor" else {s.name: s.static_shape for s in compiled.engine_weights}
    real = real_dtype(torch, options.precision)
    lowered = Lowered(compiled.activation, device, real, recurrent=choice.recurrent, weights=weights)
    if choice.runner == "inductor":
        return InductorNetwork(lowered, frozenset(node.op_type for node in compiled.activation.graph.node))
    return lowered


def candidates(compiled: CompiledModel, device: str, options: CudaOptions) -> list[Choice]:
    """The ways that could run this network here, the most promising first.

    Raises:
        UnsupportedModelError: there is none; the words are those of the first.
    """
    place = here(device, options)
    ways = [Choice("torch", options.recurrent.value, place, {})]
    operators = {node.op_type for node in compiled.activation.graph.node}
    own = device.startswith("cuda") and kernels.available()
    if options.recurrent is Recurrent.AUTO and own and operators & {"LSTM", "GRU"}:
        ways.append(Choice("torch", Recurrent.LIBRARY.value, place, {}))
    if options.inductor:
        ways.append(Choice("inductor", options.recurrent.value, place, {}))
    if options.precision in (Precision.FP32, Precision.TF32) and ortnetwork.available(device):
        ways.append(Choice("onnxruntime", Recurrent.AUTO.value, place, {}))
    able, refusals = [], []
    for way in ways:
        try:
            make_network(compiled, device, options, way)
        except UnsupportedModelError as error:
            refusals.append(error)
        else:
            able.append(way)
    if not able:
        raise refusals[0]
    return able


Timer = Callable[[Choice], float]
"""Seconds of one inference by a way; EngineError where it fails."""


def fastest(ways: list[Choice], timer: Timer) -> Choice:
    """The way with the smallest time; those that fail are left out, and the first is taken if all do."""
    seconds: dict[str, float] = {}
    for way in ways:
        try:
            seconds[way.label] = timer(way)
        except EngineError:
            continue
    if not seconds:
        return ways[0]
    best = min((way for way in ways if way.label in seconds), key=lambda way: seconds[way.label])
    figures = {name: round(value * 1e6, 1) for name, value in seconds.items()}
    return Choice(best.runner, best.recurrent, best.here, figures)


def time_inference(call: Callable[[], object], repeats: int = 15) -> float:
    """Median seconds of a call that waits for its own results, after warming up."""
    for _ in range(3):
        call()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
