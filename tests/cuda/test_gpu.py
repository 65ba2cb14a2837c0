"""What only a GPU can show: CUDA graphs, streams, device weights of a trainer, pinned uploads, several devices."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from onnx_refit.engine.cuda.backend import CudaBackend  # noqa: E402
from onnx_refit.engine.cuda.create import create  # noqa: E402
from onnx_refit.engine.cuda.options import CudaOptions, Precision  # noqa: E402
from onnx_refit.model.prepare import prepare  # noqa: E402
from onnx_refit.plan.compile import compile_model  # noqa: E402
from tests.tensorrt.bidaf import random_bidaf  # noqa: E402

from .models import mlp, random_like, rows_that_influence_each_other, wide_mlp  # noqa: E402
from .test_backend import assert_close, bidaf_feeds, rows, same, wanted  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch]


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")


def made(model: Any, **options: Any) -> tuple[CudaBackend, dict[str, Any]]:
    compilation = compile_model(model)
    backend = CudaBackend(compilation.compiled, "cuda:0", CudaOptions(graph_after=1, **options))
    return backend, {name: np.array(array) for name, array in compilation.weights.items()}


def test_recorded_graphs_answer_with_the_version_asked_for() -> None:
    model, x = mlp(), rows(3)
    backend, weights = made(model)
    sets = [(values, backend.derive(values)) for values in (random_like(weights, seed) for seed in range(4))]
    for values, held in [*sets, *reversed(sets), *sets]:
        assert same(backend.run(held, x)["y"], wanted(model, values, x)[0])
    assert len(backend.runner.recordings) == 1


def test_a_set_may_die_while_its_copy_is_queued() -> None:
    """Refit after refit without waiting: memory that is given back must not be written before it was read."""
    model, x = mlp(), rows(3)
    backend, weights = made(model)
    for seed in range(50):
        values = random_like(weights, seed)
        assert same(backend.run(backend.derive(values), x)["y"], wanted(model, values, x)[0])


def test_a_trainers_tensors_never_touch_the_host_and_may_change_afterwards() -> None:
    model, x = mlp(), rows(2)
    backend, weights = made(model)
    tensors = {name: torch.from_numpy(array).cuda() for name, array in weights.items()}
    held = backend.derive(tensors)
    for tensor in tensors.values():
        tensor.zero_()
    assert same(backend.run(held, x)["y"], wanted(model, weights, x)[0])


def test_weights_just_written_on_another_stream_are_waited_for() -> None:
    model, x = mlp(), rows(2)
    backend, weights = made(model)
    source = {name: torch.from_numpy(array).cuda() for name, array in weights.items()}
    target = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for name, tensor in target.items():
            tensor.copy_(source[name], non_blocking=True)
        held = backend.derive(target)
    assert same(backend.run(held, x)["y"], wanted(model, weights, x)[0])


def test_pinned_and_cupy_weights() -> None:
    model, x = mlp(), rows(2)
    backend, weights = made(model, chunk=100)
    pinned = {name: torch.from_numpy(array).pin_memory() for name, array in weights.items()}
    assert same(backend.run(backend.derive(pinned), x)["y"], wanted(model, weights, x)[0])
    assert same(backend.run(backend.derive(weights), x)["y"], wanted(model, weights, x)[0])
    cupy = pytest.importorskip("cupy")
    arrays = {name: cupy.asarray(array) for name, array in weights.items()}
    assert same(backend.run(backend.derive(arrays), x)["y"], wanted(model, weights, x)[0])


def _large_and_small(odd: str, weights: dict[str, Any]) -> dict[str, Any]:
    """The weights in pinned memory; the one named in a way that copies straight from there cannot take."""
    pinned: dict[str, Any] = {name: torch.from_numpy(array).pin_memory() for name, array in weights.items()}
    name = "w1" if odd.startswith("large") else "b0"
    if odd.endswith("pageable"):
        pinned[name] = torch.from_numpy(weights[name])
    elif odd.endswith("strided"):
        wide = torch.from_numpy(np.repeat(weights[name], 2, axis=-1)).pin_memory()
        pinned[name] = wide[..., ::2]
    elif odd.endswith("on the device"):
        pinned[name] = pinned[name].cuda()
    elif odd.endswith("array"):
        pinned[name] = weights[name]
    return pinned


@pytest.mark.parametrize("size", ["large", "small"])
@pytest.mark.parametrize("kind", ["pinned", "pageable", "strided", "on the device", "array"])
def test_large_and_small_tensors_in_pinned_memory(size: str, kind: str) -> None:
    """Large ones go by copy engines, small ones by a kernel beside them; what is not pinned goes another way."""
    model, x = wide_mlp(), rows(2)
    backend, weights = made(model)
    for seed in range(3):  # new addresses each time
        values = random_like(weights, seed)
        held = backend.derive(_large_and_small(f"{size} {kind}", values))
        through_buffers = backend.derive(values)
        for name in backend._layout.slots:
            assert torch.equal(held.view(name), through_buffers.view(name)), name
        assert_close(backend.run(held, x)["y"], wanted(model, values, x)[0], rtol=1e-4, atol=1e-4)


def test_requests_and_refits_in_threads() -> None:
    model, x = mlp(), rows(3)
    backend, weights = made(model)
    variants = [random_like(weights, seed) for seed in range(3)]
    sets = [(wanted(model, values, x)[0], backend.derive(values)) for values in variants]
    wrong: list[str] = []

    def ask(index: int) -> None:
        for turn in range(100):
            answer, held = sets[(index + turn) % 3]
            if not same(backend.run(held, x)["y"], answer):
                wrong.append(f"request {turn} of thread {index}")

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for seed in range(30):
        backend.derive(random_like(weights, 100 + seed))
    for thread in threads:
        thread.join(120)
    assert not wrong, wrong[:3]


def test_buckets_on_the_device() -> None:
    backend, weights = made(mlp(), buckets={"N": (4, 8)})
    held = backend.derive(weights)
    for count in (3, 1, 4, 2, 7):
        x = rows(count)
        assert same(backend.run(held, x)["y"], wanted(mlp(), weights, x)[0])
    backend, weights = made(rows_that_influence_each_other(), buckets={"N": (4,)})
    x = rows(3)
    assert same(backend.run(backend.derive(weights), x)["y"], wanted(rows_that_influence_each_other(), weights, x)[0])


@pytest.mark.parametrize("recurrent", ["auto", "library"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-3), ("tf32", 2e-2), ("bf16", 5e-1)])
def test_bidaf_in_a_graph(recurrent: str, precision: str, tolerance: float) -> None:
    from onnx_refit.engine.cuda.options import Recurrent

    model = prepare(random_bidaf(), for_engine="cuda").model
    compilation = compile_model(model)
    options = CudaOptions(graph_after=1, recurrent=Recurrent(recurrent), precision=Precision(precision))
    backend = CudaBackend(compilation.compiled, "cuda:0", options)
    specs = {spec.name: spec.dtype for spec in compilation.compiled.inputs}
    held = backend.derive(dict(compilation.weights))
    for sizes in ((10, 6), (10, 6), (33, 9), (200, 20)):
        feeds = {name: array.astype(specs[name]) for name, array in bidaf_feeds(*sizes).items()}
        got = backend.run(held, feeds)
        expected = wanted(model, dict(compilation.weights), feeds)
        for spec, value in zip(compilation.compiled.outputs, expected, strict=True):
            if spec.dtype == "float32":
                assert_close(got[spec.name], value, tolerance, tolerance, spec.name)
    assert len(backend.runner.recordings) == 3


def test_a_group_of_all_devices() -> None:
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("one GPU")
    compilation = compile_model(mlp())
    weights = {name: np.array(array) for name, array in compilation.weights.items()}
    devices = tuple(f"cuda:{index}" for index in range(count))
    group: Any = create(compilation.compiled, options=CudaOptions(devices=devices))[0]
    x = rows(2)
    for seed in range(3):
        values = random_like(weights, seed)
        held = group.derive(values)
        for member, part in zip(group._members, held.members, strict=True):
            assert same(member.run(part, x)["y"], wanted(mlp(), values, x)[0])
    group.close()


def test_onnx_runtime_runs_the_network_where_it_has_cuda() -> None:
    from onnx_refit.engine.cuda import ortnetwork
    from onnx_refit.engine.cuda.choice import candidates

    if not ortnetwork.available("cuda:0"):
        pytest.skip("the installed onnxruntime has no CUDA")
    compilation = compile_model(mlp())
    options = CudaOptions(graph_after=1)
    way = next(way for way in candidates(compilation.compiled, "cuda:0", options) if way.runner == "onnxruntime")
    backend = CudaBackend(compilation.compiled, "cuda:0", options, way)
    weights, x = {name: np.array(array) for name, array in compilation.weights.items()}, rows(3)
    for seed in range(3):
        values = random_like(weights, seed)
        assert same(backend.run(backend.derive(values), x)["y"], wanted(mlp(), values, x)[0])


def test_bound_and_mapped_tensors_and_host_arrays_make_the_same_weights() -> None:
    """Copies by kernels, by copy engines and through buffers; formulas by kernels and by the program."""
    from .test_together import normalised

    for model in (mlp(), normalised()):
        backend, weights = made(model)
        there = {name: torch.from_numpy(array).cuda() for name, array in weights.items()}
        pinned = {name: torch.from_numpy(array).pin_memory() for name, array in weights.items()}
        offset = {name: torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:] for name, tensor in there.items()}
        unaligned = {name: tensor.view(there[name].shape) for name, tensor in offset.items()}
        sets = [backend.derive(given) for given in (weights, there, pinned, backend.bind(there), unaligned)]
        for name in backend._layout.slots:
            assert all(torch.equal(sets[0].view(name), one.view(name)) for one in sets[1:])
        names = frozenset(list(weights)[:1])
        part = backend.derive({n: there[n] for n in backend.required(names)}, sets[0], names)
        assert all(torch.equal(sets[0].view(name), part.view(name)) for name in backend._layout.slots)


def test_a_whole_transaction_from_device_tensors() -> None:
    import onnx_refit
    from onnx_refit.engine.registry import EngineOptions
    from onnx_refit.errors import RefitRejectedError

    plan = onnx_refit.build(mlp(), engine="cuda", options=onnx_refit.BuildOptions(specialise=False))
    assert plan.weights is not None
    weights, x = dict(plan.weights), rows(3)
    with onnx_refit.load(plan, options=EngineOptions(cuda=CudaOptions(measure=False))) as engine:
        values = random_like(weights, 3)
        there = {name: torch.from_numpy(array).cuda() for name, array in values.items()}
        assert set(engine.refit(there).changed) == set(weights)
        assert same(engine.run(x)["y"], wanted(mlp(), values, x)[0])
        assert engine.refit(there).changed == ()
        there["w1"][3, 2] = float("nan")
        with pytest.raises(RefitRejectedError, match=r"\[3, 2\]"):
            engine.refit(there)
        assert same(engine.run(x)["y"], wanted(mlp(), values, x)[0])
        read = engine.weights()
        assert all(np.array_equal(read.read(name), values[name]) for name in values)
