"""A weight set of the ONNX Runtime engine: buffers, and bindings of them to a session."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from copy import copy

import onnxruntime as ort

from onnx_refit.engine.onnxruntime.buffers import Buffer, RackLease
from onnx_refit.engine.onnxruntime.hosts import Lease
from onnx_refit.engine.onnxruntime.native import Binding, Value, has_plain_inputs, has_plain_outputs, run_plain
from onnx_refit.errors import EngineError
from onnx_refit.tensors import Array

_FEW = 24  # weights; fewer are fed anew with each request, more are bound once


class Tiers:
    """When a weight set reaches its last tier: a ``FullSpeed``.

    Args:
        done: whether the first tier is the last.
    """

    def __init__(self, *, done: bool) -> None:
        self._decided = threading.Event()
        self._reached = done
        if done:
            self._decided.set()

    def decide(self, *, reached: bool) -> None:
        """The last tier was reached, or never will be."""
        self._reached = reached
        self._decided.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until full speed, or for ``timeout`` seconds, or until it is sure never to come; whether it came."""
        self._decided.wait(timeout)
        return self._reached

    def done(self) -> bool:
        """Whether full speed was reached."""
        return self._reached


# Those of sets that have one tier: nobody waits for them, and they take as long to make as a small model's refit.
_REACHED = Tiers(done=True)
_ANSWERED = threading.Event()
_ANSWERED.set()


class Runner:
    """A session with the weights of one set bound to it. Thread-safe.

    A binding serves one request at a time, so there is a stack of idle ones: as many as requests were ever in flight
    together.

    Args:
        session: the session.
        weights: the weights that are inputs of it.
        outputs: the outputs to compute.
    """

    def __init__(self, session: ort.InferenceSession, weights: Mapping[str, Buffer], outputs: Sequence[str]) -> None:
        self.session = session
        self._values: dict[str, Value] = {name: buffer.storage.value for name, buffer in weights.items()}
        self._arrays = {name: buffer.array for name, buffer in weights.items()}
        self.outputs = tuple(outputs)
        self._plain = len(weights) <= _FEW and has_plain_inputs(session) and has_plain_outputs(session)
        self._idle: list[Binding] = []

    def renewed(self, session: ort.InferenceSession, weights: Mapping[str, Buffer]) -> Runner:
        """One of the same model with these of the weights replaced, made without a look at the others."""
        made = copy(self)
        made.session = session
        made._values = self._values | {name: buffer.storage.value for name, buffer in weights.items()}
        made._arrays = self._arrays | {name: buffer.array for name, buffer in weights.items()}
        made._idle = []
        return made

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Run one inference; EngineError where ONNX Runtime fails."""
        if self._plain:
            return run_plain(self.session, self.outputs, {**self._arrays, **inputs})
        try:
            binding = self._idle.pop()
        except IndexError:
            binding = Binding(self.session, self._values, self.outputs)
        try:
            # Not given back after a failure: what it then holds is unknown.
            results = binding.run(inputs.items())
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise EngineError(f"ONNX Runtime failed: {error}") from error
        self._idle.append(binding)
        return results


class OnnxRuntimeWeightSet:
    """One immutable set of engine weights, with what runs it. Thread-safe.

    Attributes:
        first: what runs it at first.
        runner: what runs it now.
        hosted: see below.
        answered: set once it has answered a request, or nobody asks.

    Args:
        buffers: every engine weight; None where they are just those of the rack and of the session.
        nbytes: bytes of them all.
        shared_nbytes: bytes of those that another set has too.
        runner: what runs it at first.
        dead: takes the promoted runner when the set dies; None where there is only one tier.
        racked: the lease of the rack that buffers are in; None where each has an owner.
        hosted: the lease of the session that holds some of them itself; None where none does.
    """

    def __init__(
        self,
        buffers: Mapping[str, Buffer] | None,
        nbytes: int,
        shared_nbytes: int,
        runner: Runner,
        dead: list[object] | None,
        racked: RackLease | None = None,
        hosted: Lease | None = None,
    ) -> None:
        self._buffers = buffers
        self._racked = racked
        self.hosted = hosted
        self.first = self.runner = runner
        self._nbytes = nbytes
        self._shared = shared_nbytes
        self._tiers = _REACHED if dead is None else Tiers(done=False)
        self._dead = dead
        self._promoted = False
        self.answered = _ANSWERED if dead is None else threading.Event()

    def __del__(self) -> None:
        # Taking a session apart takes longer than a refit, and whoever publishes the next set would have to wait for
        # it. Appending is atomic: this runs in any thread, where no lock may be taken. The buffers go back at once,
        # since nobody runs the session any more.
        if self._promoted and self._dead is not None:
            self._dead.append(self.runner)

    @property
    def nbytes(self) -> int:
        """Bytes of all its engine weights, shared ones included."""
        return self._nbytes

    @property
    def shared_nbytes(self) -> int:
        """Bytes shared with the set it was derived from."""
        return self._shared

    @property
    def full_speed(self) -> Tiers:
        """When this set reaches its last tier of speed."""
        return self._tiers

    @property
    def buffers(self) -> Mapping[str, Buffer]:
        """Engine weight -> buffer."""
        if self._buffers is None:
            assert self._racked is not None
            held: Mapping[str, Buffer] = {} if self.hosted is None else self.hosted.host.buffers
            self._buffers = {**held, **self._racked.rack.buffers}
        return self._buffers

    def again(self) -> OnnxRuntimeWeightSet:
        """Another one of the same weights: it shares all, so that a rack stays whole."""
        return OnnxRuntimeWeightSet(
            self._buffers, self._nbytes, self._nbytes, self.first, self._dead, self._racked, self.hosted
        )

    def share(self) -> None:
        """Let its buffers live on in a set that shares some of them."""
        if self._racked is not None:
            self._racked.share()

    def values(self) -> dict[str, Value]:
        """Engine weight -> value."""
        return {name: buffer.storage.value for name, buffer in self.buffers.items()}

    def promote(self, session: ort.InferenceSession | None) -> None:
        """Run on this session from now on, which holds the weights itself; None: it will never come."""
        if session is not None:
            self.runner = Runner(session, {}, self.first.outputs)
            self.first = self.first.renewed(self.first.session, {})  # without the bindings, which hold memory
            self._promoted = True
        self._tiers.decide(reached=session is not None)

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Run one inference; outputs in the model's order; EngineError where ONNX Runtime fails."""
        results = self.runner.run(inputs)
        if self._dead is not None and not self.answered.is_set():
            self.answered.set()
        return results
