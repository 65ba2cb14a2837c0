"""The ONNX Runtime engine: one session with the weights as graph inputs, any number of weight sets to run it with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

import onnx
import onnxruntime as ort

from onnx_refit.engine.base import CompiledBackend
from onnx_refit.engine.onnxruntime.artefact import dump, host_key, load
from onnx_refit.engine.onnxruntime.blocked import block_size
from onnx_refit.engine.onnxruntime.buffers import Buffer, BufferPool, Storage
from onnx_refit.engine.onnxruntime.derive import Deriver
from onnx_refit.engine.onnxruntime.empty import EmptyProducts
from onnx_refit.engine.onnxruntime.hosts import HostPool, Lease, NoHostError, loose
from onnx_refit.engine.onnxruntime.native import make_session, session_options, usable_cores
from onnx_refit.engine.onnxruntime.options import OnnxRuntimeOptions
from onnx_refit.engine.onnxruntime.recover import Recoverer
from onnx_refit.engine.onnxruntime.recurrence import deadly_extents, refuse_empty
from onnx_refit.engine.onnxruntime.specialise import Specialised, specialise
from onnx_refit.engine.onnxruntime.tiers import SecondTier
from onnx_refit.engine.onnxruntime.traffic import Traffic
from onnx_refit.engine.onnxruntime.weightset import OnnxRuntimeWeightSet, Runner
from onnx_refit.engine.protocol import Inspector, WeightSet
from onnx_refit.errors import EngineError
from onnx_refit.moves.library import Absent, Library
from onnx_refit.moves.library import load as load_moves
from onnx_refit.plan.compiled import CompiledModel, Decision, Verdict
from onnx_refit.tensors import Array, TensorSpec

_NOWHERE_ELSE: Mapping[str, Storage] = {}  # always the same: what is prepared for it is recognised by it


def create(
    compiled: CompiledModel,
    weights: Mapping[str, Array] | None = None,
    options: OnnxRuntimeOptions = OnnxRuntimeOptions(),  # noqa: B008 (frozen)
    artefact: bytes | None = None,
) -> OnnxRuntimeBackend:
    """A backend for a compiled model on this host.

    Args:
        compiled: the portable engine.
        weights: source weights, where at hand; the engine needs none to specialise.
        options: what the user chose.
        artefact: what ``artefact()`` of an earlier backend gave; used if it was made for this very host and model.

    Raises:
        EngineError: ONNX Runtime cannot run the model.
    """
    key = host_key(compiled, optimise=options.optimise, in_place=options.in_place)
    specialised = None if artefact is None else load(artefact, key)
    try:
        if specialised is None:
            return OnnxRuntimeBackend(compiled, specialise(compiled, options), options, key)
        backend = OnnxRuntimeBackend(compiled, specialised, options, key)
        backend.prepare()  # what was proved when the artefact was made need not hold in this process
        return backend
    except NoHostError as error:  # no temporary folder, say
        other = replace(options, in_place=False)
        key = host_key(compiled, optimise=options.optimise, in_place=False)
        specialised = specialise(compiled, other)
        decision = Decision("weights that kernels pack", "write them packed, in place", Verdict.REJECTED, error.message)
        specialised = replace(specialised, decisions=(*specialised.decisions, decision))
        return OnnxRuntimeBackend(compiled, specialised, other, key)


class OnnxRuntimeBackend(CompiledBackend):
    """A compiled model on this host's processor. Thread-safe; make one with ``create``."""

    def __init__(
        self, compiled: CompiledModel, specialised: Specialised, options: OnnxRuntimeOptions, key: str
    ) -> None:
        super().__init__("onnxruntime", compiled)
        # A parsed graph takes ten times its bytes, and is hardly ever looked at again.
        self._graph = specialised.model.SerializeToString()
        self._specialised = replace(specialised, model=onnx.ModelProto())
        sources = {source.spec.name: source.spec for source in compiled.sources}
        self._specs = {name: recipe.spec for name, recipe in specialised.buffers.items()}
        self._nbytes = sum(spec.nbytes for spec in self._specs.values())
        self._hosts: HostPool | None = None
        if specialised.packed is not None:
            self._hosts = HostPool(specialised.model, specialised.packed, options.threads)
        own: Mapping[str, TensorSpec] = {} if self._hosts is None else self._hosts.specs
        threads = options.threads or usable_cores()
        self._traffic = Traffic(threads, usable_cores())
        block = block_size()
        library = load_moves()
        self._deriver = Deriver(specialised, compiled.program.model, sources, block, threads, library)
        self._moving = _moved(library, self._deriver.moved, len(specialised.buffers))
        pooled = [spec for name, spec in self._specs.items() if name not in own]
        self._pool = BufferPool(pooled, self._deriver.rest)
        self._recoverer = Recoverer(specialised, sources)
        self._session: ort.InferenceSession | None = None
        if self._hosts is None:
            self._session = make_session(self._graph, session_options(options.threads))
        self._outputs = tuple(spec.name for spec in compiled.outputs)
        self._key = key
        self._second: SecondTier | None = None
        # Each session reads its own weights; what only the second tier reads is no input of the first one's session.
        weights = frozenset(value.name for value in specialised.model.graph.input) - {s.name for s in compiled.inputs}
        self._read = weights & (self._specs.keys() - own.keys())
        self._empty = EmptyProducts(self._graph, weights, self._outputs, block, options.threads)
        self._deadly = deadly_extents(compiled.activation, compiled.inputs)
        if specialised.second is not None:
            self._second = SecondTier(specialised.second, self._specs, options.threads)

    def prepare(self) -> None:
        """Make what the first weights need; NoHostError where sessions with writable weights cannot be made."""
        if self._hosts is not None:
            self._hosts.prepare()

    @property
    def decisions(self) -> Sequence[Decision]:
        """What specialising for this host decided, with reasons."""
        return (*self._specialised.decisions, self._moving)

    def artefact(self) -> bytes | None:
        """The host specialisation, to give to ``create`` again on the same host."""
        return dump(replace(self._specialised, model=self.graph), self._key)

    @property
    def graph(self) -> onnx.ModelProto:
        """The graph that its first session runs, parsed anew."""
        model: onnx.ModelProto = onnx.ModelProto.FromString(self._graph)
        return model

    def required(self, changed: frozenset[str]) -> frozenset[str]:
        """The source weights that deriving every engine weight which reads one of ``changed`` needs."""
        needed: set[str] = set()
        for name in self._deriver.affected(changed):
            needed |= self._deriver.needed_for(name)
        return frozenset(needed)

    @property
    def recoverable(self) -> frozenset[str]:
        """Source weights that ``recover`` gives back bit for bit."""
        return self._recoverer.names

    @property
    def neighbours(self) -> Sequence[str]:
        """See ``Backend.neighbours``."""
        return self._deriver.neighbours

    def recover(self, weights: WeightSet, name: str) -> Array:
        """A source weight read back from a weight set (a new array); EngineError where it is not recoverable."""
        buffers = _own(weights).buffers
        return self._recoverer.recover(name, lambda key: buffers[key].array)

    def derive(
        self,
        sources: Mapping[str, Array],
        base: WeightSet | None = None,
        changed: frozenset[str] | None = None,
        inspector: Inspector | None = None,
    ) -> OnnxRuntimeWeightSet:
        """A new weight set from source weights; see ``Backend.derive``."""
        self._check_open()
        earlier = None if base is None else _own(base)
        self._pool.touch()
        if earlier is None or changed is None:
            made = self._all(sources, inspector)
            renewed: Set[str] = self._specs.keys()
        elif not changed:
            renewed, made = frozenset(), earlier.again()
        else:
            renewed = self._deriver.affected(changed)
            made = self._some(sources, earlier, renewed, inspector)
        if self._second is not None:
            if earlier is not None and earlier.full_speed.done() and not self._second.baked & renewed:
                made.promote(earlier.runner.session)  # it bakes in nothing that changed
            else:
                self._second.ask(made)
        return made

    @property
    def _beside(self) -> Traffic | None:
        """The requests that a refit has to let go first; None where there are none."""
        return self._traffic if self._traffic.flows else None

    def _all(self, sources: Mapping[str, Array], inspector: Inspector | None) -> OnnxRuntimeWeightSet:
        """A weight set of which everything is new."""
        lease = None if self._hosts is None else self._hosts.take()
        racked = self._pool.take_all()
        rack, session = racked.rack, self._session
        if lease is None:
            self._deriver.derive_all(sources, rack, _NOWHERE_ELSE, inspector, self._beside)
        else:
            session = lease.host.session
            self._deriver.derive_all(sources, rack, lease.host.storages, inspector, self._beside)
            lease.settle(lease.host.storages)
        runner = rack.runner
        if runner is None or runner.session is not session:  # a rack mostly meets the same session again
            read = {name: buffer for name, buffer in rack.buffers.items() if name in self._read}
            assert session is not None  # there are hosts where there is no session of all
            runner = Runner(session, read, self._outputs)
            if self._second is None:  # which keeps no bindings once it runs
                rack.runner = runner
        return OnnxRuntimeWeightSet(None, self._nbytes, 0, runner, self._dead, racked, lease)

    def _some(
        self, sources: Mapping[str, Array], earlier: OnnxRuntimeWeightSet, renew: Set[str], inspector: Inspector | None
    ) -> OnnxRuntimeWeightSet:
        """A weight set that shares all but some buffers with an earlier one; nothing here looks at each of these."""
        lease = self._lease(earlier, renew)
        hosted: Mapping[str, Buffer] = {} if lease is None else lease.host.buffers
        fresh = {n: hosted[n] if n in hosted else self._pool.take(self._specs[n]) for n in renew}
        targets = {name: buffer.storage for name, buffer in fresh.items()}
        self._deriver.derive(sources, targets, inspector, beside=self._beside)
        if lease is not None:
            lease.settle(hosted.keys() & renew)
        made = {**hosted, **fresh}
        read = {name: buffer for name, buffer in made.items() if name in self._read}
        earlier.share()
        buffers = {**earlier.buffers, **made}
        lease = lease or earlier.hosted
        runner = earlier.first.renewed(lease.host.session if lease else earlier.first.session, read)
        shared = self._nbytes - sum(buffer.spec.nbytes for buffer in made.values())
        return OnnxRuntimeWeightSet(buffers, self._nbytes, shared, runner, self._dead, hosted=lease)

    @property
    def _dead(self) -> list[object] | None:
        return None if self._second is None else self._second.dead

    def _lease(self, earlier: OnnxRuntimeWeightSet, renew: Set[str]) -> Lease | None:
        """A session to write these engine weights into, with the others that it holds; None where none changes."""
        if self._hosts is None or not self._hosts.specs.keys() & renew:
            return None
        lease = self._hosts.take()
        left = self._hosts.specs.keys() - renew
        if left and earlier.hosted is not None:
            lease.host.copy(left, earlier.hosted.host)
        return lease

    def run(
        self, weights: WeightSet, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run one inference with a weight set; see ``Backend.run``."""
        if self._closed:
            self._check_open()
        own = _own(weights)
        if self._deadly:
            refuse_empty(self._deadly, inputs)
        request, traffic = object(), self._traffic
        try:
            traffic.begin(request)
            values = own.run(inputs)
            traffic.done(request)
        except BaseException as error:
            traffic.end(request)
            if not isinstance(error, EngineError) or not self._empty.concerns(error):
                raise
            values = self._empty.run(self._plain(own.buffers), inputs)
        results = dict(zip(self._outputs, values, strict=True))
        return results if outputs is None else {name: results[name] for name in outputs}

    def _plain(self, buffers: Mapping[str, Buffer]) -> Mapping[str, Buffer]:
        """The weights that a graph without packed ones reads."""
        packed = self._specialised.packed
        if packed is None:
            return buffers
        flat = {name: buffer.storage.flat for name, buffer in buffers.items()}
        return {**buffers, **{spec.name: loose(spec, packed.unpacked(spec, flat)) for spec in packed.specs}}

    def close(self) -> None:
        """End the threads and free the spare buffers; running afterwards raises EngineError."""
        self._closed = True
        if self._hosts is not None:
            self._hosts.close()
        if self._second is not None:
            self._second.close()
        self._deriver.close()
        self._pool.close()


def _moved(library: Library | Absent, moved: int, every: int) -> Decision:
    """Whether refits run in native code."""
    subject, action = "refits", "move weights by native code"
    if isinstance(library, Absent):
        return Decision(subject, action, Verdict.REJECTED, f"{library.reason}; Python does it a few times slower")
    return Decision(subject, action, Verdict.ACCEPTED, f"{moved} of {every} engine weights are only moved or scaled")


def _own(weights: WeightSet) -> OnnxRuntimeWeightSet:
    if not isinstance(weights, OnnxRuntimeWeightSet):
        raise EngineError("the weight set belongs to another engine")
    return weights
