"""The TensorRT engine: weight sets beside two device engines, one answering while the other is refitted.

**Not run** on a GPU; the tests drive it through a fake of the bindings' contract.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnx_refit.engine.base import CompiledBackend
from onnx_refit.engine.protocol import Inspector, WeightSet
from onnx_refit.engine.tensorrt.artefact import Conditions, conditions_of, obstacle, pack, unpack
from onnx_refit.engine.tensorrt.bindings import Bindings, find_bindings
from onnx_refit.engine.tensorrt.build import build_plan
from onnx_refit.engine.tensorrt.device import Device, DeviceBuffer, DeviceTensor, open_device
from onnx_refit.engine.tensorrt.network import parse
from onnx_refit.engine.tensorrt.options import TensorRtOptions
from onnx_refit.engine.tensorrt.pool import TwinPool
from onnx_refit.engine.tensorrt.profiles import Profile, plan_profile
from onnx_refit.engine.tensorrt.twin import Twin
from onnx_refit.engine.tensorrt.weightset import StoredWeight, TensorRtWeightSet
from onnx_refit.errors import EngineError
from onnx_refit.plan.compiled import CompiledModel, Decision, Verdict
from onnx_refit.plan.evaluate import affected, evaluate, required
from onnx_refit.tensors import Array, TensorSpec, numpy_dtype


def create(
    compiled: CompiledModel,
    weights: Mapping[str, Array] | None = None,
    options: TensorRtOptions = TensorRtOptions(),  # noqa: B008 (frozen)
    artefact: bytes | None = None,
    *,
    bindings: Bindings | None = None,
    device: Device | None = None,
) -> TensorRtBackend:
    """A backend for a compiled model on this machine's GPU.

    Args:
        compiled: the portable engine.
        weights: source weights; needed where there is no plan of TensorRT's to use again.
        options: what the user chose.
        artefact: what ``artefact()`` of an earlier backend gave; used if it fits this machine, version and model.
        bindings: TensorRT; None finds it.
        device: the GPU; None opens the first.

    Raises:
        MissingExtraError: no TensorRT is installed.
        EngineError: there is no GPU, or TensorRT cannot build or load the model.
    """
    found = find_bindings(options.package) if bindings is None else bindings
    gpu = open_device() if device is None else device
    gpu.make_current()
    profile = plan_profile(compiled.inputs, options.shapes, options.dimensions, options.fallback)
    here = conditions_of(found, gpu.compute_capability, compiled, profile, options)
    decisions = [*_profile_decisions(profile), *_fixed_decisions(options)]
    plan, decision = _held_plan(artefact, here)
    decisions.append(decision)
    if plan is None:
        if weights is None:
            raise EngineError("TensorRT needs the weights to build its plan", hint="Load the plan with weights=...")
        plan = _build(found, compiled, weights, profile, options)
    return TensorRtBackend(compiled, found, gpu, plan, here, options, tuple(decisions))


def _held_plan(artefact: bytes | None, here: Conditions) -> tuple[bytes | None, Decision]:
    subject, action = "TensorRT plan", "use the one in the plan file"
    held = None if artefact is None else unpack(artefact)
    if held is None:
        reason = "there is none" if artefact is None else "it is damaged"
        return None, Decision(subject, action, Verdict.REJECTED, reason)
    reason_against = obstacle(held[0], here)
    if reason_against is not None:
        return None, Decision(subject, action, Verdict.REJECTED, reason_against)
    return held[1], Decision(subject, action, Verdict.ACCEPTED, "same graph, version, GPU architecture and options")


def _build(
    bindings: Bindings,
    compiled: CompiledModel,
    weights: Mapping[str, Array],
    profile: Profile,
    options: TensorRtOptions,
) -> bytes:
    logger = bindings.logger()
    parsed = parse(bindings, logger, compiled, evaluate(compiled.program, weights))
    return build_plan(bindings, logger, parsed, profile, options)


def _profile_decisions(profile: Profile) -> list[Decision]:
    if not profile.inferred:
        return []
    reason = "nobody gave its sizes; TensorRT refuses sizes outside of the profile"
    return [Decision(name, "profile from the fallback sizes", Verdict.ACCEPTED, reason) for name in profile.inferred]


def _fixed_decisions(options: TensorRtOptions) -> list[Decision]:
    return [
        Decision(
            "versions",
            f"keep {options.twins} on the device, the others beside them",
            Verdict.ACCEPTED,
            "a TensorRT engine holds its weights inside: the first request for a version that lies in none of the "
            f"{options.twins} device engines waits for a refit of the one used least recently",
        ),
        Decision(
            "partial refits",
            "give TensorRT only the weights that changed",
            Verdict.REJECTED,
            "an engine may combine weights, and the list of missing ones is not complete on TensorRT-RTX",
        ),
    ]


class TensorRtBackend(CompiledBackend):
    """A compiled model on one GPU through TensorRT. Thread-safe; make one with ``create``."""

    def __init__(
        self,
        compiled: CompiledModel,
        bindings: Bindings,
        device: Device,
        plan: bytes,
        conditions: Conditions,
        options: TensorRtOptions,
        decisions: tuple[Decision, ...],
    ) -> None:
        if options.twins < 1:
            raise EngineError(f"there must be at least one device engine, not {options.twins}")
        super().__init__("tensorrt", compiled)
        self._device = device
        self._plan, self._conditions = plan, conditions
        self._decisions = decisions
        self._specs = {spec.name: spec for spec in compiled.engine_weights}
        twins = [
            Twin(
                bindings,
                device,
                plan,
                self._specs,
                compiled.outputs,
                host_code=options.version_compatible,
                runtime_cache=options.runtime_cache,
            )
            for _ in range(options.twins)
        ]
        twins[0].open()  # a plan that cannot be loaded or refitted says so now, not at the first refit
        self._pool = TwinPool(twins)

    @property
    def decisions(self) -> Sequence[Decision]:
        """What specialising for this GPU decided, with reasons."""
        return self._decisions

    def artefact(self) -> bytes:
        """TensorRT's plan with what must be the same for it to be used again."""
        return pack(self._conditions, self._plan)

    @property
    def recoverable(self) -> frozenset[str]:
        """Source weights that ``recover`` gives back bit for bit."""
        return frozenset(self._compiled.program.passthrough.values())

    def recover(self, weights: WeightSet, name: str) -> Array:
        """A source weight read back from a weight set (a copy); EngineError for one that is not recoverable."""
        for engine_name, source in self._compiled.program.passthrough.items():
            if source == name:
                return self._to_host(_own(weights).weights[engine_name])
        raise EngineError("the engine's weights do not hold this source weight bit for bit", where=name)

    def derive(
        self,
        sources: Mapping[str, Array | DeviceTensor],
        base: WeightSet | None = None,
        changed: frozenset[str] | None = None,
        inspector: Inspector | None = None,
    ) -> TensorRtWeightSet:
        """A new weight set, already refitted into an idle device engine; see ``Backend.derive``.

        Beside arrays it takes tensors that lie on this GPU: those that are engine weights as they are stay there
        (copied within the device), those that the refit program computes with come to the host first.

        Raises:
            EngineError: the refit failed. The engine that it was tried on is made anew before it is used again; the
                one that answers requests was not touched.
        """
        self._check_open()
        held: dict[str, StoredWeight] = {} if base is None or changed is None else dict(_own(base).weights)
        wanted = affected(self._compiled.program, changed or frozenset()) if held else frozenset(self._specs)
        fresh = self._store(sources, wanted)
        shared = sum(weight.spec.nbytes for name, weight in held.items() if name not in fresh)
        made = {**held, **fresh}
        weights = TensorRtWeightSet({name: made[name] for name in self._specs}, shared)
        self._pool.load(weights, None if base is None else _own(base))
        return weights

    def run(
        self, weights: WeightSet, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run one inference with a weight set; see ``Backend.run``.

        A set that lies in no device engine any more is refitted into one first.
        """
        self._check_open()
        with self._pool.lease(_own(weights)) as twin:
            results = twin.run(inputs)
        return results if outputs is None else {name: results[name] for name in outputs}

    def close(self) -> None:
        """Free the device engines; running afterwards raises EngineError."""
        if not self._closed:
            self._closed = True
            self._device.make_current()
            self._pool.close()

    def _store(self, sources: Mapping[str, Array | DeviceTensor], wanted: frozenset[str]) -> dict[str, StoredWeight]:
        passthrough = self._compiled.program.passthrough
        stored: dict[str, StoredWeight] = {}
        for name in wanted:
            source = sources[passthrough[name]] if name in passthrough else None
            if isinstance(source, DeviceTensor):
                stored[name] = self._store_on_device(self._specs[name], source)
        host = {name: self._as_array(source) for name, source in self._needed(sources, wanted - stored.keys())}
        for name, array in evaluate(self._compiled.program, host, wanted - stored.keys()).items():
            # The caller's array may change later, and a set must stay as it is.
            own = np.array(array, copy=True, order="C") if name in passthrough else np.ascontiguousarray(array)
            stored[name] = StoredWeight(self._specs[name], own.ctypes.data, False, own)
        return stored

    def _needed(
        self, sources: Mapping[str, Array | DeviceTensor], wanted: frozenset[str]
    ) -> list[tuple[str, Array | DeviceTensor]]:
        names = required(self._compiled.program, wanted) if wanted else frozenset()
        return [(name, sources[name]) for name in names if name in sources]

    def _store_on_device(self, spec: TensorSpec, source: DeviceTensor) -> StoredWeight:
        if (source.spec.dtype, source.spec.shape) != (spec.dtype, spec.shape):
            raise EngineError(f"the device tensor is {source.spec}, the engine takes {spec}", where=spec.name)
        buffer = DeviceBuffer(self._device, spec.nbytes)
        self._on_stream(lambda stream: self._device.copy_across(buffer.address, source.address, spec.nbytes, stream))
        return StoredWeight(spec, buffer.address, True, buffer)

    def _as_array(self, source: Array | DeviceTensor) -> Array:
        return self._download(source.spec, source.address) if isinstance(source, DeviceTensor) else source

    def _to_host(self, stored: StoredWeight) -> Array:
        if stored.on_device:
            return self._download(stored.spec, stored.address)
        return np.array(stored.owner, copy=True)

    def _download(self, spec: TensorSpec, address: int) -> Array:
        array: Array = np.empty(spec.static_shape, numpy_dtype(spec.dtype))
        self._on_stream(lambda stream: self._device.copy_out(array, address, stream))
        return array

    def _on_stream(self, enqueue: Callable[[int], None]) -> None:
        stream = self._device.create_stream()
        try:
            enqueue(stream)
            self._device.synchronize(stream)
        finally:
            self._device.destroy_stream(stream)

    def _check_open(self) -> None:
        super()._check_open()
        self._device.make_current()


def _own(weights: WeightSet) -> TensorRtWeightSet:
    if not isinstance(weights, TensorRtWeightSet):
        raise EngineError("the weight set belongs to another engine")
    return weights
