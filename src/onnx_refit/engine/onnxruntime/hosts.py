"""Sessions whose packed weights can be written: a refit of a recurrent model needs no new session, and no second tier.

A session is created over a file of packed weights (``packed``), which ONNX Runtime maps privately into memory. The
mapping is found by the file's name, which no other session has. A weight set leases a whole session, nobody else runs
it, and it goes to the next weight set once the last request is through with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from onnx_refit.engine.onnxruntime.buffers import Buffer, Storage
from onnx_refit.engine.onnxruntime.native import PROVIDERS, owned, public_value, session_options
from onnx_refit.engine.onnxruntime.packed import Packed, external
from onnx_refit.errors import EngineError
from onnx_refit.expected import Expected
from onnx_refit.plan.trace.recipes import evaluate
from onnx_refit.tensors import Array, TensorSpec

_FILE = "weights.bin"
_PAGE = 4096
_SPARE_SECONDS = 3.0
_SPIN = 300  # microseconds: once another session answers, this one's threads only take the core that it needs
_PATIENCE = 1.0  # seconds that a dying version has to leave its session to the next one
_SPARES = 2
_FIRST = 3
_MADV_DONTNEED = 4


class NoHostError(EngineError):
    """No session with writable packed weights can be made here."""


class HostStorage(Storage):
    """Memory inside a session, or beside it, for one of its weights."""

    __slots__ = ()

    def __init__(self, spec: TensorSpec, flat: Array) -> None:
        self.spec = spec
        self.flat = flat
        self.array = flat.reshape(spec.static_shape)
        self.value, self._owner = owned(self.array)
        self.address = self.flat.ctypes.data
        self.prepared = None
        self.steady = None
        self.settled = True


class Host:
    """A session and the memory of the weights that it holds itself. One weight set at a time.

    Attributes:
        session: the session.
        storages: packed tensor or adopted weight -> its memory, valid as long as the session.
        buffers: the same as buffers; the session goes back whole, so they have no owners.
        content: for each of them, what is written there: equal objects mean equal bytes.
    """

    def __init__(self, session: ort.InferenceSession, storages: Mapping[str, HostStorage]) -> None:
        self.session = session
        self.storages = storages
        self.buffers: Mapping[str, Buffer] = {name: Buffer(storage, None) for name, storage in storages.items()}
        self.content: dict[str, object] = {}

    def copy(self, names: Iterable[str], other: Host) -> None:
        """Take over weights of another session, where they differ."""
        for name in names:
            token = other.content[name]
            if self.content.get(name) is not token:
                np.copyto(self.storages[name].flat, other.storages[name].flat)
                self.content[name] = token


def loose(spec: TensorSpec, array: Array) -> Buffer:
    """An array as a buffer of its own."""
    storage = Storage(spec)
    np.copyto(storage.array, array)
    return Buffer(storage, None)


class Lease:
    """A host while weight sets have it; the pool gets it back when none has the lease any more."""

    def __init__(self, host: Host, pool: HostPool) -> None:
        self.host = host
        self._spare, self._dead = pool.spare, pool.dead
        self.settled = False
        """Whether all its weights are written and no thread writes any more."""

    def settle(self, renewed: Iterable[str]) -> None:
        """Note that these were written, and that all of them are whole."""
        token = object()
        self.host.content.update(dict.fromkeys(renewed, token))
        self.settled = True

    def __del__(self) -> None:
        # In any thread: no lock may be taken here. Sessions take long to take apart: the pool's thread does it.
        if self.settled and len(self._spare) < _SPARES:
            self._spare.append(self.host)
        else:
            self._dead.append(self.host)


class HostPool:
    """Makes hosts, and gives those of dead weight sets to new ones. Thread-safe.

    There are as many at once as two versions and a refit take, and later a spare one is there or being made: a refit
    does not wait for a session. What spare ones hold is given back to the system when no refit is expected any more.

    Args:
        model: the graph; its weights are graph inputs.
        packed: those that its kernels pack.
        threads: intra-op threads of the sessions.

    Raises:
        NoHostError: this system does not let a session's weights be found.
    """

    def __init__(self, model: onnx.ModelProto, packed: Packed, threads: int) -> None:
        if sys.platform != "linux":
            raise NoHostError("the memory of a file's mapping is found on Linux only")
        self.specs = {b.name: b.recipe.spec for b in packed.blocks} | {spec.name: spec for spec in packed.adopted}
        self.spare: list[Host] = []
        self.dead: list[Host] = []
        self._model = model
        self._packed = packed
        self._threads = threads
        self._numbers = itertools.count()
        self._changed = threading.Event()
        self._expected = Expected()
        self._janitor: threading.Thread | None = None
        self.closed = False
        self._lock = threading.Lock()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._places: Mapping[str, int] = {}

    def prepare(self) -> None:
        """Make the first hosts, unless that is done.

        In the caller's thread: what a session needs only while it is made stays in the C library's memory, which each
        thread has of its own.

        Raises:
            NoHostError: none can be made here.
        """
        if self._folder is None:
            self.spare += [self.make() for _ in range(_FIRST)]

    def _write(self) -> Path:
        """The folder of the files that sessions are made from; written if it is not there (any more)."""
        with self._lock:
            folder = None if self._folder is None else Path(self._folder.name)
            if folder is None or not (folder / _FILE).exists():  # new, or somebody tidied the temporary folder
                try:
                    self._folder = tempfile.TemporaryDirectory(prefix="onnx-refit-")
                    folder = Path(self._folder.name)
                    self._places = _write(self._model, self._packed, folder)
                except OSError as error:
                    raise NoHostError(f"no packed weights can be written to a temporary file ({error})") from error
            return folder

    def take(self) -> Lease:
        """A host nobody uses; what it holds is anything.

        Raises:
            NoHostError: there is no spare one, and none can be made.
        """
        self.prepare()
        try:
            host = self.spare.pop()
        except IndexError:
            host = self.make()
        self._expected.note(_SPARE_SECONDS)
        if self._janitor is None:
            self._janitor = threading.Thread(
                target=_attend, args=(weakref.ref(self), self._changed), name="onnx-refit-hosts", daemon=True
            )
            self._janitor.start()
        if not self._changed.is_set():
            self._changed.set()
        return Lease(host, self)

    def make(self) -> Host:
        """A new host; NoHostError where ONNX Runtime does not map the file."""
        folder = self._write()
        own = folder / str(next(self._numbers))
        adopted = {spec.name: HostStorage(spec, np.zeros(spec.size, np.float32)) for spec in self._packed.adopted}
        options = session_options(self._threads, spin=_SPIN)
        for name, storage in adopted.items():
            options.add_initializer(name, public_value(storage.value))
        try:
            own.mkdir()
            for name in ("model.onnx", _FILE):
                os.link(folder / name, own / name)
            session = ort.InferenceSession(str(own / "model.onnx"), options, providers=PROVIDERS)
            mapped = _mapped(own / _FILE)
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise NoHostError(f"no session can be made over packed weights: {error}") from error
        finally:
            for name in ("model.onnx", _FILE):
                (own / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                own.rmdir()
        storages = {}
        for block in self._packed.blocks:
            spec = block.recipe.spec
            storages[block.name] = HostStorage(spec, _view(mapped, self._places[block.name], spec))
        return Host(session, {**storages, **adopted})

    def attend(self) -> None:
        """Have one spare host, and take apart what is dead."""
        self.dead.clear()
        if not self.spare and not self.closed:
            with contextlib.suppress(NoHostError):  # the refit that needs it will say so
                self.spare.append(self.make())

    def seconds_left(self) -> float:
        """Until what spare hosts hold is given back."""
        return self._expected.seconds_left()

    def cool(self) -> None:
        """Keep no memory of spare hosts' packed weights."""
        hosts = []
        with contextlib.suppress(IndexError):
            while True:
                hosts.append(self.spare.pop())
        for host in hosts:
            if host.content:
                host.content.clear()
                for block in self._packed.blocks:
                    _forget(host.storages[block.name].flat)
            self.spare.append(host)
        self.dead.clear()

    def close(self) -> None:
        """Give everything back that no weight set has."""
        self.closed = True
        self._changed.set()
        self.spare.clear()
        self.dead.clear()
        with self._lock:
            if self._folder is not None:
                self._folder.cleanup()


