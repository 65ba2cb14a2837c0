"""Every operator that ONNX has a backend node test for, run through the engine with its inputs as refittable weights.

``python -m tests.operators.page`` writes what came out to docs/operators.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, numpy_helper
from onnx.backend.test.case.node import collect_testcases

import onnx_refit
from onnx_refit.engine.onnxruntime.native import Binding
from onnx_refit.errors import OnnxRefitError
from onnx_refit.model.graph import all_graphs
from onnx_refit.plan.compiled import Verdict
from onnx_refit.tensors import Array, is_extension
from tests.plan.test_backend_nodes import differs

OLDEST_OPSET = 7
_EARLIER = (
    25,
    23,
    21,
    19,
    15,
    13,
    11,
)  # opsets tried where ONNX Runtime has no kernel for an operator's newest version
# Operators whose weights are integers too.
_QUANTISED = {"ConvInteger", "DequantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"}
_RANDOM = {"Bernoulli", "Dropout", "Multinomial", "RandomNormalLike", "RandomUniformLike", "TrainingDropout"}


class Outcome(Enum):
    """What became of one case."""

    REFITTED = "refitted"
    NOTHING = "nothing of it is refittable"
    NO_KERNEL = "no kernel"
    NO_TENSORS = "no tensors"
    FAILED = "failed"
    DIFFERS = "differs"


@dataclass(frozen=True)
class Case:
    """One node test with some inputs as initializers.

    Attributes:
        name: of the test.
        operator: domain and operator ("ai.onnx.ml.LabelEncoder", "Abs").
        model: the model; the inputs made weights are initializers.
        feeds: the other inputs.
        weights: the inputs made weights.
        expected: what ONNX says the outputs are; None where they are no tensors.
    """

    name: str
    operator: str
    model: ModelProto
    feeds: Mapping[str, Array]
    weights: Mapping[str, Array]
    expected: list[Array] | None = None


@dataclass
class Finding:
    """What is known of one operator.

    Attributes:
        outcomes: outcome -> names of the cases.
        places: inputs that were refitted, by their index.
        reasons: outcome -> why, each once.
    """

    outcomes: dict[Outcome, set[str]] = field(default_factory=dict)
    places: set[int] = field(default_factory=set)
    reasons: dict[Outcome, set[str]] = field(default_factory=dict)

    def add(self, outcome: Outcome, name: str, reasons: Iterable[str] = ()) -> None:
        """Note what became of a case."""
        self.outcomes.setdefault(outcome, set()).add(name)
        self.reasons.setdefault(outcome, set()).update(reasons)


def cases() -> Iterator[Case]:
    """Every node test of opset 7 or newer whose inputs are tensors, with all inputs but the first, and with all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [case for case in collect_testcases(None) if "_expanded" not in case.name]
    for case in found:
        if case.model is None or not case.data_sets:
            continue
        (node,) = case.model.graph.node
        given, expected = (_arrays(tensors) for tensors in case.data_sets[0])
        if given is None or len(given) != len(case.model.graph.input):
            given = []
        made: set[frozenset[str]] = set()
        for first in (False, True):
            one = _case(case.name, case.model, node, given, expected, first=first)
            if frozenset(one.weights) not in made:
                made.add(frozenset(one.weights))
                yield one


def _arrays(tensors: Iterable[object]) -> list[Array] | None:
    """Arrays of test data; None where some are sequences or optionals."""
    arrays = [numpy_helper.to_array(a) if isinstance(a, onnx.TensorProto) else a for a in tensors]
    return (
        [np.asarray(a) for a in arrays if isinstance(a, np.ndarray | np.generic)]
        if all(isinstance(a, np.ndarray | np.generic) for a in arrays)
        else None
    )


def _case(
    name: str, model: ModelProto, node: NodeProto, arrays: list[Array], expected: list[Array] | None, *, first: bool
) -> Case:
    proto, feeds, weights, inputs = ModelProto(), {}, {}, []
    proto.CopyFrom(model)
    for index, (declared, values) in enumerate(zip(model.graph.input, arrays, strict=False)):
        quantised = node.op_type in _QUANTISED and values.dtype.kind in "iu"
        if (quantised or (values.dtype.kind == "f" and values.size > 1)) and (index or first):
            proto.graph.initializer.append(numpy_helper.from_array(values, declared.name))
            weights[declared.name] = values
        else:
            feeds[declared.name] = values
            inputs.append(declared)
    if arrays:
        del proto.graph.input[:]
        proto.graph.input.extend(inputs)
        proto.ir_version = max(proto.ir_version, 4)  # the first with initializers that are no inputs
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return Case(name, operator, proto, feeds, weights, expected)


