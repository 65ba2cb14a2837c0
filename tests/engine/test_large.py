"""A model beyond protobuf's 2 GiB, and one of thousands of tensors."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_refit.engine.onnxruntime.backend import create
from onnx_refit.engine.onnxruntime.options import OnnxRuntimeOptions
from onnx_refit.plan.compiled import CompiledModel, RefitProgram, SourceWeight
from onnx_refit.tensors import Array, TensorSpec, value_info_of

from .compiled_by_hand import relative_error
from .zoo import model, n, x_of


def stack_of_products(count: int, size: int) -> CompiledModel:
    """A chain of square products, the weights being inputs from the start."""
    nodes = [
        n("MatMul", f"{'x' if not k else f'v{k}'} w{k}", "y" if k == count - 1 else f"v{k + 1}") for k in range(count)
    ]
    made = model(nodes, [("x", ["M", size])], [("y", ["M", size])], [])
    specs = tuple(TensorSpec(f"w{k}", "float32", (size, size)) for k in range(count))
    made.graph.input.extend(value_info_of(spec) for spec in specs)
    return CompiledModel(
        activation=made,
        program=RefitProgram(None, {s.name: s.name for s in specs}, {s.name: frozenset({s.name}) for s in specs}),
        sources=tuple(SourceWeight(spec, ()) for spec in specs),
        engine_weights=specs,
        inputs=(TensorSpec("x", "float32", ("M", size)),),
        outputs=(TensorSpec("y", "float32", ("M", size)),),
    )


def check(count: int, size: int) -> None:
    compiled = stack_of_products(count, size)
    backend = create(compiled, None, OnnxRuntimeOptions(threads=2))
    rng = np.random.default_rng(0)
    block = rng.standard_normal((size, size), dtype=np.float32) / np.float32(np.sqrt(size))
    weights: dict[str, Array] = {f"w{k}": np.roll(block, 7 * k, axis=1) for k in range(count)}
    made = backend.derive(weights)
    inputs = x_of(2, size)
    value = inputs["x"].astype(np.float64)
    for k in range(count):
        value = value @ np.asarray(weights[f"w{k}"], np.float64)
    assert relative_error(backend.run(made, inputs)["y"], value) < 1e-5
    changed = frozenset({f"w{count // 2}"})
    other = backend.derive({name: np.negative(weights[name].view(np.float32)) for name in changed}, made, changed)
    assert relative_error(backend.run(other, inputs)["y"], -value) < 1e-5
    assert other.nbytes - other.shared_nbytes == 4 * size * size
    backend.close()


def test_two_thousand_tensors() -> None:
    check(2000, 16)


@pytest.mark.slow
def test_more_than_two_gib_of_weights() -> None:
    check(9, 8192)
