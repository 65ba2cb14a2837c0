"""The whole engine on PyTorch's CPU device: weight sets, recordings, buckets, groups, and the transaction on top."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # the tensors are small; many threads on few cores wait for each other

import onnx_refit  # noqa: E402
from onnx_refit.engine.cuda.backend import CudaBackend  # noqa: E402
from onnx_refit.engine.cuda.create import create  # noqa: E402
from onnx_refit.engine.cuda.graphs import Recording, Recordings  # noqa: E402
from onnx_refit.engine.cuda.group import CudaGroup, GroupWeightSet  # noqa: E402
from onnx_refit.engine.cuda.options import CudaOptions, Precision  # noqa: E402
from onnx_refit.engine.registry import EngineOptions  # noqa: E402
from onnx_refit.errors import EngineError  # noqa: E402
from onnx_refit.model.prepare import prepare  # noqa: E402
from onnx_refit.plan.compile import Compilation, compile_model  # noqa: E402
from onnx_refit.tensors import Array  # noqa: E402
from tests.tensorrt.bidaf import random_bidaf  # noqa: E402

from .models import mlp, random_like, rows_that_influence_each_other  # noqa: E402

pytestmark = pytest.mark.torch

RNG = np.random.default_rng(1)


def rows(count: int) -> dict[str, Array]:
    return {"x": RNG.standard_normal((count, 8)).astype(np.float32)}


def wanted(model: onnx.ModelProto, weights: Mapping[str, Any], feeds: Mapping[str, Any]) -> list[Array]:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights[tensor.name], tensor.name))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(changed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results: list[Array] = session.run(None, feeds)
    return results


def made(model: onnx.ModelProto, **options: Any) -> tuple[CudaBackend, dict[str, Array]]:
    compilation = compile_model(model)
    backend = CudaBackend(compilation.compiled, "cpu", CudaOptions(devices=("cpu",), **options))
    return backend, {name: np.array(array) for name, array in compilation.weights.items()}


def same(got: Any, expected: Any) -> bool:
    return bool(np.allclose(got, expected, rtol=1e-4, atol=1e-5))


def assert_close(got: Any, expected: Any, rtol: float, atol: float, name: str = "") -> None:
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol, err_msg=name)


def test_versions_answer_with_their_own_weights_in_any_order() -> None:
    model, x = mlp(), rows(3)
    backend, weights = made(model)
    sets = [(values, backend.derive(values)) for values in (random_like(weights, seed) for seed in range(3))]
    for values, held in [*sets, *reversed(sets), *sets]:
        assert same(backend.run(held, x)["y"], wanted(model, values, x)[0])


def test_a_switch_copies_once_and_only_what_differs() -> None:
    backend, weights = made(mlp())
    first = backend.derive(weights)
    x = rows(2)
    backend.run(first, x)
    whole = backend.runner.live.copied_nbytes
    backend.run(first, x)
    assert backend.runner.live.copied_nbytes == whole, "nothing is copied while the version stays"
    other = {**weights, "b0": weights["b0"] + 1}
    changed = frozenset({"b0"})
    second = backend.derive({name: other[name] for name in backend.required(changed)}, first, changed)
    assert same(backend.run(second, x)["y"], wanted(mlp(), other, x)[0])
    assert backend.runner.live.copied_nbytes - whole == weights["b0"].nbytes
    assert second.nbytes - second.shared_nbytes == weights["b0"].nbytes


def test_a_changed_recipe_is_computed_again() -> None:
    model, x = mlp(), rows(2)
    backend, weights = made(model)
    first = backend.derive(weights)
    other = {**weights, "w0": weights["w0"] * -2}
    second = backend.derive({"w0": other["w0"]}, first, frozenset({"w0"}))
    assert same(backend.run(second, x)["y"], wanted(model, other, x)[0])
    assert same(backend.run(first, x)["y"], wanted(model, weights, x)[0])


@pytest.mark.parametrize("chunk", [1, 7, 64, 300, 1 << 20])
def test_uploads_of_any_chunk_size_arrive_whole(chunk: int) -> None:
    backend, weights = made(mlp(), chunk=chunk)
    held = backend.derive(weights)
    for name in backend.recoverable:
        assert np.array_equal(backend.recover(held, name), weights[name])
    assert backend.recoverable == {"b0", "w0", "w1"}, "a transposed weight lies as the source has it"
    x = rows(2)
    assert same(backend.run(held, x)["y"], wanted(mlp(), weights, x)[0])


def test_sources_of_another_library_and_read_only_arrays() -> None:
    model, x = mlp(), rows(2)
    backend, weights = made(model)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
    held = backend.derive(tensors)
    for tensor in tensors.values():
        tensor.zero_()  # the trainer goes on
    assert same(backend.run(held, x)["y"], wanted(model, weights, x)[0])
    for array in weights.values():
        array.flags.writeable = False
    assert same(backend.run(backend.derive(weights), x)["y"], wanted(model, weights, x)[0])
    with pytest.raises(EngineError, match="takes"):
        backend.derive({**tensors, "b0": torch.zeros(3)})


def test_recordings_begin_at_the_second_request_and_are_dropped_by_memory() -> None:
    backend, weights = made(mlp(), graph_memory=1)
    held = backend.derive(weights)
    for count in (1, 2, 3):
        backend.run(held, rows(count))
    assert len(backend.runner.recordings) == 0, "a shape that came once is not worth recording"
    for count in (1, 2, 3, 3):
        x = rows(count)
        assert same(backend.run(held, x)["y"], wanted(mlp(), weights, x)[0])
    assert len(backend.runner.recordings) == 1
    assert backend.runner.recordings.get((("x", (3, 8)),)) is not None, "the most recent one stays"


def test_the_least_recently_used_recording_is_dropped() -> None:
    def recording(nbytes: int) -> Recording:
        return Recording({}, {}, lambda: None, nbytes)

    held = Recordings(budget=100, after=1)
    held.put("a", recording(40))
    held.put("b", recording(40))
    assert held.get("a") is not None
    held.put("c", recording(40))
    assert held.get("b") is None
    assert held.get("a") is not None
    held.put("d", recording(1000))
    assert len(held) == 1, "one that is too large alone stays"
    assert held.nbytes == 1000


def test_recordings_see_new_weights() -> None:
    model, x = mlp(), rows(4)
    backend, weights = made(model, graph_after=1)
    first = backend.derive(weights)
    backend.run(first, x)
    assert len(backend.runner.recordings) == 1
    other = random_like(weights, 9)
    second = backend.derive(other)
    assert same(backend.run(second, x)["y"], wanted(model, other, x)[0])
    assert len(backend.runner.recordings) == 1


def test_outputs_are_the_callers_own() -> None:
    backend, weights = made(mlp(), graph_after=1)
    held = backend.derive(weights)
    first = backend.run(held, rows(4))["y"]
    before = first.copy()
    backend.run(held, rows(4))
    assert np.array_equal(first, before)


def test_buckets_serve_many_sizes_with_one_recording() -> None:
    model = mlp()
    backend, weights = made(model, graph_after=1, buckets={"N": (4, 8)})
    held = backend.derive(weights)
    for count in (3, 1, 4, 2, 3):
        x = rows(count)
        got = backend.run(held, x)["y"]
        assert got.shape == (count, 4)
        assert same(got, wanted(model, weights, x)[0])
    assert len(backend.runner.recordings) == 1
    backend.run(held, rows(9))  # beyond the largest bucket: as it is
    assert len(backend.runner.recordings) == 2


def test_padding_that_changes_outputs_is_found_and_left_off() -> None:
    model = rows_that_influence_each_other()
    backend, weights = made(model, graph_after=1, buckets={"N": (4,)})
    held = backend.derive(weights)
    for _ in range(2):
        x = rows(3)
        assert same(backend.run(held, x)["y"], wanted(model, weights, x)[0])
    assert any("influence each other" in decision.reason for decision in backend.decisions)


def test_bad_buckets_are_refused() -> None:
    for buckets in ({"M": (4,)}, {"N": ()}, {"N": (0,)}):
        with pytest.raises(EngineError):
            made(mlp(), buckets=buckets)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 2e-2), ("bf16", 1e-1), ("tf32", 1e-4)])
def test_precisions(precision: str, tolerance: float) -> None:
    model, x = mlp(), rows(3)
    backend, weights = made(model, precision=Precision(precision), graph_after=1)
    held = backend.derive(weights)
    got = backend.run(held, x)["y"]
    assert got.dtype == np.float32
    assert_close(got, wanted(model, weights, x)[0], tolerance, tolerance)
    if precision != "tf32":
        assert not backend.recoverable, "halves do not give float32 back"
        assert held.nbytes * 2 == sum(array.nbytes for array in weights.values())
    assert any(decision.subject == "precision" for decision in backend.decisions)


@pytest.fixture(scope="module")
def bidaf() -> tuple[onnx.ModelProto, Compilation]:
    prepared = prepare(random_bidaf(), for_engine="cuda")
    assert not prepared.blockers
    return prepared.model, compile_model(prepared.model)


def bidaf_feeds(context: int, question: int) -> dict[str, Array]:
    rng = np.random.default_rng(context)
    return {
        "CategoryMapper_4_output": rng.integers(0, 20, (context, 1)),
        "CategoryMapper_5_output": rng.integers(0, 10, (context, 1, 1, 16)),
        "CategoryMapper_6_output": rng.integers(0, 20, (question, 1)),
        "CategoryMapper_7_output": rng.integers(0, 10, (question, 1, 1, 16)),
    }


def test_bidaf(bidaf: tuple[onnx.ModelProto, Compilation]) -> None:
    """The sample's network, prepared: agrees with ONNX Runtime, and nothing in it waits for the device."""
    model, compilation = bidaf
    backend = CudaBackend(compilation.compiled, "cpu", CudaOptions(devices=("cpu",)))
    assert not [d for d in backend.decisions if d.action == "record CUDA graphs"], backend.decisions
    specs = {spec.name: spec.dtype for spec in compilation.compiled.inputs}
    for seed in (None, 4):
        weights = dict(compilation.weights) if seed is None else random_like(dict(compilation.weights), seed)
        held = backend.derive(weights)
        for sizes in ((10, 6), (10, 6), (10, 6), (33, 9)):
            feeds = {name: array.astype(specs[name]) for name, array in bidaf_feeds(*sizes).items()}
            got = backend.run(held, feeds)
            names = [spec.name for spec in compilation.compiled.outputs]
            for name, expected in zip(names, wanted(model, weights, feeds), strict=True):
                assert got[name].dtype == expected.dtype
                assert_close(got[name], expected, 1e-3, 1e-4, name)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.05), ("bf16", 0.3)])
