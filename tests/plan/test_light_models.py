"""Real architectures that nobody here wrote: the light models of the onnx package, with weights that say something."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_refit.plan.compile import compile_model
from onnx_refit.plan.compiled import SourceWeight
from onnx_refit.tensors import Array
from tests.plan.support import assert_close, assert_contract, ops, run, run_compiled, substitute

FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
# All of them but the four whose weights are hundreds of megabytes of fully connected layers.
MODELS = ["densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet"]
FOLDED = {"inception_v2": 69, "resnet50": 53, "shufflenet": 49, "densenet121": 59}


def sensible(source: SourceWeight, rng: np.random.Generator) -> Array:
    """Random values that keep activations near one through a hundred layers."""
    shape = source.spec.static_shape
    values = rng.standard_normal(shape)
    if any("(BatchNormalization)[4]" in use for use in source.uses):
        values = np.abs(values) * 0.3 + 0.5
    elif len(shape) <= 1:
        values = 0.1 * values + float(any("(BatchNormalization)[1]" in use for use in source.uses))
    else:
        values = values * np.sqrt(2 / np.prod(shape[1:]))
    return values.astype(np.float32)


@pytest.mark.parametrize("name", MODELS)
def test_light_model(name: str) -> None:
    proto = onnx.load(FOLDER / f"light_{name}.onnx")
    batch_norms = sum(n.op_type == "BatchNormalization" for n in proto.graph.node)
    compilation = compile_model(proto)
    compiled = compilation.compiled
    assert_contract(compilation)
    assert any(source.origin == "constant-of-shape" for source in compiled.sources)
    assert ops(compiled).count("BatchNormalization") == batch_norms - FOLDED.get(name, 0)
    assert not {"Unsqueeze", "ConstantOfShape"} & set(ops(compiled))
    rng = np.random.default_rng(3)
    weights = {source.spec.name: sensible(source, rng) for source in compiled.sources}
    (spec,) = compiled.inputs
    feeds: dict[str, Array] = {spec.name: rng.standard_normal(spec.static_shape).astype(np.float32)}
    theirs = substitute(proto, weights)
    theirs.ir_version = 8
    del theirs.graph.input[:]
    theirs.graph.input.extend(v for v in proto.graph.input if v.name == spec.name)
    expected = run(theirs, feeds)
    assert float(np.ptp(expected[0].astype(np.float64))) > 0, "the outputs must say something"
    assert_close(expected, run_compiled(compiled, weights, feeds), 1e-5)
