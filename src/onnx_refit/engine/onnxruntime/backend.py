"""The ONNX Runtime engine: one session with the weights as graph inputs, any number of weight sets to run it with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx_refit.engine.onnxruntime.buffers import Buffer, BufferPool
from onnx_refit.engine.onnxruntime.native import make_session, session_options
from onnx_refit.engine.onnxruntime.options import OnnxRuntimeOptions
from onnx_refit.engine.onnxruntime.program import ProgramRunner
from onnx_refit.engine.onnxruntime.weightset import AtFullSpeed, OnnxRuntimeWeightSet
from onnx_refit.engine.protocol import WeightSet
from onnx_refit.errors import EngineError
from onnx_refit.plan.compiled import CompiledModel, Decision
from onnx_refit.tensors import Array, TensorSpec


def create(
    compiled: CompiledModel,
    weights: Mapping[str, Array] | None = None,
    options: OnnxRuntimeOptions = OnnxRuntimeOptions(),  # noqa: B008 (frozen)
    artefact: bytes | None = None,
) -> OnnxRuntimeBackend:
    """A backend for a compiled model on this host.

    Args:
        compiled: the portable engine.
        weights: source weights, where at hand: timing the forms of small layers is truer with them.
        options: what the user chose.
        artefact: what ``artefact()`` of an earlier backend gave; used if it was made for this very host and model.

    Raises:
        EngineError: ONNX Runtime cannot run the model.
    """
    return OnnxRuntimeBackend(compiled, options)


class OnnxRuntimeBackend:
    """A compiled model on this host's processor. Thread-safe; make one with ``create``."""

    def __init__(self, compiled: CompiledModel, options: OnnxRuntimeOptions) -> None:
        self._compiled = compiled
        self._decisions: tuple[Decision, ...] = ()
        self._specs = {spec.name: spec for spec in compiled.engine_weights}
        self._pool = BufferPool()
        self._program = ProgramRunner(compiled, options.threads)
        self._session = make_session(compiled.activation, session_options(options.threads))
        self._outputs = tuple(spec.name for spec in compiled.outputs)
        self._closed = False

    @property
    def name(self) -> str:
        """The engine's name."""
        return "onnxruntime"

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """The model's inputs."""
        return self._compiled.inputs

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """The model's outputs."""
        return self._compiled.outputs

    @property
    def decisions(self) -> Sequence[Decision]:
        """What specialising for this host decided, with reasons."""
        return self._decisions

    def artefact(self) -> bytes | None:
        """The host specialisation, to give to ``create`` again on the same host; None where there is none."""
        return None

    def required(self, changed: frozenset[str]) -> frozenset[str]:
        """The source weights that deriving every engine weight which reads one of ``changed`` needs."""
        needed: set[str] = set()
        for name in self._program.affected(changed):
            needed |= self._program.sources_of(name)
        return frozenset(needed)

    @property
    def recoverable(self) -> frozenset[str]:
        """Source weights that ``recover`` gives back bit for bit."""
        return frozenset(self._compiled.program.passthrough.values())

    def recover(self, weights: WeightSet, name: str) -> Array:
        """A source weight read back from a weight set (a copy); EngineError for one that is not recoverable."""
        for engine_name, source in self._compiled.program.passthrough.items():
            if source == name:
                return _own(weights).buffers[engine_name].array.copy()
        raise EngineError("the engine's weights do not hold this source weight bit for bit", where=name)

    def derive(
        self,
        sources: Mapping[str, Array],
        base: WeightSet | None = None,
        changed: frozenset[str] | None = None,
    ) -> OnnxRuntimeWeightSet:
        """A new weight set from source weights; see ``Backend.derive``."""
        self._check_open()
        held: dict[str, Buffer] = {} if base is None or changed is None else dict(_own(base).buffers)
        renew = list(self._specs) if not held else sorted(self._program.affected(changed or frozenset()))
        fresh = {name: self._pool.take(self._specs[name]) for name in renew}
        self._program.run(sources, fresh)
        shared = sum(buffer.spec.nbytes for name, buffer in held.items() if name not in fresh)
        return OnnxRuntimeWeightSet({**held, **fresh}, shared, self._session, self._outputs, AtFullSpeed())

    def run(
        self, weights: WeightSet, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run one inference with a weight set; see ``Backend.run``."""
        self._check_open()
        results = dict(zip(self._outputs, _own(weights).run(inputs), strict=True))
        return results if outputs is None else {name: results[name] for name in outputs}

    def close(self) -> None:
        """Free the spare buffers; running afterwards raises EngineError."""
        self._closed = True
        self._pool.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed")


def _own(weights: WeightSet) -> OnnxRuntimeWeightSet:
    if not isinstance(weights, OnnxRuntimeWeightSet):
        raise EngineError("the weight set belongs to another engine")
    return weights