def test_bidaf_in_half(bidaf: tuple[onnx.ModelProto, Compilation], precision: str, tolerance: float) -> None:
    """Its masks and paddings of -1e9 are beyond float16; the scores must stay finite and close."""
    model, compilation = bidaf
    options = CudaOptions(devices=("cpu",), precision=Precision(precision))
    backend = CudaBackend(compilation.compiled, "cpu", options)
    feeds = bidaf_feeds(12, 7)
    got = backend.run(backend.derive(dict(compilation.weights)), feeds)
    names = [spec.name for spec in compilation.compiled.outputs]
    for name, expected in zip(names, wanted(model, dict(compilation.weights), feeds), strict=True):
        if expected.dtype == np.float32:
            assert_close(got[name], expected, tolerance, tolerance, name)


def group_of(count: int) -> tuple[CudaGroup, dict[str, Array]]:
    compilation = compile_model(mlp())
    backend, _ = create(compilation.compiled, options=CudaOptions(devices=("cpu",) * count))
    assert isinstance(backend, CudaGroup)
    return backend, {name: np.array(array) for name, array in compilation.weights.items()}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_group_holds_the_same_weights_everywhere(count: int) -> None:
    group, weights = group_of(count)
    x = rows(2)
    held = group.derive(weights)
    assert isinstance(held, GroupWeightSet)
    assert len(held.members) == count
    for member, part in zip(group._members, held.members, strict=True):
        assert same(member.run(part, x)["y"], wanted(mlp(), weights, x)[0])
    other = {**weights, "b0": weights["b0"] + 3}
    second = group.derive({"b0": other["b0"]}, held, frozenset({"b0"}))
    for member, part in zip(group._members, second.members, strict=True):
        assert same(member.run(part, x)["y"], wanted(mlp(), other, x)[0])
    third = group.derive(random_like(weights, 2))
    assert same(group.run(third, x)["y"], wanted(mlp(), random_like(weights, 2), x)[0])
    group.close()


