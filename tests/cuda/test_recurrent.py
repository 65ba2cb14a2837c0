"""LSTM and GRU in every form, the library's kernels and the plain loop, against ONNX Runtime."""

from __future__ import annotations

import ctypes
import itertools
import re
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # the tensors are small; many threads on few cores wait for each other

from onnx_refit.engine.cuda import kernels, persistent  # noqa: E402
from onnx_refit.engine.cuda.lowering import recurrent  # noqa: E402
from onnx_refit.engine.cuda.lowering.form import Form  # noqa: E402
from onnx_refit.engine.cuda.lowering.program import Lowered  # noqa: E402

pytestmark = pytest.mark.torch

T, B, WIDTH, H = 7, 3, 5, 8
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def model(
    kind: str, direction: str, extras: tuple[str, ...], **attributes: Any
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    rng = np.random.default_rng(3)
    d, g = 2 if direction == "bidirectional" else 1, GATES[kind]

    def random(*shape: int) -> Any:
        return (rng.standard_normal(shape) * 0.5).astype(np.float32)

    feeds = {"x": random(T, B, WIDTH), "w": random(d, g * H, WIDTH), "r": random(d, g * H, H)}
    optional = {
        "b": random(d, 2 * g * H),
        "lengths": np.array([T, 2, 5], np.int32),
        "h": random(d, B, H),
        "c": random(d, B, H),
        "p": random(d, 3 * H),
    }
    slots = ["b", "lengths", "h", "c", "p"] if kind == "LSTM" else ["b", "lengths", "h"]
    names = [name if name in extras else "" for name in slots]
    feeds |= {name: optional[name] for name in names if name}
    outputs = ["y", "y_h", "y_c"] if kind == "LSTM" else ["y", "y_h"]
    node = helper.make_node(kind, ["x", "w", "r", *names], outputs, hidden_size=H, direction=direction, **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info(n, TensorProto.INT32 if n == "lengths" else TensorProto.FLOAT, a.shape)
            for n, a in feeds.items()
        ],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), feeds


def compare(proto: onnx.ModelProto, feeds: dict[str, Any], how: str) -> None:
    wanted = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)
    lowered = Lowered(proto, "cpu", recurrent=how)
    got = lowered.run({name: torch.from_numpy(array) for name, array in feeds.items()})
    for name, expected in zip(lowered.outputs, wanted, strict=True):
        np.testing.assert_allclose(got[name].numpy(), expected, rtol=1e-4, atol=1e-5, err_msg=name)


FORMS = [
    (kind, direction, extras)
    for kind, direction in itertools.product(GATES, ("forward", "reverse", "bidirectional"))
    for extras in ((), ("b",), ("b", "h", "c"), ("b", "lengths"), ("b", "lengths", "h", "c", "p"))
]


@pytest.mark.parametrize(("kind", "direction", "extras"), FORMS)
@pytest.mark.parametrize("how", ["auto", "loop"])
def test_every_form(kind: str, direction: str, extras: tuple[str, ...], how: str) -> None:
    compare(*model(kind, direction, extras), how)


@pytest.mark.parametrize("attributes", [{"linear_before_reset": 1}, {"clip": 0.3}])
@pytest.mark.parametrize("how", ["auto", "loop"])
def test_forms_of_the_gru(attributes: dict[str, Any], how: str) -> None:
    compare(*model("GRU", "bidirectional", ("b", "h"), **attributes), how)


def test_coupled_gates_and_clipping() -> None:
    compare(*model("LSTM", "forward", ("b", "p"), input_forget=1), "auto")
    compare(*model("LSTM", "bidirectional", ("b",), clip=0.4), "auto")


