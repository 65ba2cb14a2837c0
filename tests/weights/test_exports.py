"""Names are found in what PyTorch's exporters write, also with the names taken away."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import numpy_helper

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

import onnx_refit  # noqa: E402
from onnx_refit.errors import ModelError  # noqa: E402
from onnx_refit.weights.mapped_view import MappedView  # noqa: E402
from onnx_refit.weights.names import find_names  # noqa: E402
from onnx_refit.weights.recover import RecoveredSource  # noqa: E402
from onnx_refit.weights.sentinel import export_module  # noqa: E402
from onnx_refit.weights.sources.arrays import ArraysSource  # noqa: E402
from onnx_refit.weights.unmerge import unmerge  # noqa: E402
from tests.weights.exports import anonymise, compare, export, randomise, state_of, weights_of  # noqa: E402

nn: Any = torch.nn


def bert() -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=20,
        attn_implementation="eager",
    )

    class Wrapped(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.bert = transformers.BertModel(config)

        def forward(self, ids: Any, mask: Any) -> Any:
            return self.bert(input_ids=ids, attention_mask=mask).last_hidden_state

    return Wrapped(), (torch.zeros(1, 7, dtype=torch.long), torch.ones(1, 7, dtype=torch.long))


def gpt2() -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=20, attn_implementation="eager", use_cache=False
    )

    class Wrapped(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.gpt = transformers.GPT2LMHeadModel(config)  # its head is tied to its embedding

        def forward(self, ids: Any) -> Any:
            return self.gpt(input_ids=ids, use_cache=False).logits

    return Wrapped(), (torch.zeros(1, 7, dtype=torch.long),)


def cnn() -> tuple[Any, Any]:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)]
    layers += [nn.ReLU(), nn.ConvTranspose2d(8, 6, 2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(150, 5)]
    return nn.Sequential(*layers), (torch.randn(1, 3, 8, 8),)


def encoder() -> tuple[Any, Any]:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)  # layers start as copies of one another
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (torch.randn(1, 5, 16),)


def recurrent() -> tuple[Any, Any]:
    class Network(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 8, 2, bidirectional=True, batch_first=True)
            self.gru = nn.GRU(16, 8, batch_first=True)

        def forward(self, x: Any) -> Any:
            return self.gru(self.lstm(x)[0])[0]

    return Network(), (torch.randn(1, 5, 6),)


def trial(make: Any, *, fresh: bool, **options: Any) -> tuple[Any, Any, Any, Any, Any]:
    """First export, its state, second export, its state, the module."""
    torch.manual_seed(0)
    model, args = make()
    if not fresh:
        randomise(model, 5)
    first, first_state = export(model, args, **options), state_of(model)
    randomise(model, 1)
    return first, first_state, export(model, args, **options), state_of(model), model


SCRIPT = {"dynamo": False}
DYNAMO = {"dynamo": True}
PLAIN = {"dynamo": True, "optimize": False}


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "trained"])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (bert, SCRIPT),
        (bert, DYNAMO),
        (gpt2, PLAIN),
        (gpt2, DYNAMO),
        (cnn, SCRIPT),
        (cnn, DYNAMO),
        (encoder, SCRIPT),
        (encoder, PLAIN),
        (recurrent, SCRIPT),
        (recurrent, DYNAMO),
    ],
    ids=lambda value: value.__name__ if callable(value) else "-".join(map(str, value.values())),
)
def test_every_weight_of_an_export_is_found(make: Any, options: dict[str, bool], fresh: bool) -> None:
    if fresh and options == DYNAMO and make in (gpt2, cnn):
        pytest.skip("the exporter drops neutral tensors: see the next test")
    first, first_state, second, second_state, _ = trial(make, fresh=fresh, **options)
    for nameless in (False, True):
        if nameless:
            anonymise(first, 3)
        model, _ = unmerge(first, ArraysSource(first_state))
        found = find_names(weights_of(model), ArraysSource(first_state), model)
        assert found.unmatched == ()
        wrong, absent = compare(found, model, second, second_state)
        assert wrong == []
        assert {name for name, _ in absent} <= found.names.fixed
        assert MappedView(ArraysSource(second_state), found.names).dropped() == {}
        recovered = RecoveredSource(found.names, ArraysSource(weights_of(model)))
        assert recovered.specs
        for name in recovered.specs:
            assert recovered.read(name).tobytes() == np.ascontiguousarray(first_state[name]).tobytes()


@pytest.mark.parametrize("make", [gpt2, cnn])
def test_what_the_exporter_dropped_is_refused_later(make: Any) -> None:
    first, first_state, _, second_state, _ = trial(make, fresh=True, dynamo=True)
    model, _ = unmerge(first, ArraysSource(first_state))
    found = find_names(weights_of(model), ArraysSource(first_state), model)
    assert MappedView(ArraysSource(first_state), found.names).dropped() == {}
    dropped = MappedView(ArraysSource(second_state), found.names).dropped()
    assert any(name.endswith("bias") for name in dropped)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("make", [gpt2, cnn, encoder])
def test_sentinels_leave_no_doubt_even_with_fresh_weights(make: Any, dynamo: bool) -> None:
    if make is gpt2 and not dynamo:
        pytest.skip("the TorchScript exporter cannot export it")
    torch.manual_seed(0)
    model, args = make()
    model.train()
    before = state_of(model)
    exported = export_module(model, args, dynamo=dynamo)
    assert model.training
    assert all(before[n].tobytes() == a.tobytes() for n, a in state_of(model).items())
    assert exported.discovery.ties == ()
    assert MappedView(ArraysSource(before), exported.discovery.names).dropped() == {}
    _same_outputs(exported.model, model, args)
    randomise(model, 9)  # and through the map, another state gives another export
    view = MappedView(ArraysSource(state_of(model)), exported.discovery.names)
    for tensor in exported.model.graph.initializer:
        if tensor.name in view.specs:
            tensor.CopyFrom(numpy_helper.from_array(view.read(tensor.name), tensor.name))
    _same_outputs(exported.model, model, args)


def _same_outputs(exported: Any, model: Any, args: Any) -> None:
    session = onnxruntime.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {value.name: arg.numpy() for value, arg in zip(session.get_inputs(), args, strict=True)}
    with torch.no_grad():
        expected = model.eval()(*args).numpy()
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_exported_is_said() -> None:
    with pytest.raises(ModelError, match=r"no torch\.nn\.Module"):
        export_module(3, ())

    class Odd(nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            raise ValueError("no way")

    with pytest.raises(ModelError, match="cannot export"):
        export_module(Odd(), (torch.zeros(1),), dynamo=False)


@pytest.mark.parametrize(
    ("make", "options", "fresh"),
    [(bert, SCRIPT, True), (bert, DYNAMO, True), (cnn, SCRIPT, False), (cnn, DYNAMO, False), (recurrent, DYNAMO, True)],
)
def test_an_engine_takes_the_checkpoints_of_its_trainer(make: Any, options: dict[str, bool], fresh: bool) -> None:
    torch.manual_seed(0)
    model, args = make()
    if not fresh:
        randomise(model, 5)
    plan = onnx_refit.build(export(model, args, **options), checkpoint=state_of(model))
    randomise(model, 1)
    with torch.no_grad():
        expected = model.eval()(*args).numpy()
    with onnx_refit.load(plan) as engine:
        engine.refit(dict(model.state_dict()))
        feeds = {spec.name: arg.numpy() for spec, arg in zip(engine.inputs, args, strict=True)}
        got: Any = next(iter(engine.run(feeds).values()))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
