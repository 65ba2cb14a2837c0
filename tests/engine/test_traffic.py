"""A refit's work is done by those who bring requests, or beside them, or at full speed: all of it, once, and by nobody
once the refit has ended, however it ends."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

import onnx_refit
from onnx_refit.engine.onnxruntime import backend as backends
from onnx_refit.engine.onnxruntime import traffic as module
from onnx_refit.engine.onnxruntime.batch import Ready
from onnx_refit.engine.onnxruntime.traffic import Shared, Traffic
from onnx_refit.errors import EngineError
from onnx_refit.moves.library import Library, load

from .test_pace import large
from .zoo import model, n, weight

found = load()
pytestmark = pytest.mark.skipif(not isinstance(found, Library), reason="no native code was compiled")


@dataclass
class Noting:
    """The native code, and who called what."""

    calls: list[tuple[str, int]] = field(default_factory=list)

    @property
    def library(self) -> Library:
        assert isinstance(found, Library)
        calls: dict[str, Any] = {name: self._noting(name) for name in ("work", "pace", "share")}
        return replace(found, **calls)

    def _noting(self, name: str) -> Callable[..., Any]:
        def call(*arguments: int) -> Any:
            self.calls.append((name, threading.get_ident()))
            return getattr(found, name)(*arguments)

        return call


@dataclass
class Carrying:
    """A refit that waits in a thread of its own."""

    traffic: Traffic
    ready: Ready
    library: Library
    errors: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._carry)
        self.thread.start()

    def _carry(self) -> None:
        try:
            self.traffic.carry(self.library, self.ready)
        except BaseException as error:  # noqa: BLE001  the test looks at it
            self.errors.append(error)

    def shared(self) -> Shared:
        """What it gives to requests, once it does."""
        while (shared := self.traffic._shared) is None:
            assert self.thread.is_alive(), self.errors
        return shared

    def join(self) -> None:
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", math.inf)


@pytest.mark.usefixtures("patient")
def test_requests_do_the_work_of_a_refit_that_has_no_core() -> None:
    noting = Noting()
    _, ready, storage, values, _ = large()
    traffic = Traffic(threads=2, cores=2)
    traffic._usual = 1.0
    traffic.begin("request")
    refit = Carrying(traffic, ready, noting.library)
    refit.shared()
    while refit.thread.is_alive():
        traffic.begin("another")
        traffic._flying["another"] -= 1e-3  # that was long enough for a unit
        traffic.done("another")
    refit.join()
    assert not refit.errors
    assert set(noting.calls) == {("share", threading.get_ident())}
    np.testing.assert_array_equal(storage.flat, values)
    assert traffic._shared is None


def test_short_requests_work_once_their_shares_make_up_for_a_unit() -> None:
    noting = Noting()
    _, ready, *_ = large()
    shared = Shared(noting.library, ready, 0.125, 1.0)
    for worked in (0, 0, 0, 1):
        shared.help(2.0)
        assert shared.helped == worked
    assert ready.units - noting.library.left(ready.address) >= 1


def test_long_requests_work_no_longer_than_their_share() -> None:
    noting = Noting()
    _, ready, *_ = large()
    shared = Shared(noting.library, ready, 1e-6, 1e-9)
    shared.help(1.0)  # a microsecond, which is less than a unit
    assert noting.library.left(ready.address) == ready.units - 1
    assert not shared.done.is_set()


def test_a_refit_goes_on_alone_when_no_request_comes_any_more() -> None:
    noting = Noting()
    _, ready, storage, values, _ = large()
    traffic = Traffic(threads=2, cores=2)
    traffic.begin("request")
    refit = Carrying(traffic, ready, replace(noting.library, pace=lambda *_: None))
    refit.shared()
    traffic.end("request")
    refit.join()
    assert not refit.errors
    assert set(noting.calls) == {("share", refit.thread.ident)}
    np.testing.assert_array_equal(storage.flat, values)


@pytest.mark.parametrize(("threads", "cores"), [(2, 2), (1, 2)])
def test_a_refit_works_slowly_beside_a_request_that_does_not_end(threads: int, cores: int) -> None:
    noting = Noting()
    _, ready, storage, values, _ = large()
    traffic = Traffic(threads, cores)
    traffic.begin("request")
    traffic.carry(noting.library, ready)
    assert set(noting.calls) == {("pace", threading.get_ident())}
    np.testing.assert_array_equal(storage.flat, values)


def test_requests_leave_a_core_or_none_as_many_as_they_are() -> None:
    traffic = Traffic(threads=1, cores=2)
    crowded = [traffic.crowded]
    for change, request in ((traffic.begin, "one"), (traffic.begin, "two"), (traffic.end, "one")):
        change(request)
        crowded.append(traffic.crowded)
    assert crowded == [False, False, True, False]


def test_whoever_brought_the_last_request_does_not_bring_another_one_while_it_refits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_RECENT", math.inf)
    traffic = Traffic(threads=1, cores=2)
    flows = []
    for change in (traffic.begin, traffic.end):
        change("mine")
        flows.append(traffic.flows)
    assert flows == [True, False]

    def request() -> None:
        traffic.begin("another's")
        traffic.end("another's")

    thread = threading.Thread(target=request)
    thread.start()
    thread.join()
    assert traffic.flows
    traffic.end("one that an interrupt kept from beginning")


@pytest.mark.usefixtures("patient")
def test_after_an_interrupt_nobody_works_on_what_was_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit in hand is waited for; the refit's memory may be given up at once."""
    assert isinstance(found, Library)
    _, ready, storage, values, units = large()
    traffic = Traffic(threads=2, cores=2)
    traffic._usual = 1.0
    traffic.begin("request")
    shares: list[Shared] = []

    def interrupted(self: threading.Event, timeout: float | None = None) -> bool:
        assert traffic._shared is not None
        shares.append(traffic._shared)
        shares[0]._unit = 0.0
        shares[0].help(0.0)  # a unit
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Event, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        traffic.carry(found, ready)
    assert traffic._shared is None
    assert found.left(ready.address) == units - 1
    before = storage.flat.copy()
    storage.flat[:] = -1
    shares[0].help(1.0)  # of a request that took hold of it before
    assert (storage.flat == -1).all()
    assert not np.array_equal(before, values)