def survey(some: Iterable[Case]) -> dict[str, Finding]:
    """Run the cases; operator -> what is known of it."""
    findings: dict[str, Finding] = {}
    for case in some:
        _look(case, findings.setdefault(case.operator, Finding()))
    return findings


def _look(case: Case, finding: Finding) -> None:
    opsets = {entry.domain: entry.version for entry in case.model.opset_import}
    if opsets.get("", OLDEST_OPSET) < OLDEST_OPSET:
        return
    if not case.feeds and not case.weights and case.model.graph.input:
        finding.add(Outcome.NO_TENSORS, case.name, ["its inputs are sequences or optionals"])
        return
    try:
        case, expected = _runnable(case)
    except Exception as error:  # noqa: BLE001  onnxruntime raises a dozen unrelated classes
        finding.add(Outcome.NO_KERNEL, case.name, [" ".join(str(error).split())])
        return
    try:
        plan = onnx_refit.build(case.model)
        with onnx_refit.load(plan) as engine:
            got = list(engine.run(case.feeds).values())
            if _differ(case, expected, got):
                finding.add(Outcome.DIFFERS, case.name)
                return
            if not plan.refittable:
                reasons = {d.reason for d in plan.compiled.decisions if d.verdict is Verdict.REJECTED}
                finding.add(Outcome.NOTHING, case.name, reasons)
                return
            other = {name: _other(array) for name, array in plan.require_weights().items()}
            engine.refit(other)
            engine.full_speed.wait()
            got = list(engine.run(case.feeds).values())
            expected = baked(case.model, {**case.weights, **other}, case.feeds)
    except OnnxRefitError as error:
        finding.add(Outcome.FAILED, case.name, [error.message])
        return
    if _differ(case, expected, got):
        finding.add(Outcome.DIFFERS, case.name)
        return
    finding.add(Outcome.REFITTED, case.name)
    read = list(case.model.graph.node[0].input)
    finding.places |= {read.index(name) for name in other if name in read}


def _runnable(case: Case) -> tuple[Case, list[Array]]:
    """The case at the newest opset for which there is a kernel, and what it gives; raises where there is none."""
    try:
        return case, baked(case.model, case.weights, case.feeds)
    except Exception:
        for version in _EARLIER:
            model = ModelProto()
            model.CopyFrom(case.model)
            entry = next((entry for entry in model.opset_import if not entry.domain), None)
            if entry is None or case.expected is None or version >= entry.version:
                continue
            entry.version = version
            older = replace(case, model=model)
            try:
                got = baked(model, case.weights, case.feeds)
            except Exception:  # noqa: BLE001  onnxruntime raises a dozen unrelated classes
                continue
            if not _differ(older, case.expected, got):
                return older, got
        raise


def baked(model: ModelProto, weights: Mapping[str, Array], feeds: Mapping[str, Array]) -> list[Array]:
    """What a fresh, ordinary session with these weights gives."""
    changed = ModelProto()
    changed.CopyFrom(model)
    del changed.graph.initializer[:]
    waiting = dict(weights)
    for node in (node for graph in all_graphs(changed.graph) for node in graph.node):
        if node.op_type == "Constant" and node.output[0] in waiting:
            del node.attribute[:]
            node.attribute.append(
                onnx.helper.make_attribute("value", numpy_helper.from_array(waiting.pop(node.output[0])))
            )
    changed.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in waiting.items())
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(changed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    if any(array.dtype == object for array in feeds.values()):  # strings go in only this way
        return [np.asarray(array) for array in session.run(None, dict(feeds))]
    return Binding(session, {}, [output.name for output in session.get_outputs()]).run(feeds.items())


def _other(array: Array) -> Array:
    """Other values for which an operator makes as much sense."""
    if array.dtype.kind in "iu":
        return np.roll(array.reshape(-1), 1).reshape(array.shape)
    finite = np.where(np.isfinite(array.astype(np.float64)), array, 2.0)  # what a refit refuses unless told otherwise
    return np.asarray(finite * np.random.default_rng(0).uniform(0.9, 1.1, array.shape)).astype(array.dtype)


def _differ(case: Case, expected: list[Array], got: list[Array]) -> bool:
    if case.model.graph.node[0].op_type in _RANDOM:
        return [np.shape(a) for a in expected] != [np.shape(a) for a in got]
    return any(differs(_wide(a), _wide(b)) for a, b in zip(expected, got, strict=True))


def _wide(array: Array) -> Array:
    """The array in a dtype that NumPy compares, NaN for NaN: bfloat16, float8 and four bits as float32."""
    array = np.asarray(array)
    return array.astype(np.float32) if is_extension(array.dtype) else array
