"""LSTM and GRU in every form, the library's kernels and the plain loop, against ONNX Runtime."""

from __future__ import annotations

import itertools
import types
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # the tensors are small; many threads on few cores wait for each other

from onnx_refit.engine.cuda import persistent  # noqa: E402
from onnx_refit.engine.cuda.lowering import recurrent  # noqa: E402
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


def test_which_hidden_sizes_the_kernel_takes() -> None:
    assert persistent.hidden_size_fits(100)
    assert persistent.hidden_size_fits(108)
    assert not persistent.hidden_size_fits(112), "its rows do not fit into the registers"
    assert not persistent.hidden_size_fits(50), "rows are read four at a time"


def emulated_kernel(form: Any) -> tuple[Any, Any, Any]:
    """What ``persistent.SOURCE`` computes, indexing written as there, over flat arrays."""
    time, batch, _ = form.x.shape
    d_count, gates = form.w.shape[:2]
    hidden = form.hidden
    bias = (form.b[:, :gates] + form.b[:, gates:]).reshape(-1).numpy()
    flat = form.x.reshape(time * batch, -1).numpy() @ form.w.reshape(d_count * gates, -1).numpy().T + bias
    xp, r = flat.reshape(-1), form.r.numpy()
    y = np.zeros(time * d_count * batch * hidden, np.float32)
    last, cell = np.zeros((d_count, batch, hidden), np.float32), np.zeros((d_count, batch, hidden), np.float32)
    backwards = sum(1 << d for d, back in enumerate(form.reversed) if back)
    row = d_count * gates
    for d, b in itertools.product(range(d_count), range(batch)):
        h = np.zeros(hidden, np.float32) if form.h is None else form.h[d, b].numpy().copy()
        c = np.zeros(hidden, np.float32) if form.c is None else form.c[d, b].numpy().copy()
        back = (backwards >> d) & 1
        t = time - 1 if back else 0
        for _ in range(time):
            start = (t * batch + b) * row + d * gates
            a = xp[start : start + gates] + r[d] @ h
            gate = np.concatenate([1 / (1 + np.exp(-a[: 3 * hidden])), 1 - 2 / (1 + np.exp(2 * a[3 * hidden :]))])
            c = gate[2 * hidden : 3 * hidden] * c + gate[:hidden] * gate[3 * hidden :]
            h = gate[hidden : 2 * hidden] * (1 - 2 / (1 + np.exp(2 * c)))
            place = ((t * d_count + d) * batch + b) * hidden
            y[place : place + hidden] = h
            t += -1 if back else 1
        last[d, b], cell[d, b] = h, c
    shape = (time, d_count, batch, hidden)
    return torch.from_numpy(y).reshape(shape), torch.from_numpy(last), torch.from_numpy(cell)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_the_kernels_indexing_emulated(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself needs a GPU; its layouts and directions can be judged here."""
    monkeypatch.setattr(
        recurrent,
        "persistent",
        types.SimpleNamespace(can_run=lambda form: form.kind == "LSTM" and form.common, run=emulated_kernel),
    )
    compare(*model("LSTM", direction, ("b", "h", "c")), "auto")


@pytest.mark.gpu
def test_the_kernel_on_a_gpu() -> None:
    """Every direction and state against the loop, in all dtypes."""
    if not torch.cuda.is_available() or not persistent.available():
        pytest.skip("no GPU, or no CuPy")
    for direction, extras in itertools.product(("forward", "reverse", "bidirectional"), (("b",), ("b", "h", "c"), ())):
        proto, feeds = model("LSTM", direction, extras)
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 8e-2)):
            values = {name: torch.from_numpy(a).cuda().to(dtype) for name, a in feeds.items()}
            got = Lowered(proto, "cuda:0", dtype, recurrent="persistent").run(values)
            wanted = Lowered(proto, "cuda:0", dtype, recurrent="loop").run(values)
            for name, expected in wanted.items():
                torch.testing.assert_close(got[name], expected, rtol=tolerance, atol=tolerance)
