"""Models as both PyTorch exporters write them: the folds that real graphs need, and agreement for other weights."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnx_refit
from onnx_refit.plan.compile import compile_model
from onnx_refit.tensors import Array
from tests.plan.support import assert_close, assert_contract, ops, optimiser_leftovers, run, run_compiled, substitute

pytestmark = pytest.mark.torch

REL = 1e-5


def mobile_cnn() -> tuple[Any, tuple[Any, ...]]:
    """Convolutions of every kind, batch normalisation behind and alone, layer scale, squeeze-and-excite."""
    import torch
    from torch import nn

    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self, channels: int, hidden: int, stride: int) -> None:
            super().__init__()
            self.expand, self.first = nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
            self.depth = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
            self.second = nn.BatchNorm2d(hidden)
            self.squeeze, self.excite = nn.Conv2d(hidden, 8, 1), nn.Conv2d(8, hidden, 1)
            self.project, self.third = nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels)

        def forward(self, x: Any) -> Any:
            y = torch.relu(self.first(self.expand(x)))
            y = nn.functional.silu(self.second(self.depth(y)))
            gate = self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True))))
            return self.third(self.project(y * torch.sigmoid(gate)))

    class Net(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
            self.block, self.lone = Block(16, 48, 1), nn.BatchNorm2d(16)
            self.up, self.up_norm = nn.ConvTranspose2d(16, 8, 2, 2), nn.BatchNorm2d(8)
            self.head = nn.Conv2d(8, 24, 1)
            self.scale, self.shift = nn.Parameter(torch.randn(24, 1, 1)), nn.Parameter(torch.randn(1, 24, 1, 1))
            self.fc, self.fc_norm, self.out = nn.Linear(24, 32), nn.BatchNorm1d(32), nn.Linear(32, 1)

        def forward(self, x: Any) -> Any:
            x = torch.relu(self.norm(self.stem(x)))
            x = torch.relu(self.lone(torch.relu(x + self.block(x)) * 0.5))
            x = torch.relu(self.up_norm(self.up(x)))
            x = self.head(x) * self.scale + self.shift
            return self.out(torch.relu(self.fc_norm(self.fc(torch.relu(x).mean((2, 3))))))

    return Net(), (torch.randn(2, 3, 32, 32),)


def recurrent(kind: str) -> Callable[[], tuple[Any, tuple[Any, ...]]]:
    def make() -> tuple[Any, tuple[Any, ...]]:
        import torch
        from torch import nn

        class Net(nn.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.embedding = nn.Embedding(50, 16)
                self.rnn = getattr(nn, kind)(16, 24, 2, bidirectional=True)
                self.out = nn.Linear(48, 50)

            def forward(self, ids: Any) -> Any:
                y, _ = self.rnn(self.embedding(ids))
                return self.out(y)

        return Net(), (torch.randint(0, 50, (12, 1)),)

    return make


def transformer() -> tuple[Any, tuple[Any, ...]]:
    """Pre-norm attention with a mask, GELU, a tied head and a learned scalar."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Net(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(60, 32)
            self.positions = nn.Parameter(torch.randn(1, 10, 32))
            self.norm, self.qkv, self.proj = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
            self.norm2, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
            self.gamma = nn.Parameter(torch.randn(32))

        def forward(self, ids: Any) -> Any:
            x = self.embedding(ids) + self.positions
            b, t, c = x.shape
            q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c)
            x = x + self.proj(y) * self.gamma
            x = x + self.down(F.gelu(self.up(self.norm2(x))))
            return F.linear(x, self.embedding.weight)

    return Net(), (torch.randint(0, 60, (2, 10)),)


def speech() -> tuple[Any, tuple[Any, ...]]:
    """Conv1d, GroupNorm, GLU, an LSTM in the middle, ConvTranspose1d; weight normalisation computed at each refit."""
    import torch
    from torch import nn

    class Net(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.down, self.norm = nn.Conv1d(2, 16, 8, 4, 2), nn.GroupNorm(4, 16)
            self.gate = nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 32, 1))
            self.lstm, self.proj = nn.LSTM(16, 16, 1, bidirectional=True), nn.Linear(32, 16)
            self.up, self.out_norm = nn.ConvTranspose1d(16, 2, 8, 4, 2), nn.BatchNorm1d(2)

        def forward(self, x: Any) -> Any:
            x = nn.functional.glu(self.gate(torch.relu(self.norm(self.down(x)))), 1)
            y, _ = self.lstm(x.permute(2, 0, 1))
            return self.out_norm(self.up(self.proj(y).permute(1, 2, 0)))

    return Net(), (torch.randn(1, 2, 128),)