def _attend(reference: weakref.ref[HostPool], changed: threading.Event) -> None:
    """Look after a pool some time after each change, as long as it lives."""
    # No lower priority: a session's own threads would inherit it.
    while True:
        changed.wait(timeout=60.0)
        pool = reference()
        if pool is None or pool.closed:
            return
        quiet = not changed.is_set()
        changed.clear()
        if not quiet:
            del pool
            time.sleep(_PATIENCE)
            pool = reference()
            if pool is None or pool.closed:
                return
            pool.attend()
            left = pool.seconds_left()
            del pool
            if changed.wait(max(0.0, left)):
                continue
            pool = reference()
            if pool is None or pool.closed:
                return
        pool.cool()
        del pool


def _write(model: onnx.ModelProto, packed: Packed, folder: Path) -> dict[str, int]:
    """The graph and its coded weights, plain and packed; where each packed tensor begins in the file."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    kept = [value for value in graph.input if value.name not in packed.weights]
    del graph.input[:]
    graph.input.extend(kept)
    places: dict[str, int] = {}
    end = 0
    with (folder / _FILE).open("wb") as file:

        def put(array: Array) -> int:
            nonlocal end
            begin = end
            file.seek(begin)
            file.write(array.data)
            end = -(-(begin + array.nbytes) // _PAGE) * _PAGE
            return begin

        for spec, coded in packed.codes():
            tensor = external(graph, spec, _FILE, put(coded))
            flat = coded.reshape(-1)
            blocks = [block for block in packed.blocks if block.weight == spec.name]
            for number, key in enumerate(dict.fromkeys(block.key for block in blocks)):
                entry = key
                for block in blocks:
                    if block.key == key:
                        places[block.name] = put(evaluate(block.recipe, {spec.name: flat}.__getitem__))
                        entry += f"|{places[block.name]};{block.recipe.spec.nbytes};0"
                tensor.external_data.add(key=f"prepacked_{number}", value=entry)
        for spec in packed.adopted:
            external(graph, spec, _FILE, 0)
            end = max(end, spec.nbytes)
        file.truncate(end)
    (folder / "model.onnx").write_bytes(changed.SerializeToString())
    return places


def _mapped(path: Path) -> list[tuple[int, int, int]]:
    """(first offset in the file, past the last, address) of each private, writable mapping of a file."""
    found = []
    name = os.fsencode(path)
    for line in Path("/proc/self/maps").read_bytes().splitlines():
        if line.endswith(name):
            addresses, access, offset, *_ = line.split(None, 5)
            begin, end = (int(part, 16) for part in addresses.split(b"-"))
            if access == b"rw-p":
                start = int(offset, 16)
                found.append((start, start + end - begin, begin))
    return found


def _view(mapped: Iterable[tuple[int, int, int]], place: int, spec: TensorSpec) -> Array:
    for begin, end, address in mapped:
        if begin <= place and place + spec.nbytes <= end:
            memory = (ctypes.c_char * spec.nbytes).from_address(address + place - begin)
            flat: Array = np.frombuffer(memoryview(memory), np.float32)
            return flat
    raise NoHostError("ONNX Runtime does not map packed weights where they can be written", where=spec.name)


def _forget(flat: Array) -> None:
    """Give the memory of a private mapping back: it reads as the file from now on."""
    address = flat.ctypes.data
    begin = address // _PAGE * _PAGE
    end = -(-(address + flat.nbytes) // _PAGE) * _PAGE
    # Where it fails the memory just stays.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)
