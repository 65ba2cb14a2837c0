"""The adapter's refit logic against a fake of TensorRT's contract, partial failures included."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnx_refit.engine.tensorrt.backend import TensorRtBackend, create
from onnx_refit.engine.tensorrt.device import DeviceTensor
from onnx_refit.engine.tensorrt.options import TensorRtOptions
from onnx_refit.engine.tensorrt.profiles import ShapeRange
from onnx_refit.errors import EngineError
from onnx_refit.plan.compile import compile_model
from onnx_refit.plan.compiled import CompiledModel
from onnx_refit.tensors import Array, spec_of

from .fake import Control, FakeDevice, fake_bindings

X = {"x": np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)}
SHAPES = {"x": ShapeRange((1, 8), (3, 8), (64, 8))}


def model() -> onnx.ModelProto:
    """x[N,8] @ transpose(w0) + b0 @ w1: one computed engine weight, two that are their sources."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Transpose", ["w0"], ["w0t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "w0t"], ["a"]),
        helper.make_node("Add", ["a", "b0"], ["b"]),
        helper.make_node("MatMul", ["b", "w1"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [weight("w0", 16, 8), weight("b0", 16), weight("w1", 16, 4)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def answer(weights: dict[str, Array]) -> Array:
    w0, b0, w1 = (np.asarray(weights[name], np.float32) for name in ("w0", "b0", "w1"))
    result: Array = (X["x"] @ w0.T + b0) @ w1
    return result


class World:
    def __init__(self, **options: object) -> None:
        self.control, self.device = Control(), FakeDevice()
        self.bindings = fake_bindings(self.control)
        compilation = compile_model(model())
        self.compiled: CompiledModel = compilation.compiled
        self.weights = {name: np.array(array) for name, array in compilation.weights.items()}
        self.options = TensorRtOptions(shapes=SHAPES, **options)  # type: ignore[arg-type]

    def create(self, artefact: bytes | None = None, device: FakeDevice | None = None) -> TensorRtBackend:
        return create(
            self.compiled,
            self.weights,
            self.options,
            artefact,
            bindings=self.bindings,
            device=device or self.device,
        )

    def other(self, seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        return {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in self.weights.items()}


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def backend(world: World) -> Iterator[TensorRtBackend]:
    made = world.create()
    yield made
    made.close()


def close_to(backend: TensorRtBackend, weights: object, wanted: Array) -> bool:
    got = backend.run(weights, X)["y"]  # type: ignore[arg-type]
    return bool(np.allclose(got, wanted, rtol=1e-5, atol=1e-5))


def test_live_answers_while_the_twin_is_refitted(world: World, backend: TensorRtBackend) -> None:
    live = backend.derive(world.weights)
    other = world.other(5)
    during: list[bool] = []
    world.control.before_refit = lambda: during.append(close_to(backend, live, answer(world.weights)))
    staged = backend.derive(other, live)
    assert during == [True]
    assert close_to(backend, staged, answer(other))
    assert close_to(backend, live, answer(world.weights))
    assert world.control.refits == 2  # both lie in an engine of their own: no request needed another refit


def test_a_refit_that_fails_half_way_touches_nothing_that_answers(world: World, backend: TensorRtBackend) -> None:
    live = backend.derive(world.weights)
    engines = world.control.engines
    world.control.refits_to_fail = 1
    with pytest.raises(EngineError, match="half way"):
        backend.derive(world.other(5), live)
    assert close_to(backend, live, answer(world.weights))
    other = world.other(6)
    staged = backend.derive(other, live)
    assert close_to(backend, staged, answer(other))
    assert close_to(backend, live, answer(world.weights))
    assert world.control.engines == engines + 2  # the broken one, and the one made anew in its place


def test_a_version_that_lies_nowhere_any_more_is_refitted_again(world: World, backend: TensorRtBackend) -> None:
    sets = [(values, backend.derive(values)) for values in (world.other(seed) for seed in range(3))]
    assert world.control.refits == 3
    for values, weights in reversed(sets):
        assert close_to(backend, weights, answer(values))
    assert world.control.refits == 4  # only the oldest had to be put back
    assert any(d.subject == "versions" for d in backend.decisions)


def test_the_set_that_answers_stays_where_it_is(world: World, backend: TensorRtBackend) -> None:
    live = backend.derive(world.weights)
    staged = [backend.derive(world.other(seed), live) for seed in range(4)]
    refits = world.control.refits
    assert close_to(backend, live, answer(world.weights))
    assert world.control.refits == refits == 1 + len(staged)


def test_a_partial_set_shares_what_did_not_change_and_gives_tensorrt_everything(
    world: World, backend: TensorRtBackend
) -> None:
    live = backend.derive(world.weights)
    other = {**world.weights, "w0": world.weights["w0"] * 2}
    changed = frozenset({"w0"})
    needed = {name: other[name] for name in backend.required(changed)}
    assert set(needed) == {"w0"}
    staged = backend.derive(needed, live, changed)
    assert close_to(backend, staged, answer(other))
    assert staged.shared_nbytes == world.weights["b0"].nbytes + world.weights["w1"].nbytes


def test_sets_do_not_read_the_callers_arrays_later(world: World, backend: TensorRtBackend) -> None:
    values = world.other(1)
    wanted = answer(values)
    weights = backend.derive(values)
    for array in values.values():
        array[...] = 7
    pushed_out_by = [backend.derive(world.other(seed)) for seed in range(2, 5)]
    assert close_to(backend, weights, wanted)
    assert world.control.refits == 2 + len(pushed_out_by)


def test_weights_on_the_device_stay_there(world: World, backend: TensorRtBackend) -> None:
    values = world.other(9)
    there = {name: DeviceTensor(spec_of(name, a), a.ctypes.data, a) for name, a in values.items()}
    wanted = answer(values)
    weights = backend.derive(there)
    assert {name for name, stored in weights.weights.items() if stored.on_device} == {"b0", "w1"}
    values["b0"][...] = 0  # the trainer goes on; the set must not
    assert close_to(backend, weights, wanted)
    assert np.array_equal(backend.recover(weights, "w1"), values["w1"])
    with pytest.raises(EngineError, match="takes"):
        backend.derive({**there, "b0": DeviceTensor(spec_of("b0", values["w1"]), 1, None)})


def test_a_weight_that_cannot_be_refitted_is_an_error_at_once(world: World) -> None:
    world.control.unknown = {"b0"}
    with pytest.raises(EngineError, match="b0"):
        world.create()
    world.control.unknown, world.control.hidden = set(), {"w1"}
    with pytest.raises(EngineError, match="1 of 3 weights: w1"):
        world.create()


def test_the_plan_is_used_again_only_where_it_fits(world: World) -> None:
    first = world.create()
    artefact = first.artefact()
    again = world.create(artefact)
    assert world.control.builds == 1
    assert close_to(again, again.derive(world.weights), answer(world.weights))
    elsewhere = world.create(artefact, FakeDevice((8, 9)))
    assert world.control.builds == 2
    assert any("12.0" in d.reason and "8.9" in d.reason for d in elsewhere.decisions)
    world.bindings = fake_bindings(world.control, version="11.4.0")
    assert any("11.3.0" in d.reason for d in world.create(artefact).decisions)
    assert world.control.builds == 3
    assert any(d.reason == "it is damaged" for d in world.create(b"rubbish").decisions)


def test_a_version_compatible_plan_serves_a_later_version() -> None:
    world = World(version_compatible=True)
    artefact = world.create().artefact()
    world.bindings = fake_bindings(world.control, version="11.4.0")
    world.create(artefact)
    assert world.control.builds == 1
    world.bindings = fake_bindings(world.control, version="11.2.0")
    world.create(artefact)
    assert world.control.builds == 2


def test_requests_of_many_threads_get_the_version_they_asked_for(world: World, backend: TensorRtBackend) -> None:
    """Three versions over two engines: whoever asks gets its own, whatever is refitted meanwhile."""
    sets = [(values, backend.derive(values)) for values in (world.other(seed) for seed in range(3))]
    wrong: list[str] = []

    def ask(index: int) -> None:
        values, weights = sets[index]
        for _ in range(8):
            try:
                if not close_to(backend, weights, answer(values)):
                    wrong.append(f"version {index} got another's answer")
            except Exception as error:  # noqa: BLE001 - a thread's failure must reach the assertion
                wrong.append(repr(error))

    threads = [threading.Thread(target=ask, args=(index % 3,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for seed in range(10, 13):
        backend.derive(world.other(seed), sets[0][1])
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_one_engine_alone_serves_too() -> None:
    world = World(twins=1)
    backend = world.create()
    live = backend.derive(world.weights)
    world.control.refits_to_fail = 1
    with pytest.raises(EngineError):
        backend.derive(world.other(1), live)
    assert close_to(backend, live, answer(world.weights))


def test_a_closed_engine_says_so(world: World, backend: TensorRtBackend) -> None:
    live = backend.derive(world.weights)
    backend.close()
    with pytest.raises(EngineError, match="closed"):
        backend.run(live, X)
    del live
    assert not world.device.memory, "device memory was not given back"


def test_without_weights_there_is_nothing_to_build(world: World) -> None:
    with pytest.raises(EngineError, match="needs the weights"):
        create(world.compiled, None, world.options, bindings=world.bindings, device=world.device)


def test_kernel_timings_are_kept_and_damaged_ones_are_not_trusted(tmp_path: Path) -> None:
    cache = tmp_path / "timings"
    World(timing_cache=cache).create()
    assert cache.read_bytes() == b"timings"
    cache.write_bytes(b"of another GPU")
    World(timing_cache=cache).create()
    assert cache.read_bytes() == b"timings"


def test_compiled_kernels_are_kept_for_the_next_process_and_damaged_ones_are_not_used(tmp_path: Path) -> None:
    cache = tmp_path / "kernels"
    for before in (None, b"of another GPU", b"kernels older"):
        if before is not None:
            cache.write_bytes(before)
        world = World(runtime_cache=cache)
        backend = world.create()
        assert close_to(backend, backend.derive(world.weights), answer(world.weights))
        backend.close()
        kept = cache.read_bytes()
        assert kept == (b"kernels compiled older" if before == b"kernels older" else b"kernels compiled")


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    world = World(runtime_cache=tmp_path / "missing" / "kernels")
    backend = world.create()
    backend.derive(world.weights)
    backend.close()
