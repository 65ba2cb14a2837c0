"""Architectures that nobody here wrote: the light models of the onnx package, with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_refit.engine.onnxruntime.backend import create
from onnx_refit.engine.onnxruntime.options import OnnxRuntimeOptions
from onnx_refit.plan.compile import compile_model
from onnx_refit.plan.compiled import Verdict
from onnx_refit.tensors import Array

from .compiled_by_hand import baked, relative_error

FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
QUICK = ["shufflenet", "squeezenet"]
SLOW = ["bvlc_alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50", "vgg19", "zfnet512"]


def materialised(model: onnx.ModelProto, weights: dict[str, Array]) -> onnx.ModelProto:
    """The model with initializers instead of the ConstantOfShape nodes that stand for its weights."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    nodes = [node for node in changed.graph.node if node.output[0] not in weights]
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    held = {tensor.name for tensor in changed.graph.initializer}
    for tensor in changed.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights[tensor.name], tensor.name))
    for name, array in weights.items():
        if name not in held:
            changed.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return changed


def random_weights(model: onnx.ModelProto, shapes: dict[str, Array], seed: int) -> dict[str, Array]:
    """Weights that keep activations in range; variances of BatchNormalization are positive."""
    rng = np.random.default_rng(seed)
    variances = {node.input[4] for node in model.graph.node if node.op_type == "BatchNormalization"}
    made: dict[str, Array] = {}
    for name, array in shapes.items():
        values = rng.standard_normal(array.shape, dtype=np.float32)
        if name in variances:
            values = np.abs(values) + np.float32(0.5)
        elif array.ndim > 1:
            values *= np.float32(np.sqrt(2 / np.prod(array.shape[1:])))
        else:
            values *= np.float32(0.1)
        made[name] = values.astype(array.dtype)
    return made


def check(name: str) -> None:
    model = onnx.load(FOLDER / f"light_{name}.onnx")
    compilation = compile_model(model)
    backend = create(compilation.compiled, None, OnnxRuntimeOptions(threads=2))
    assert not [decision for decision in backend.decisions if decision.subject == "the whole graph"]
    (spec,) = backend.inputs
    x = np.random.default_rng(0).standard_normal([d if isinstance(d, int) else 1 for d in spec.shape or ()])
    inputs = {spec.name: x.astype(np.float32)}
    made = None
    for seed in range(2):
        weights = random_weights(model, dict(compilation.weights), seed)
        made = backend.derive(weights, made)
        wanted = baked(materialised(model, weights)).run(None, inputs)
        for got, right in zip(backend.run(made, inputs).values(), wanted, strict=True):
            assert np.isfinite(right).all()
            assert relative_error(got, right) < 1e-5
    # Whether there was a C compiler has nothing to do with the model.
    decisions = [decision for decision in backend.decisions if decision.subject != "refits"]
    rejected = [decision.subject for decision in decisions if decision.verdict is Verdict.REJECTED]
    assert not [subject for subject in rejected if not subject.startswith("matrix products")]
    backend.close()


@pytest.mark.parametrize("name", QUICK)
def test_a_light_model(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_large_light_model(name: str) -> None:
    check(name)
