"""The cases: a model, its inputs, and how it came to be."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import nn

from benchmarks import networks
from onnx_refit.model.prepare import prepare
from onnx_refit.samples.bidaf.bundle import bundled_model
from onnx_refit.tensors import Array


@dataclass(frozen=True)
class Case:
    """One model with the inputs it is timed on.

    Attributes:
        name: what the tables call it.
        model: the ONNX model with weights.
        inputs: label -> inputs of one inference.
        module: the PyTorch module it was exported from, and how to call it; None for the BiDAF.
        recurrent: whether its kernels must prepack, so that a refit has a first and a full speed.
    """

    name: str
    model: onnx.ModelProto
    inputs: Mapping[str, Mapping[str, Array]]
    module: nn.Module | None = None
    recurrent: bool = False


def exported(
    module: nn.Module, example: torch.Tensor, name: str, dynamic: dict[str, dict[int, str]]
) -> onnx.ModelProto:
    """A PyTorch module as ONNX, BatchNorm left unfolded as a training loop's checkpoint has it."""
    buffer = io.BytesIO()
    torch.onnx.export(
        module,
        (example,),
        buffer,
        input_names=[name],
        output_names=["y"],
        dynamic_axes=dynamic,
        opset_version=17,
        dynamo=False,
        do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,
    )
    return onnx.load_model_from_string(buffer.getvalue())


def _tokens(*shape: int) -> Array:
    return np.random.default_rng(0).integers(0, 8000, shape)


def _normal(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def encoder() -> Case:
    """Transformer encoder, 6 x 512."""
    torch.manual_seed(0)
    module = networks.randomise(networks.Encoder())
    model = exported(module, torch.zeros(1, 16, dtype=torch.int64), "tokens", {"tokens": {0: "batch", 1: "length"}})
    inputs = {f"S={length}": {"tokens": _tokens(1, length)} for length in (16, 128)}
    return Case("encoder 6x512", model, inputs, module)


def _image(name: str, make: Callable[[], nn.Module]) -> Case:
    torch.manual_seed(0)
    module = networks.randomise(make())
    model = exported(module, torch.zeros(1, 3, 224, 224), "image", {"image": {0: "batch"}})
    return Case(name, model, {"b=1": {"image": _normal(1, 3, 224, 224)}}, module)


def resnet18() -> Case:
    """ResNet-18."""
    return _image("ResNet-18", lambda: networks.ResNet((2, 2, 2, 2), bottleneck=False))


def resnet50() -> Case:
    """ResNet-50."""
    return _image("ResNet-50", lambda: networks.ResNet((3, 4, 6, 3), bottleneck=True))


def mobilenet() -> Case:
    """MobileNetV2."""
    return _image("MobileNetV2", networks.MobileNet)


def mlp() -> Case:
    """MLP 4 x 4096."""
    torch.manual_seed(0)
    module = networks.MLP().eval()
    model = exported(module, torch.zeros(1, 4096), "x", {"x": {0: "batch"}})
    return Case("MLP 4x4096", model, {f"b={rows}": {"x": _normal(rows, 4096)} for rows in (1, 64)}, module)


def gru() -> Case:
    """GRU 2 x 256, bidirectional."""
    torch.manual_seed(0)
    module = networks.Recurrent().eval()
    model = exported(module, torch.zeros(50, 1, dtype=torch.int64), "tokens", {"tokens": {0: "length"}})
    return Case("GRU 2x256", model, {"T=50": {"tokens": _tokens(50, 1)}}, module, recurrent=True)


def bidaf() -> Case:
    """The bundled BiDAF, prepared; random words."""
    model = prepare(bundled_model()).model
    inputs = {f"T={length}": _words(model, length, 10) for length in (10, 200)}
    return Case("BiDAF", model, inputs, recurrent=True)


def _words(model: onnx.ModelProto, context: int, query: int) -> dict[str, Array]:
    """Word and character ids for every input: those of the context have its length, the others the query's."""
    rng = np.random.default_rng(0)
    names = [value.name for value in model.graph.input]
    lengths: dict[str, int] = {}
    for value in model.graph.input:
        dimension = value.type.tensor_type.shape.dim[0].dim_param
        lengths[value.name] = context if dimension in {"c", "context"} else query
    made = {}
    for name in names:
        shape = [d.dim_value or lengths[name] for d in model.graph.input[names.index(name)].type.tensor_type.shape.dim]
        made[name] = rng.integers(1, 50 if len(shape) == 4 else 5000, shape)
    return made


CASES: Mapping[str, Callable[[], Case]] = {
    "bidaf": bidaf,
    "encoder": encoder,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "mobilenet": mobilenet,
    "mlp": mlp,
    "gru": gru,
}