def test_the_library_runs_the_common_forms_only(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    real = recurrent.run_library

    def noting(form: Any) -> Any:
        ran.append(form.kind)
        return real(form)

    monkeypatch.setattr(recurrent, "run_library", noting)
    for direction in ("forward", "bidirectional"):
        compare(*model("LSTM", direction, ("b",)), "auto")
    compare(*model("GRU", "forward", ("b",), linear_before_reset=1), "auto")
    assert ran == ["LSTM", "LSTM", "GRU"]
    compare(*model("GRU", "forward", ("b",)), "auto")
    compare(*model("LSTM", "reverse", ("b",)), "auto")
    compare(*model("LSTM", "forward", ("b", "lengths")), "auto")
    assert len(ran) == 3


def test_which_hidden_sizes_the_kernels_take() -> None:
    lone = partial(persistent.hidden_size_fits, major=8)
    assert lone("LSTM", 100)
    assert lone("LSTM", 112)
    assert not lone("LSTM", 116), "its rows do not fit into the registers"
    assert lone("LSTM", 51), "any size that fits"
    assert lone("GRU", 128)
    assert not lone("GRU", 132)
    clusters = partial(persistent.hidden_size_fits, major=9)
    assert clusters("LSTM", 256)
    assert not clusters("LSTM", 257)
    assert clusters("GRU", 320)


@pytest.mark.parametrize(("sequences", "blocks"), [(1, 8), (16, 8), (17, 4), (33, 4), (34, 2), (64, 2), (5000, 2)])
def test_few_sequences_are_spread_over_more_blocks(sequences: int, blocks: int) -> None:
    shape = persistent.shape_for("LSTM", 100, sequences, 9, 132)
    assert shape is not None
    assert shape.blocks == blocks
    assert shape.threads(100) % 32 == 0
    assert shape.threads(100) >= -(-100 // blocks) * shape.lanes


def sigmoid(a: Any) -> Any:
    return 1 / (1 + np.exp(-a))


def emulated_kernel(form: Any) -> tuple[Any, Any, Any]:
    """What ``recurrent.cu`` computes, indexed as there, over flat arrays."""
    projected, recurrent_weights, given = persistent.kernel_operands(form)
    projected, recurrent_weights = projected.numpy(), recurrent_weights.numpy()
    biases = np.zeros((len(form.reversed), 2, projected.shape[-1]), np.float32)
    if given is not None:
        biases = given.numpy().reshape(biases.shape)
    time, batch, d_count, gates = projected.shape
    size, lstm = form.hidden, form.kind == "LSTM"
    xp, row = projected.reshape(-1), d_count * gates
    y = np.zeros(time * d_count * batch * size, np.float32)
    last, cell = np.zeros((d_count, batch, size), np.float32), np.zeros((d_count, batch, size), np.float32)
    backwards = sum(1 << d for d, back in enumerate(form.reversed) if back)
    for d, b in itertools.product(range(d_count), range(batch)):
        h = np.zeros(size, np.float32) if form.h is None else form.h[d, b].numpy().copy()
        c = np.zeros(size, np.float32) if form.c is None else form.c[d, b].numpy().copy()
        back = (backwards >> d) & 1
        t = time - 1 if back else 0
        for _ in range(time):
            start = (t * batch + b) * row + d * gates
            x, a = xp[start : start + gates] + biases[d, 0], recurrent_weights[d] @ h + biases[d, 1]
            if lstm:
                gate = np.concatenate([sigmoid(x[: 3 * size] + a[: 3 * size]), np.tanh(x[3 * size :] + a[3 * size :])])
                c = gate[2 * size : 3 * size] * c + gate[:size] * gate[3 * size :]
                h = gate[size : 2 * size] * np.tanh(c)
            else:
                gate = np.concatenate([sigmoid(x[: 2 * size] + a[: 2 * size]), a[2 * size :]])
                z = gate[:size]
                h = (1 - z) * np.tanh(x[2 * size :] + gate[size : 2 * size] * gate[2 * size :]) + z * h
            place = ((t * d_count + d) * batch + b) * size
            y[place : place + size] = h
            t += -1 if back else 1
        last[d, b], cell[d, b] = h, c
    shape = (time, d_count, batch, size)
    return torch.from_numpy(y).reshape(shape), torch.from_numpy(last), torch.from_numpy(cell) if lstm else None


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("extras", [(), ("b",), ("b", "h", "c")])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_the_kernels_arithmetic_emulated(
    kind: str, direction: str, extras: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels need a GPU; their layouts, biases and directions can be judged here."""
    ran: list[str] = []

    def run(form: Any) -> Any:
        ran.append(form.kind)
        return emulated_kernel(form)

    replaced = types.SimpleNamespace(can_run=lambda form: form.common, run=run)
    monkeypatch.setattr(recurrent, "persistent", replaced)
    attributes = {"linear_before_reset": 1} if kind == "GRU" else {}
    compare(*model(kind, direction, extras, **attributes), "auto")
    assert ran == [kind]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("recurrent.cu", "lstm<3, 4>"),
        ("recurrent.cu", "lstm<100, 4>"),
        ("recurrent.cu", "gru<128, 4>"),
        ("recurrent_cluster.cu", "lstm_cluster<3, 4, 2>"),
        ("recurrent_cluster.cu", "lstm_cluster<100, 8, 8>"),
        ("recurrent_cluster.cu", "lstm_cluster<256, 8, 8>"),
        ("recurrent_cluster.cu", "gru_cluster<320, 8, 8>"),
        ("recurrent_cluster.cu", "gru_cluster<256, 4, 4>"),
    ],
)
def test_the_kernels_compile_for_hopper_without_spilling(file: str, name: str) -> None:
    """NVRTC needs no GPU; skipped unless it is installed (``nvidia-cuda-nvrtc``)."""
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", compiled(file, name, "sm_90"))
    assert spills is not None
    assert spills.groups() == ("0", "0")


def compiled(file: str, name: str, architecture: str) -> str:
    found = [path for folder in sys.path for path in Path(folder).glob("nvidia/**/libnvrtc.so.*")]
    if not found:
        pytest.skip("NVRTC is not installed")
    nvrtc = ctypes.CDLL(str(found[0]))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source = kernels.source("recurrent_common.cu", file).encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"r.cu", 0, None, None) == 0
    nvrtc.nvrtcAddNameExpression(program, name.encode())
    options = [b"--std=c++17", f"--gpu-architecture={architecture}".encode(), b"--ptxas-options=-v"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    assert status == 0, log.value.decode()
    return log.value.decode()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("clusters", [True, False])
def test_the_kernels_on_a_gpu(kind: str, clusters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every direction and state against the loop, in all dtypes."""
    if not torch.cuda.is_available() or not kernels.available():
        pytest.skip("no GPU, or no CuPy")
    if not clusters:
        monkeypatch.setattr(persistent, "_HOPPER", 1000)
    attributes = {"linear_before_reset": 1} if kind == "GRU" else {}
    for direction, extras in itertools.product(("forward", "reverse", "bidirectional"), (("b",), ("b", "h", "c"), ())):
        proto, feeds = model(kind, direction, extras, **attributes)
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 8e-2)):
            values = {name: torch.from_numpy(a).cuda().to(dtype) for name, a in feeds.items()}
            got = Lowered(proto, "cuda:0", dtype, recurrent="auto").run(values)
            wanted = Lowered(proto, "cuda:0", dtype, recurrent="loop").run(values)
            for name, expected in wanted.items():
                torch.testing.assert_close(got[name], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize(
    ("hidden", "batch", "time"), [(256, 1, 7), (100, 1, 200), (100, 16, 9), (100, 64, 5), (9, 3, 1)]
)
def test_clusters_of_every_width_on_a_gpu(kind: str, hidden: int, batch: int, time: int) -> None:
    """Sequences that are spread over 8, 4 and 2 blocks, and one of a single step."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9 or not kernels.available():
        pytest.skip("no GPU with clusters, or no CuPy")
    gates = {"LSTM": 4, "GRU": 3}[kind] * hidden

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda") / hidden**0.5

    form = Form(
        kind=kind,
        x=draw(time, batch, 24) * 8,
        w=draw(2, gates, 24),
        r=draw(2, gates, hidden),
        b=draw(2, 2 * gates),
        lengths=None,
        h=draw(2, batch, hidden),
        c=draw(2, batch, hidden) if kind == "LSTM" else None,
        p=None,
        hidden=hidden,
        reversed=(False, True),
        activations=(("sigmoid", "tanh", "tanh") if kind == "LSTM" else ("sigmoid", "tanh"),) * 2,
        clip=None,
        coupled=False,
        linear_before_reset=True,
    )
    assert persistent.can_run(form)
    for got, wanted in zip(persistent.run(form), recurrent.run_loop(form), strict=True):
        if wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)
