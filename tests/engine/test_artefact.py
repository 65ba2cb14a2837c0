from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Callable

import numpy as np
import onnx
import pytest

from onnx_refit.engine.onnxruntime import artefact, backend
from onnx_refit.engine.onnxruntime.backend import create
from onnx_refit.engine.onnxruntime.options import OnnxRuntimeOptions
from onnx_refit.errors import EngineError
from onnx_refit.plan.compile import compile_model

from .zoo import ZOO

OPTIONS = OnnxRuntimeOptions(threads=1)


@pytest.mark.parametrize("name", ["convolutions", "tied", "lstm"])
def test_a_backend_from_an_artefact_optimises_nothing_and_answers_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = ZOO[name]()
    compilation = compile_model(model)
    first = create(compilation.compiled, None, OPTIONS)
    data = first.artefact()
    assert data

    def fail(*_: object) -> None:
        raise AssertionError("optimised again")

    monkeypatch.setattr(backend, "specialise", fail)
    second = create(compilation.compiled, None, OPTIONS, data)
    weights = dict(compilation.weights)
    one, two = first.derive(weights), second.derive(weights)
    assert one.full_speed.wait(60) and two.full_speed.wait(60)
    for a, b in zip(first.run(one, inputs).values(), second.run(two, inputs).values(), strict=True):
        assert np.array_equal(a, b)
    assert second.decisions == first.decisions
    assert second.recoverable == first.recoverable
    first.close()
    second.close()


@pytest.mark.parametrize("name", ["convolutions", "lstm", "keras"])
def test_an_artefact_made_without_an_engine_is_what_an_engine_would_give(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = ZOO[name]()
    compilation = compile_model(model)
    data = artefact.make(compilation.compiled, OPTIONS)
    first = create(compilation.compiled, None, OPTIONS)
    monkeypatch.setattr(backend, "specialise", None)
    second = create(compilation.compiled, None, OPTIONS, data)
    one, two = first.derive(compilation.weights), second.derive(compilation.weights)
    assert one.full_speed.wait(60) and two.full_speed.wait(60)
    for a, b in zip(first.run(one, inputs).values(), second.run(two, inputs).values(), strict=True):
        assert np.array_equal(a, b)
    assert second.recoverable == first.recoverable
    first.close()
    second.close()


def test_a_build_refuses_what_the_engine_cannot_run() -> None:
    node = onnx.helper.make_node("NoSuchOperator", ["x", "w"], ["y"], domain="nowhere")
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in "xy"]
    weight = onnx.numpy_helper.from_array(np.ones(4, np.float32), "w")
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("nowhere", 1)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", values[:1], values[1:], [weight]), opset_imports=opsets, ir_version=9
    )
    compiled = compile_model(model).compiled
    for optimise in (True, False):
        with pytest.raises(EngineError, match="NoSuchOperator"):
            artefact.make(compiled, OnnxRuntimeOptions(threads=1, optimise=optimise))


def test_an_artefact_of_another_host_model_or_damaged_is_not_used() -> None:
    compiled = compile_model(ZOO["chain"]()[0]).compiled
    other = compile_model(ZOO["gemms"]()[0]).compiled
    made = create(compiled, None, OPTIONS)
    data = made.artefact()
    assert data is not None
    key = artefact.host_key(compiled, optimise=True)
    assert artefact.load(data, key) is not None
    assert artefact.load(data, artefact.host_key(other, optimise=True)) is None
    assert artefact.load(data, artefact.host_key(compiled, optimise=False)) is None
    assert artefact.load(data[: len(data) // 2], key) is None
    assert artefact.load(b"", key) is None
    changed = dataclasses.replace(compiled, activation=other.activation)
    assert artefact.host_key(changed, optimise=True) != key
    create(compiled, None, OPTIONS, data[:100]).close()
    made.close()


Entries = dict[str, bytes]


def _rewritten(data: bytes, change: Callable[[Entries], object], compression: int = zipfile.ZIP_STORED) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    change(entries)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    return file.getvalue()


def _array(data: bytes) -> bytes:
    file = io.BytesIO()
    np.save(file, np.frombuffer(data, np.uint8))
    return file.getvalue()


def _reads_a_file(entries: Entries) -> None:
    model = onnx.ModelProto.FromString(np.load(io.BytesIO(entries["model.npy"])).tobytes())
    tensor = model.graph.initializer.add(name="stolen", data_type=onnx.TensorProto.UINT8, dims=[4])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="elsewhere.bin")
    entries["model.npy"] = _array(model.SerializeToString())


def _is_huge(entries: Entries) -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (1 << 60,)})
    entries["document.npy"] = file.getvalue()


def test_an_artefact_that_is_more_than_it_seems_is_not_used() -> None:
    compiled = compile_model(ZOO["chain"]()[0]).compiled
    made = create(compiled, None, OPTIONS)
    data = made.artefact()
    made.close()
    assert data is not None
    key = artefact.host_key(compiled, optimise=True)

    def same(_: Entries) -> None:
        pass

    assert artefact.load(_rewritten(data, same), key) is not None
    assert artefact.load(_rewritten(data, same, zipfile.ZIP_DEFLATED), key) is None
    assert artefact.load(_rewritten(data, _reads_a_file), key) is None
    assert artefact.load(_rewritten(data, _is_huge), key) is None
    assert artefact.load(_rewritten(data, lambda e: e.update({"document.npy": _array(b"[" * 100_000)})), key) is None
    damaged = bytearray(data)
    damaged[data.rindex(b"PK\x01\x02") + 10] = 99  # an unknown kind of compression
    assert artefact.load(bytes(damaged), key) is None


def test_an_artefact_of_another_version_of_this_package_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compile_model(ZOO["chain"]()[0]).compiled
    key = artefact.host_key(compiled, optimise=True)
    monkeypatch.setattr(artefact, "__version__", "0.0.0")
    assert artefact.host_key(compiled, optimise=True) != key