def _crowded(monkeypatch: pytest.MonkeyPatch) -> onnx_refit.Engine:
    monkeypatch.setattr(backends, "usable_cores", lambda: 2)
    rng = np.random.default_rng(0)
    made = model([n("MatMul", "x w", "y")], [("x", ["M", 512])], [("y", None)], [weight(rng, "w", 512, 1024)])
    options = onnx_refit.EngineOptions(2)
    return onnx_refit.load(onnx_refit.build(made, options=onnx_refit.BuildOptions(engine=options)), options=options)


def test_requests_and_refits_beside_each_other_answer_with_whole_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"x": np.ones((1, 512), np.float32)}
    sets = [{"w": np.full((512, 1024), value, np.float32)} for value in (1, 2)]
    with _crowded(monkeypatch) as engine:
        engine.refit(sets[1])
        over = threading.Event()
        wrong: list[object] = []

        def client() -> None:
            while not over.is_set():
                answer = engine.run(inputs)
                if not np.array_equal(answer["y"], np.full((1, 1024), 512 * (2 - answer.version % 2), np.float32)):
                    wrong.append(answer)

        clients = [threading.Thread(target=client) for _ in range(2)]
        for thread in clients:
            thread.start()
        try:
            for turn in range(20):
                version = engine.refit(sets[turn % 2]).version
                assert version % 2 == (turn + 1) % 2  # so that a version tells its weights
        finally:
            over.set()
            for thread in clients:
                thread.join(30)
        assert not wrong


def test_a_request_that_fails_is_no_traffic_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with _crowded(monkeypatch) as engine:
        backend = engine._backend
        assert isinstance(backend, backends.OnnxRuntimeBackend)
        with pytest.raises(EngineError):
            backend.run(engine._versions.current.weights, {})
        assert not backend._traffic.flows