MODELS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "mobile_cnn": mobile_cnn,
    "lstm": recurrent("LSTM"),
    "gru": recurrent("GRU"),
    "transformer": transformer,
    "speech": speech,
}


def export(name: str, exporter: str) -> tuple[onnx.ModelProto, dict[str, Array], set[str]]:
    """The exported model, its inputs, and the names of the parameters and buffers."""
    import torch

    torch.manual_seed(0)
    net, inputs = MODELS[name]()
    net.eval()
    for key, values in [*net.named_parameters(), *net.named_buffers()]:
        if "running_var" in key:
            values.data = torch.rand_like(values) + 0.5
        elif values.ndim == 1 and values.is_floating_point():
            values.data = values + 0.1 * torch.randn_like(values)
    file = io.BytesIO()
    with torch.no_grad():
        if exporter == "torchscript":
            torch.onnx.export(net, inputs, file, dynamo=False, opset_version=17, do_constant_folding=False)
        else:
            torch.onnx.export(net, inputs, file, dynamo=True, external_data=False, optimize=exporter == "dynamo")
    proto = onnx.load_from_string(file.getvalue())
    initializers = {tensor.name for tensor in proto.graph.initializer}
    names = [v.name for v in proto.graph.input if v.name not in initializers]
    return proto, {n: x.numpy() for n, x in zip(names, inputs, strict=True)}, set(net.state_dict())


def perturbed(weights: dict[str, Array], seed: int) -> dict[str, Array]:
    """Weights that differ by a fifth and keep their signs, so that variances stay variances."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, values in weights.items():
        factor = 1 + 0.2 * np.tanh(rng.standard_normal(values.shape))
        found[name] = np.asarray((values.astype(np.float64) * factor).astype(values.dtype))
    return found


def check_engine(proto: onnx.ModelProto, feeds: dict[str, Array], weights: dict[str, Array]) -> None:
    """The loaded engine's answers, after whole and partial refits, are those of a fresh baked session."""
    whole = perturbed(weights, 2)
    part = {name: array for name, array in perturbed(weights, 3).items() if name in sorted(weights)[::2]}
    with onnx_refit.load(onnx_refit.build(proto)) as engine:
        for given, now in ((whole, whole), (part, {**whole, **part})):
            engine.refit(given, partial=given is part).full_speed.wait()
            model = substitute(proto, now).SerializeToString()
            baked = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feeds)
            assert_close(baked, list(engine.run(feeds).values()), REL)


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo", "dynamo-raw"])
@pytest.mark.parametrize("name", MODELS)
def test_export(name: str, exporter: str) -> None:
    proto, feeds, parameters = export(name, exporter)
    compilation = compile_model(proto)
    compiled = compilation.compiled
    assert_contract(compilation)
    first = run(proto, feeds)
    assert_close(first, run_compiled(compiled, compilation.weights, feeds), REL)
    weights = perturbed(dict(compilation.weights), 1)
    expected = run(substitute(proto, weights), feeds)
    assert not np.array_equal(expected[0], first[0])
    assert_close(expected, run_compiled(compiled, weights, feeds), REL)
    assert not optimiser_leftovers(compiled)
    check_engine(proto, feeds, dict(compilation.weights))
    if exporter != "dynamo":  # the optimising exporter folds parameters before we see them
        sources = {source.spec.name for source in compiled.sources}
        assert {p for p in parameters if not p.endswith("num_batches_tracked")} <= sources


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo", "dynamo-raw"])
def test_cnn_is_fully_folded(exporter: str) -> None:
    proto, _, _ = export("mobile_cnn", exporter)
    left = ops(compile_model(proto).compiled)
    assert left.count("BatchNormalization") == 1, "only the one that stands alone"
    assert not {"Expand", "CastLike", "Cast", "Constant"} & set(left)