def test_a_device_that_fails_keeps_the_whole_group_on_the_old_version(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = onnx_refit.build(mlp(), engine="cuda", options=onnx_refit.BuildOptions(specialise=False))
    options = EngineOptions(cuda=CudaOptions(devices=("cpu",) * 3))
    x = rows(2)
    with onnx_refit.load(plan, options=options) as engine:
        before = engine.run(x)["y"]
        assert plan.weights is not None
        other = random_like(dict(plan.weights), 7)
        group: Any = engine._backend

        def fail(other: object) -> object:
            raise EngineError("out of memory on the last device")

        with monkeypatch.context() as patch:
            patch.setattr(group._members[2], "adopt", fail)
            with pytest.raises(EngineError, match="last device"):
                engine.refit(other)
        assert engine.version == 1
        for _ in range(6):
            assert np.array_equal(engine.run(x)["y"], before)
        engine.refit(other)
        for _ in range(6):
            assert same(engine.run(x)["y"], wanted(mlp(), other, x)[0])


def test_the_transaction_on_top() -> None:
    """build -> load -> refit -> rollback through the public API, threads asking all the while."""
    model = mlp()
    plan = onnx_refit.build(model, engine="cuda", options=onnx_refit.BuildOptions(specialise=False))
    assert plan.weights is not None
    variants = [dict(plan.weights), random_like(dict(plan.weights), 5)]
    x = rows(3)
    answers = [wanted(model, values, x)[0] for values in variants]
    with onnx_refit.load(plan, options=EngineOptions(cuda=CudaOptions(devices=("cpu",)))) as engine:
        wrong: list[str] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                got = engine.run(x)
                if not same(got["y"], answers[(got.version - 1) % 2]):
                    wrong.append(f"version {got.version} gave another version's answer")

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for turn in range(20):
            engine.refit(variants[(turn + 1) % 2])
        stop.set()
        for thread in threads:
            thread.join(30)
        assert not wrong, wrong[:3]
        current = engine.version
        engine.rollback()
        assert same(engine.run(x)["y"], answers[(current - 2) % 2])


def test_without_a_gpu_the_error_says_what_is_missing() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    plan = onnx_refit.build(mlp(), engine="cuda", options=onnx_refit.BuildOptions(specialise=False))
    with pytest.raises(EngineError, match="needs an NVIDIA GPU"):
        onnx_refit.load(plan)
